/* One decoding step for N texts, N small: a whole forward pass over one token of each text, in one call.
 *
 * Memory limits the speed: each weight is read once for all texts, and the keys and values of each text once. The pass
 * is a chain of about 90 short stages. Each stage is a loop that the threads share: over rows, over columns of a
 * layer's output, or over heads. The arithmetic of a row does not depend on the other rows.
 *
 * The formulas of the stages are in the files of their ops: encoder.c, layernorm.c, linear.c, attention.c, gelu.c. */

#include "internal.h"
#include "vmath.h"

/* The fewest multiply-adds of a task: for a small model a barrier costs more than a stage. */
enum { WORTH = 100000 };

/* ---- one query over the cache ------------------------------------------------------------------------------- */

/* out (width, in `vectors` vectors) = sum over t of weights (n) times values (n x width, row stride HS). */
static inline __attribute__((always_inline)) void weighted_sum(float *out, const float *weights, const float *values,
                                                               int64_t n, int64_t HS, int64_t width,
                                                               const int vectors) {
    enum { MOST = 4 };
    vf acc[MOST];
    for (int k = 0; k < vectors; k++) acc[k] = vf_set1(0.0f);
    for (int64_t t = 0; t < n; t++)
        for (int k = 0; k < vectors; k++)
            acc[k] = vf_fma(vf_set1(weights[t]), vf_load_n(values + t * HS + k * VF_LEN, width - k * VF_LEN), acc[k]);
    for (int k = 0; k < vectors; k++) vf_store_n(out + k * VF_LEN, acc[k], width - k * VF_LEN);
}

/* out (HS) = softmax(q (HS) keys^T / sqrt(HS)) values, with keys and values (n,HS); scores (n) is scratch. */
static void attend(float *out, const float *q, const float *keys, const float *values, int64_t n, int64_t HS,
                   float *scores) {
    const Linear by_keys = {keys, NULL, NULL, HS, n, FP32};
    const vf scale = vf_set1(1.0f / sqrtf((float)HS));
    linear_columns(scores, &by_keys, q, NULL, 1, 0, n, 0);
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
        vf_store_n(scores + t, e, n - t);
    }
    int64_t c = 0;
    for (; c + 4 * VF_LEN <= HS; c += 4 * VF_LEN) weighted_sum(out + c, scores, values + c, n, HS, 4 * VF_LEN, 4);
    for (; c < HS; c += VF_LEN) weighted_sum(out + c, scores, values + c, n, HS, min64(VF_LEN, HS - c), 1);
    const vf inverse = vf_set1(1.0f / vf_sum(sum));
    for (c = 0; c < HS; c += VF_LEN) vf_store_n(out + c, vf_mul(vf_load_n(out + c, HS - c), inverse), HS - c);
}

/* ---- stages ---------------------------------------------------------------------------------------------------- */

/* Quantizes x (N,C) into q if the weights of `layer`, the next stage, are INT8. */
static void prepare(Quantized q, const float *x, int64_t N, const Linear *layer, Team *team) {
    if (layer->type == INT8)
        for_shared (i, N, worth(layer->C), team) quantize_row(q, x + i * layer->C, i, layer->C);
}

/* out (N,C) = layernorm(x (N,C)); quantizes it into q if the weights of `layer`, the next stage, are INT8. */
static void normalise(float *out, Quantized q, const float *x, const float *weight, const float *bias, float eps,
                      int64_t N, const Linear *layer, Team *team) {
    const int64_t C = layer->C;
    for_shared (i, N, worth(C), team) {
        float mean, rstd;
        layernorm_row(out + i * C, &mean, &rstd, x + i * C, weight, bias, eps, C);
        if (layer->type == INT8) quantize_row(q, out + i * C, i, C);
    }
}

/* out (N,OC) = layer(x), out += layer(x) or out = GELU(layer(x)); an INT8 layer reads x (N,C) from q. */
enum { WRITE, ADD, GELU };
static void linear(float *out, const Linear *layer, const float *x, const Quantized *q, int64_t N, int then,
                   Team *team) {
    const int64_t OC = layer->OC;
    for_shared (vector, ceil_div(OC, VF_LEN), 1 + WORTH / (N * layer->C * VF_LEN), team) {
        const int64_t from = vector * VF_LEN, to = min64(OC, from + VF_LEN);
        linear_columns(out, layer, x, q, N, from, to, then == ADD);
        for (int64_t i = 0; i < N && then == GELU; i++) gelu_part(out + i * OC, out + i * OC, from, to);
    }
}

/* ---- the step ------------------------------------------------------------------------------------------------- */

static int64_t widest(const Decoder *model) { return model->F > 3 * model->wte.C ? model->F : 3 * model->wte.C; }

int64_t decode_scratch_size(const Decoder *model, int64_t N, int64_t P, int threads) {
    return N * (3 * model->wte.C + widest(model)) + quantized_size(N, widest(model)) + threads * P;
}

void decode_step(float *logits, float *keys, float *values, const int32_t *tokens, const int32_t *slots,
                 const int32_t *positions, const Decoder *model, float *scratch, int64_t N, int64_t S, int64_t P,
                 Team *team) {
    const int64_t C = model->wte.C, F = model->F, NH = model->NH, HS = C / NH;
    float *x = scratch, *normed = x + N * C, *att = normed + N * C, *wide = att + N * C;
    float *eight_bits = wide + N * widest(model), *scores = eight_bits + quantized_size(N, widest(model));
    const Quantized q = quantized_in(eight_bits, N, C), q_wide = quantized_in(eight_bits, N, F);
    if (N == 0) return;
    int64_t longest = 0;
    for (int64_t i = 0; i < N; i++) longest = positions[i] >= longest ? positions[i] + 1 : longest;
    for_shared (i, N, worth(C), team) embed_row(x + i * C, &model->wte, model->wpe + positions[i] * C, tokens[i]);
    for (int64_t l = 0; l < model->L; l++) {
        const Layer *layer = model->layers + l;
        normalise(normed, q, x, layer->ln_1_weight, layer->ln_1_bias, model->eps, N, &layer->c_attn, team);
        linear(wide, &layer->c_attn, normed, &q, N, WRITE, team);
        for_shared (head, N * NH, 1 + WORTH / (2 * longest * HS), team) {
            const int64_t i = head / NH, h = head % NH, t = positions[i];
            const int64_t start = ((l * S + slots[i]) * NH + h) * P * HS;
            const float *qkv = wide + i * 3 * C + h * HS;
            memcpy(keys + start + t * HS, qkv + C, (size_t)HS * sizeof(float));
            memcpy(values + start + t * HS, qkv + 2 * C, (size_t)HS * sizeof(float));
            attend(att + i * C + h * HS, qkv, keys + start, values + start, t + 1, HS, scores + team->member * P);
        }
        prepare(q, att, N, &layer->attn_proj, team);
        linear(x, &layer->attn_proj, att, &q, N, ADD, team);
        normalise(normed, q, x, layer->ln_2_weight, layer->ln_2_bias, model->eps, N, &layer->c_fc, team);
        linear(wide, &layer->c_fc, normed, &q, N, GELU, team);
        prepare(q_wide, wide, N, &layer->mlp_proj, team);
        linear(x, &layer->mlp_proj, wide, &q_wide, N, ADD, team);
    }
    normalise(normed, q, x, model->ln_f_weight, model->ln_f_bias, model->eps, N, &model->wte, team);
    linear(logits, &model->wte, normed, &q, N, WRITE, team);
}
