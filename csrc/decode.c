/* One decoding step for N texts, N small: a whole forward pass over one token of each text, in one call.
 *
 * Memory limits the speed: each weight is read once for all texts, and the keys and values of each text once. The pass
 * is a chain of short stages, about 90 for GPT-2 124M, which the blocks of a model list (`stages` in gpt2c/model). Each
 * is a loop that the threads share: over rows, over columns of a layer's output, or over heads. The arithmetic of a row
 * does not depend on the other rows.
 *
 * The formulas of the stages are in the files of their ops: encoder.c, layernorm.c, rmsnorm.c, linear.c, attention.c,
 * rope.c, gelu.c, swiglu.c. */

#include "internal.h"
#include "vmath.h"

/* The fewest multiply-adds of a task: for a small model a barrier costs more than a stage. */
enum { WORTH = 100000 };

/* ---- queries over the cache --------------------------------------------------------------------------------- */

/* out (width, in `vectors` vectors) = sum over t of weights (n) times columns of values (n x HS), from `from` on. */
static inline __attribute__((always_inline)) void weighted_sum(float *out, const float *weights, const void *values,
                                                               int64_t n, int64_t HS, int64_t from, int64_t width,
                                                               const int vectors, const int type) {
    vf acc[8];
    for (int k = 0; k < vectors; k++) acc[k] = vf_set1(0.0f);
    for (int64_t t = 0; t < n; t++)
        for (int k = 0; k < vectors; k++)
            acc[k] = vf_fma(vf_set1(weights[t]),
                            load_numbers(values, t * HS + from + k * VF_LEN, width - k * VF_LEN, type), acc[k]);
    for (int k = 0; k < vectors; k++) vf_store_n(out + k * VF_LEN, acc[k], width - k * VF_LEN);
}

/* out (heads,HS) = softmax(q (heads,HS) keys^T / sqrt(HS)) values, with keys and values (n,HS) that all heads share;
 * scores (heads,n) is scratch. A key's scale multiplies its score, and a value's its weight. */
static inline __attribute__((always_inline)) void attend(float *out, const float *q, Rows keys, Rows values,
                                                         int64_t heads, int64_t n, int64_t HS, float *scores,
                                                         const int type) {
    const Linear by_keys = {keys.numbers, keys.scales, NULL, HS, n, type};
    const Input queries = {q, NULL, NULL};
    const vf scale = vf_set1(1.0f / sqrtf((float)HS));
    linear_columns(scores, &by_keys, &queries, heads, 0, n, 0);
    for (int64_t h = 0; h < heads; h++, out += HS, scores += n) {
        vf highest = vf_set1(-INFINITY), sum = vf_set1(0.0f);
        for (int64_t t = 0; t < n; t += VF_LEN) {
            const vf score = vf_mul(vf_load_n(scores + t, n - t), scale);
            highest = vf_max(highest, vf_first_n(score, vf_set1(-INFINITY), min64(VF_LEN, n - t)));
            vf_store_n(scores + t, score, n - t);
        }
        highest = vf_set1(vf_hmax(highest));
        for (int64_t t = 0; t < n; t += VF_LEN) {
            const vf e = vf_keep_n(vf_exp(vf_sub(vf_load_n(scores + t, n - t), highest)), n - t);
            sum = vf_add(sum, e);
            vf_store_n(scores + t, type == SIGNED8 ? vf_mul(e, vf_load_n(values.scales + t, n - t)) : e, n - t);
        }
        int64_t c = 0;
        if (type != FP32) /* more columns of a small row at once, because it is one or two cache lines */
            for (; c + 8 * VF_LEN <= HS; c += 8 * VF_LEN)
                weighted_sum(out + c, scores, values.numbers, n, HS, c, 8 * VF_LEN, 8, type);
        for (; c + 4 * VF_LEN <= HS; c += 4 * VF_LEN)
            weighted_sum(out + c, scores, values.numbers, n, HS, c, 4 * VF_LEN, 4, type);
        for (; c < HS; c += VF_LEN)
            weighted_sum(out + c, scores, values.numbers, n, HS, c, min64(VF_LEN, HS - c), 1, type);
        const vf inverse = vf_set1(1.0f / vf_sum(sum));
        for (c = 0; c < HS; c += VF_LEN) vf_store_n(out + c, vf_mul(vf_load_n(out + c, HS - c), inverse), HS - c);
    }
}

/* ---- stages ---------------------------------------------------------------------------------------------------- */

static int reads_int8(const Stage *s) { return s->op == MATMUL && s->linear.type == INT8; }

/* Whether a norm quantizes its rows for the stage after it, which saves that one a loop. */
static int quantizes(const Stage *s, const Stage *end) {
    return (s->op == LAYERNORM || s->op == RMSNORM) && s + 1 < end && reads_int8(s + 1) && s[1].x == s->out;
}

static void encoder(const Stage *s, const int32_t *tokens, const int32_t *positions, int64_t N, Team *team) {
    const int64_t C = s->linear.C;
    for_shared (i, N, worth(C), team)
        embed_row(s->out + i * C, &s->linear, s->wpe ? s->wpe + positions[i] * C : NULL, tokens[i]);
}

/* Writes the rows to `q`, too, unless it is NULL. */
static void norm(const Stage *s, const Quantized *q, int64_t N, Team *team) {
    const int64_t C = s->C;
    for_shared (i, N, worth(C), team) {
        const float *row = s->x + i * C;
        float mean, rstd;
        if (s->op == LAYERNORM)
            layernorm_row(s->out + i * C, &mean, &rstd, row, s->gain, s->shift, s->eps, FP32, C);
        else
            rmsnorm_row(s->out + i * C, &rstd, row, s->gain, s->eps, FP32, C);
        if (q) quantize_row(*q, s->out + i * C, i, C);
    }
}

/* Writes low (N,R) = factor * x down^T of an adapter. */
static void adapter(const Stage *s, int64_t N, Team *team) {
    const Linear down = {s->down, NULL, NULL, s->linear.C, s->R, FP32};
    const Input x = {s->x, NULL, NULL};
    for_shared (vector, ceil_div(s->R, VF_LEN), 1 + WORTH / (N * down.C * VF_LEN), team) {
        const int64_t from = vector * VF_LEN, to = min64(s->R, from + VF_LEN);
        linear_columns(s->low, &down, &x, N, from, to, 0);
        for (int64_t i = 0; i < N; i++)
            for (int64_t r = from; r < to; r++) s->low[i * s->R + r] *= s->factor;
    }
}

/* Columns [from, to) of out (N,OC) = the rows of the layer from `row` on, and of its adapter. */
static void adapted_columns(float *out, const Stage *s, const Input *x, int64_t row, int64_t OC, int64_t N,
                            int64_t from, int64_t to, int accumulate) {
    const Linear rows = linear_rows_of(&s->linear, row, row + OC);
    linear_columns(out, &rows, x, N, from, to, accumulate);
    if (!s->down) return;
    const Linear up = {s->up + row * s->R, NULL, NULL, s->R, OC, FP32};
    const Input low = {s->low, NULL, NULL};
    linear_columns(out, &up, &low, N, from, to, 1);
}

/* An INT8 layer reads x from q; `ready` says whether it is there. `words` is memory of the thread for its input. */
static void matmul(const Stage *s, Quantized q, int ready, float *words, int64_t N, Team *team) {
    const Linear *layer = &s->linear;
    const int64_t C = layer->C, OC = s->then == SWIGLU ? layer->OC / 2 : layer->OC;
    if (layer->type == INT8 && !ready)
        for_shared (i, N, worth(C), team) quantize_row(q, s->x + i * C, i, C);
    if (s->down) adapter(s, N, team);
    const Input x = input_of(layer, s->x, FP32, &q, s->precision, words, N);
    for_shared (vector, ceil_div(OC, VF_LEN), 1 + WORTH / (N * C * VF_LEN), team) {
        const int64_t from = vector * VF_LEN, to = min64(OC, from + VF_LEN);
        adapted_columns(s->out, s, &x, 0, OC, N, from, to, s->then == ADD);
        if (s->then == SWIGLU) adapted_columns(s->inner, s, &x, OC, OC, N, from, to, 0);
        for (int64_t i = 0; i < N; i++) {
            float *row = s->out + i * OC;
            if (s->then == GELU) gelu_part(row, row, from, to);
            if (s->then == SWIGLU) swiglu_part(row, row, s->inner + i * OC, from, to);
        }
    }
}

/* A task is a head of keys and values with the queries that share it. */
static void attention(const Stage *s, const int32_t *slots, const int32_t *positions, float *scores, int64_t N,
                      Team *team) {
    const int64_t HS = s->HS, KV = s->KV, P = s->P, heads = s->NH / KV, W = (s->NH + 2 * KV) * HS, D = HS / 2;
    int64_t longest = 0;
    for (int64_t i = 0; i < N; i++) longest = positions[i] >= longest ? positions[i] + 1 : longest;
    for_shared (task, N * KV, 1 + WORTH / (2 * longest * HS * heads), team) {
        const int64_t i = task / KV, h = task % KV, t = positions[i], start = (slots[i] * KV + h) * P;
        float *q = s->x + i * W + h * heads * HS, *k = s->x + i * W + (s->NH + h) * HS, *v = k + KV * HS;
        if (s->cos) {
            for (int64_t c = 0; c < heads * HS; c += HS)
                rope_head(q + c, q + c, s->cos + t * D, s->sin + t * D, 1.0f, D);
            rope_head(k, k, s->cos + t * D, s->sin + t * D, 1.0f, D);
        }
        store_cached(s->keys, s->key_scales, start + t, k, HS, s->cache, FP32);
        store_cached(s->values, s->value_scales, start + t, v, HS, s->cache, FP32);
        const Rows keys = cached_rows(s->keys, s->key_scales, start, HS, s->cache);
        const Rows values = cached_rows(s->values, s->value_scales, start, HS, s->cache);
        float *out = s->out + (i * s->NH + h * heads) * HS;
        if (s->cache == SIGNED8)
            attend(out, q, keys, values, heads, t + 1, HS, scores, SIGNED8);
        else if (s->cache == FP16)
            attend(out, q, keys, values, heads, t + 1, HS, scores, FP16);
        else
            attend(out, q, keys, values, heads, t + 1, HS, scores, FP32);
    }
}

/* ---- the step ------------------------------------------------------------------------------------------------- */

static int64_t eight_bits_size(const Stage *stages, int64_t count, int64_t N) {
    int64_t widest = 0;
    for (const Stage *s = stages; s < stages + count; s++)
        if (reads_int8(s) && s->linear.C > widest) widest = s->linear.C;
    return quantized_size(N, widest);
}

/* Floats of one thread: scores, or the input of a layer. */
static int64_t own_size(const Stage *stages, int64_t count, int64_t N) {
    int64_t size = 0;
    for (const Stage *s = stages; s < stages + count; s++) {
        if (s->op == ATTENTION && s->NH / s->KV * s->P > size) size = s->NH / s->KV * s->P;
        if (s->op == MATMUL && input_size(N, s->linear.C) > size) size = input_size(N, s->linear.C);
    }
    return round_up(size, LINE);
}

int64_t decode_scratch_size(const Stage *stages, int64_t count, int64_t N, int threads) {
    return round_up(eight_bits_size(stages, count, N), LINE) + threads * own_size(stages, count, N);
}

void decode_step(const Stage *stages, int64_t count, const int32_t *tokens, const int32_t *slots,
                 const int32_t *positions, float *scratch, int64_t N, Team *team) {
    const Stage *end = stages + count;
    float *own =
        scratch + round_up(eight_bits_size(stages, count, N), LINE) + team->member * own_size(stages, count, N);
    int64_t products = 0;
    for (const Stage *s = stages; s < end; s++) products += s->op == MATMUL ? N * s->linear.C * s->linear.OC : 0;
    expect_tasks(team, products / WORTH);
    tiles_begin();
    for (const Stage *s = stages; s < end && N > 0; s++) {
        const Quantized q = quantized_in(scratch, N, s->op == MATMUL ? s->linear.C : s->C);
        if (s->op == ENCODER)
            encoder(s, tokens, positions, N, team);
        else if (s->op == MATMUL)
            matmul(s, q, s > stages && quantizes(s - 1, end), own, N, team);
        else if (s->op == ATTENTION)
            attention(s, slots, positions, own, N, team);
        else
            norm(s, quantizes(s, end) ? &q : NULL, N, team);
    }
    tiles_end();
}
