/* Causal multi-head attention, tile by tile: out = softmax(mask(q k^T / sqrt(HS))) v for each head.
 *
 * Method: FlashAttention (Dao et al. 2022, arXiv:2205.14135; online softmax, Milakov and Gimelshein 2018,
 * arXiv:1805.02867). Scores exist only for one TILE x TILE block at a time, in the second-level cache. Forward keeps,
 * beside the output, one number a row: lse, the log of the softmax's denominator. Backward recomputes each block of
 * probabilities as exp(score - lse). Blocks above the diagonal are skipped, so half of T x T is computed.
 *
 * Threads share the heads of the batch (and, forward, blocks of queries). A thread sums its blocks in a fixed order. */

#include "internal.h"
#include "vmath.h"

enum { TILE = 64 };

int64_t attention_scratch_size(int64_t HS, int threads) {
    int64_t widest = HS > TILE ? HS : TILE;
    int64_t product = gemm_tile_scratch_size(widest, widest, TILE), scores = gemm_tile_scratch_size(TILE, TILE, HS);
    return threads * (2 * TILE * TILE + TILE * HS + (product > scores ? product : scores));
}

/* How many of a block's keys (columns) query `row` may see, the first query standing `ahead` positions after the first
 * key. The probability of the others is 0. */
static int64_t visible(int64_t row, int64_t ahead, int64_t columns) { return min64(columns, ahead + row + 1); }

/* One block of queries: out (rows x HS, row stride C) and lse (rows), against all keys it may see. */
static void attend(float *out, float *lse, const float *qkv, int64_t first, int64_t rows, int64_t C, int64_t HS,
                   float *scratch) {
    float *scores = scratch, *sum_v = scores + TILE * TILE, *packing = sum_v + TILE * HS;
    float maximum[TILE], denominator[TILE];
    const int64_t stride = 3 * C;
    const float scale = 1.0f / sqrtf((float)HS);
    const Operand q = {qkv + first * stride, stride, 1};
    for (int64_t i = 0; i < rows; i++) {
        maximum[i] = -INFINITY;
        denominator[i] = 0.0f;
    }
    memset(sum_v, 0, (size_t)(rows * HS) * sizeof(float));
    for (int64_t key = 0; key < first + rows; key += TILE) {
        const int64_t columns = min64(TILE, first + rows - key), ahead = first - key;
        const Operand k = {qkv + key * stride + C, stride, 1};
        const Operand v = {qkv + key * stride + 2 * C, 1, stride};
        gemm_tile(scores, TILE, q, k, 0, rows, columns, HS, packing);
        for (int64_t i = 0; i < rows; i++) {
            float *row = scores + i * TILE;
            const int64_t seen = visible(i, ahead, columns);
            float highest = maximum[i];
            for (int64_t j = 0; j < seen; j++) highest = row[j] * scale > highest ? row[j] * scale : highest;
            /* what was summed under the old maximum shrinks to the new one */
            const float shrink = maximum[i] == -INFINITY ? 0.0f : expf(maximum[i] - highest);
            vf sum = vf_set1(0.0f);
            for (int64_t j = 0; j < columns; j += VF_LEN) {
                vf s = vf_fma(vf_load_n(row + j, columns - j), vf_set1(scale), vf_set1(-highest));
                vf p = j < seen ? vf_keep_n(vf_exp(s), seen - j) : vf_set1(0.0f);
                sum = vf_add(sum, p);
                vf_store_n(row + j, p, columns - j);
            }
            denominator[i] = denominator[i] * shrink + vf_sum(sum);
            maximum[i] = highest;
            if (shrink != 1.0f)
                for (int64_t c = 0; c < HS; c += VF_LEN)
                    vf_store_n(sum_v + i * HS + c, vf_mul(vf_load_n(sum_v + i * HS + c, HS - c), vf_set1(shrink)),
                               HS - c);
        }
        gemm_tile(sum_v, HS, (Operand){scores, TILE, 1}, v, 1, rows, HS, columns, packing);
    }
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < HS; c += VF_LEN)
            vf_store_n(out + i * C + c, vf_div(vf_load_n(sum_v + i * HS + c, HS - c), vf_set1(denominator[i])), HS - c);
        lse[i] = maximum[i] + logf(denominator[i]);
    }
}

void attention_forward(float *out, float *lse, const float *qkv, float *scratch, int64_t B, int64_t T, int64_t C,
                       int64_t NH, int threads) {
    const int64_t HS = C / NH, blocks = ceil_div(T, TILE), share = attention_scratch_size(HS, 1);
#pragma omp parallel for num_threads(team(threads, B * T * C)) schedule(dynamic)
    for (int64_t task = 0; task < B * NH * blocks; task++) {
        /* longest rows of blocks first, so that the short ones fill the gaps at the end */
        const int64_t first = (blocks - 1 - task / (B * NH)) * TILE, b = task % (B * NH) / NH, h = task % NH;
        attend(out + (b * T + first) * C + h * HS, lse + (b * NH + h) * T + first, qkv + b * T * 3 * C + h * HS, first,
               min64(TILE, T - first), C, HS, scratch + omp_get_thread_num() * share);
    }
}

/* One head: dqkv (T rows, stride 3C) from dout, out (T rows, stride C) and lse (T). */
static void attend_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                            int64_t T, int64_t C, int64_t HS, float *scratch) {
    float *p = scratch, *dp = p + TILE * TILE, *packing = dp + TILE * TILE;
    const int64_t stride = 3 * C;
    const float scale = 1.0f / sqrtf((float)HS);
    for (int64_t t = 0; t < T; t++)
        for (int part = 0; part < 3; part++) memset(dqkv + t * stride + part * C, 0, (size_t)HS * sizeof(float));
    for (int64_t key = 0; key < T; key += TILE) {
        const int64_t columns = min64(TILE, T - key);
        const float *k = qkv + key * stride + C, *v = qkv + key * stride + 2 * C;
        float *dk = dqkv + key * stride + C, *dv = dqkv + key * stride + 2 * C;
        for (int64_t first = key; first < T; first += TILE) {
            const int64_t rows = min64(TILE, T - first), ahead = first - key;
            const float *q = qkv + first * stride, *dblock = dout + first * C, *block = out + first * C;
            float *dq = dqkv + first * stride;
            gemm_tile(p, TILE, (Operand){q, stride, 1}, (Operand){k, stride, 1}, 0, rows, columns, HS, packing);
            gemm_tile(dp, TILE, (Operand){dblock, C, 1}, (Operand){v, stride, 1}, 0, rows, columns, HS, packing);
            for (int64_t i = 0; i < rows; i++) {
                /* p = exp(scores - lse), out = p v. For softmax, dscores = p * (dp - sum(p * dp)), and that sum is
                 * dout . out, whatever the keys. */
                const int64_t seen = visible(i, ahead, columns);
                vf dot = vf_set1(0.0f);
                for (int64_t c = 0; c < HS; c += VF_LEN)
                    dot = vf_fma(vf_load_n(dblock + i * C + c, HS - c), vf_load_n(block + i * C + c, HS - c), dot);
                const vf average = vf_set1(vf_sum(dot)), minus_lse = vf_set1(-lse[first + i]);
                for (int64_t j = 0; j < columns; j += VF_LEN) {
                    float *pj = p + i * TILE + j, *dpj = dp + i * TILE + j;
                    vf s = vf_fma(vf_load_n(pj, columns - j), vf_set1(scale), minus_lse);
                    vf probability = j < seen ? vf_keep_n(vf_exp(s), seen - j) : vf_set1(0.0f);
                    vf d = vf_mul(probability, vf_sub(vf_load_n(dpj, columns - j), average));
                    vf_store_n(pj, probability, columns - j);
                    vf_store_n(dpj, vf_mul(d, vf_set1(scale)), columns - j);
                }
            }
            gemm_tile(dv, stride, (Operand){p, 1, TILE}, (Operand){dblock, 1, C}, 1, columns, HS, rows, packing);
            gemm_tile(dq, stride, (Operand){dp, TILE, 1}, (Operand){k, 1, stride}, 1, rows, HS, columns, packing);
            gemm_tile(dk, stride, (Operand){dp, 1, TILE}, (Operand){q, 1, stride}, 1, columns, HS, rows, packing);
        }
    }
}

void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                        float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, int threads) {
    const int64_t HS = C / NH, share = attention_scratch_size(HS, 1);
#pragma omp parallel for num_threads(team(threads, B * T * C)) schedule(dynamic)
    for (int64_t task = 0; task < B * NH; task++) {
        const int64_t b = task / NH, h = task % NH;
        attend_backward(dqkv + b * T * 3 * C + h * HS, dout + b * T * C + h * HS, qkv + b * T * 3 * C + h * HS,
                        out + b * T * C + h * HS, lse + (b * NH + h) * T, T, C, HS,
                        scratch + omp_get_thread_num() * share);
    }
}
