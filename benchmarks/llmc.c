/* Training steps of llm.c on GPT-2 124M with random weights and tokens, for the table in benchmarks/README.md.
 *
 *   gcc -Ofast -march=native -fopenmp -DOMP -DTESTING -I PATH/TO/llm.c benchmarks/llmc.c -lm -o llmc
 *   OMP_NUM_THREADS=2 ./llmc 4 64 3      # B, T, steps after a first one: prints seconds a step
 *
 * benchmarks/README.md says where its lines go.
 *
 * llm.c's own train_gpt2.c is included as it is; it wants its weights in a file, so one is written first. */

#include "train_gpt2.c"

enum { MAX_STEPS = 100 };

static void write_weights(const char *path) {
    int header[256] = {20240326, 3, 1024, 50257, 12, 12, 768, 50304};
    GPT2Config config = {.max_seq_len = header[2],
                         .vocab_size = header[3],
                         .num_layers = header[4],
                         .num_heads = header[5],
                         .channels = header[6],
                         .padded_vocab_size = header[7]};
    size_t sizes[NUM_PARAMETER_TENSORS];
    fill_in_parameter_sizes(sizes, config);
    FILE *file = fopenCheck(path, "wb");
    fwrite(header, sizeof(int), 256, file);
    for (int tensor = 0; tensor < NUM_PARAMETER_TENSORS; tensor++)
        for (size_t i = 0; i < sizes[tensor]; i++) {
            float weight = 0.02f * ((float)rand() / (float)RAND_MAX - 0.5f);
            fwrite(&weight, sizeof weight, 1, file);
        }
    fcloseCheck(file);
}

static int in_order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words) {
    if (count != 4 || atoi(words[3]) < 1 || atoi(words[3]) > MAX_STEPS) {
        fprintf(stderr, "usage: llmc B T STEPS, at most %d steps\n", MAX_STEPS);
        return 2;
    }
    const int B = atoi(words[1]), T = atoi(words[2]), steps = atoi(words[3]);
    char path[] = "/tmp/llmc-XXXXXX";
    close(mkstemp(path));
    write_weights(path);
    GPT2 model;
    gpt2_build_from_checkpoint(&model, path);
    remove(path);
    int *tokens = malloc((size_t)(B * T + 1) * sizeof *tokens);
    for (int i = 0; i <= B * T; i++) tokens[i] = rand() % model.config.vocab_size;
    double seconds[MAX_STEPS];
    for (int step = 0; step <= steps; step++) {
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        gpt2_forward(&model, tokens, tokens + 1, B, T);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.0f, step + 1);
        clock_gettime(CLOCK_MONOTONIC, &end);
        if (step > 0)
            seconds[step - 1] = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    }
    qsort(seconds, (size_t)steps, sizeof *seconds, in_order);
    printf("%d x %d: %.3f s a step, %.1f tokens/s, loss %.3f\n", B, T, seconds[steps / 2], B * T / seconds[steps / 2],
           model.mean_loss);
    free(tokens);
    gpt2_free(&model);
    return 0;
}
