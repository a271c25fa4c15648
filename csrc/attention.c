/* Causal multi-head attention, block by block: out = softmax(mask(q k^T / sqrt(HS))) v for each head.
 *
 * Method: FlashAttention (Dao et al. 2022, arXiv:2205.14135; online softmax, Milakov and Gimelshein 2018,
 * arXiv:1805.02867). Scores exist only for one block of TILE keys x TILE queries at a time, in the first-level cache.
 * Forward keeps, beside the output, one number a query: lse, the log of the softmax's denominator. Backward recomputes
 * each block of probabilities as exp(score - lse). What lies above the diagonal is skipped, so half of T x T is
 * computed.
 *
 * Queries lie across the lanes of a vector: scores are stored as k q^T, so that a softmax, which runs over keys, goes
 * down the rows and never across lanes. The left side of a product is then read as it lies in memory, a number for all
 * lanes at a time, the right side row by row: only q and, backward, dout are ever copied, and no key or value is.
 *
 * Threads share heads (forward, blocks of queries too). The order of every sum is fixed by T alone. */

#include "internal.h"
#include "vmath.h"

enum { TILE = 64 };

/* A microkernel's tile is ROWS x WIDTH; with two vectors of the right side it must fit the registers, 32 or 16. */
#if VF_LEN == 16
enum { ROWS = 8 };
#elif VF_LEN == 1
enum { ROWS = 2 };
#else
enum { ROWS = 4 };
#endif
enum { WIDTH = 2 * VF_LEN };
/* What a ROWS of keys reads of a WIDTH of queries was written for all of it, or for none. */
_Static_assert(WIDTH % ROWS == 0 && TILE % WIDTH == 0, "tiles of attention must nest");

/* A head's channels in scratch: padded with zeros to whole vectors. */
static int64_t padded(int64_t HS) { return round_up(HS, VF_LEN); }

/* Of one thread; the backward pass needs the most, dk and dv of a whole head among it. */
static int64_t share(int64_t T, int64_t HS) {
    return 2 * TILE * TILE + 3 * TILE * HS + 2 * (TILE + round_up(T, TILE)) * padded(HS);
}

int64_t attention_scratch_size(int64_t T, int64_t HS, int threads) { return threads * share(T, HS); }

/* ---- products of blocks ------------------------------------------------------------------------------------- */

/* The left side of a product: element (i, k), where k is summed over, is at data[i * row + k * step]. */
typedef struct {
    const float *data;
    int64_t row, step;
} Left;

/* c (rows x vectors * VF_LEN) (+)= left b over `depth`; rows of c are ldc apart, rows of b ldb. */
static inline __attribute__((always_inline)) void microkernel(float *restrict c, int64_t ldc, Left left,
                                                              const float *restrict b, int64_t ldb, int64_t depth,
                                                              int accumulate, const int rows, const int vectors) {
    vf acc[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) acc[i][j] = accumulate ? vf_load(c + i * ldc + j * VF_LEN) : vf_set1(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        vf bk[2];
        for (int j = 0; j < vectors; j++) bk[j] = vf_load(b + k * ldb + j * VF_LEN);
        for (int i = 0; i < rows; i++) {
            vf ai = vf_set1(left.data[i * left.row + k * left.step]);
            for (int j = 0; j < vectors; j++) acc[i][j] = vf_fma(ai, bk[j], acc[i][j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) vf_store(c + i * ldc + j * VF_LEN, acc[i][j]);
}

/* c (m x n) (+)= left b; n is a multiple of VF_LEN. */
static inline __attribute__((always_inline)) void product(float *c, int64_t ldc, Left left, const float *b, int64_t ldb,
                                                          int64_t m, int64_t n, int64_t depth, int accumulate) {
    for (int64_t i = 0; i < m;) {
        const int whole = m - i >= ROWS;
        const Left rows = {left.data + i * left.row, left.row, left.step};
        for (int64_t j = 0; j < n;) {
            const int wide = n - j >= WIDTH;
            float *to = c + i * ldc + j;
            if (whole && wide)
                microkernel(to, ldc, rows, b + j, ldb, depth, accumulate, ROWS, 2);
            else if (whole)
                microkernel(to, ldc, rows, b + j, ldb, depth, accumulate, ROWS, 1);
            else
                microkernel(to, ldc, rows, b + j, ldb, depth, accumulate, 1, 1);
            j += whole && wide ? WIDTH : VF_LEN;
        }
        i += whole ? ROWS : 1;
    }
}

/* Where a block lies: its first query stands `ahead` positions after its first key. */
typedef struct {
    int64_t ahead, keys;
} Block;

/* The block's keys that a query of the WIDTH around lane j may see. */
static int64_t visible(Block block, int64_t j) { return min64(block.keys, block.ahead + j / WIDTH * WIDTH + WIDTH); }

/* The first query of the block that may see the key. */
static int64_t first_to_see(Block block, int64_t key) { return key > block.ahead ? key - block.ahead : 0; }

/* x, or `other` in the lanes of queries (the first is query j) that may not see the key. */
static inline vf mask(Block block, int64_t key, int64_t j, vf x, vf other) {
    const int64_t blind = first_to_see(block, key) - j;
    return blind <= 0 ? x : vf_first_n(other, x, min64(blind, VF_LEN));
}

/* scores (keys x TILE) = left right; pairs that no query of a WIDTH may see are left out here and below. */
static void score(float *scores, Block block, Left left, const float *right, int64_t HS) {
    for (int64_t j = 0; j < TILE; j += WIDTH)
        product(scores + j, TILE, left, right + j, TILE, visible(block, j), WIDTH, HS, 0);
}

/* sums (HS x TILE) (+)= left weights, the weights (keys x TILE) as score leaves them. */
static void sum_over_keys(float *sums, Block block, Left left, const float *weights, int64_t HS, int accumulate) {
    for (int64_t j = 0; j < TILE; j += WIDTH)
        product(sums + j, TILE, left, weights + j, TILE, HS, WIDTH, visible(block, j), accumulate);
}

/* sums (keys x padded HS) (+)= weights right. */
static void sum_over_queries(float *sums, Block block, const float *weights, const float *right, int64_t HS,
                             int accumulate) {
    const int64_t HSP = padded(HS);
    for (int64_t i = 0; i < block.keys; i += ROWS) {
        const int64_t j = first_to_see(block, i) / WIDTH * WIDTH;
        product(sums + i * HSP, HSP, (Left){weights + i * TILE + j, TILE, 1}, right + j * HSP, HSP,
                min64(ROWS, block.keys - i), HSP, TILE - j, accumulate);
    }
}

/* ---- forward ------------------------------------------------------------------------------------------------ */

/* One block of queries q (rows x HS, row stride 3C), the first at position `first`: out (row stride C) and, unless
 * NULL, lse (rows), against all keys that they may see, of which the row stride is `stride`. */
static void attend(float *out, float *lse, const float *q, const float *keys, const float *values, int64_t stride,
                   int64_t first, int64_t rows, int64_t C, int64_t HS, float *scratch) {
    float *p = scratch, *q_t = p + TILE * TILE, *out_t = q_t + TILE * HS;
    float maximum[TILE], denominator[TILE];
    const vf scale = vf_set1(1.0f / sqrtf((float)HS));
    for (int64_t j = 0; j < TILE; j++) maximum[j] = -INFINITY;
    transpose(q_t, TILE, q, 3 * C, rows, HS, TILE);
    for (int64_t key = 0; key < first + rows; key += TILE) {
        const Block block = {first - key, min64(TILE, first + rows - key)};
        const float *k = keys + key * stride, *v = values + key * stride;
        score(p, block, (Left){k, stride, 1}, q_t, HS);
        for (int64_t j = 0; j < TILE; j += VF_LEN) {
            const vf before = vf_load(maximum + j);
            vf highest = before, sum = vf_set1(0.0f);
            for (int64_t i = 0; i < visible(block, j); i++)
                highest = vf_max(highest, mask(block, i, j, vf_mul(vf_load(p + i * TILE + j), scale), before));
            for (int64_t i = 0; i < visible(block, j); i++) {
                vf e = vf_exp(vf_fma(vf_load(p + i * TILE + j), scale, vf_sub(vf_set1(0.0f), highest)));
                e = mask(block, i, j, e, vf_set1(0.0f));
                sum = vf_add(sum, e);
                vf_store(p + i * TILE + j, e);
            }
            vf_store(maximum + j, highest);
            if (key > 0) { /* what was summed under the old maximum shrinks to the new one */
                const vf shrink = vf_exp(vf_sub(before, highest));
                sum = vf_fma(vf_load(denominator + j), shrink, sum);
                for (int64_t c = 0; c < HS; c++)
                    vf_store(out_t + c * TILE + j, vf_mul(vf_load(out_t + c * TILE + j), shrink));
            }
            vf_store(denominator + j, sum);
        }
        sum_over_keys(out_t, block, (Left){v, 1, stride}, p, HS, key > 0);
    }
    for (int64_t j = 0; j < TILE; j += VF_LEN) {
        const vf inverse = vf_div(vf_set1(1.0f), vf_load(denominator + j));
        for (int64_t c = 0; c < HS; c++) vf_store(out_t + c * TILE + j, vf_mul(vf_load(out_t + c * TILE + j), inverse));
    }
    transpose(out, C, out_t, TILE, HS, rows, HS);
    if (lse)
        for (int64_t i = 0; i < rows; i++) lse[i] = maximum[i] + logf(denominator[i]);
}

void attention_forward(float *out, float *lse, float *keys, float *values, const float *qkv, int64_t position,
                       float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, int64_t P, Team *team) {
    const int64_t HS = C / NH, blocks = ceil_div(T, TILE);
    if (keys) {
        const size_t row = (size_t)HS * sizeof(float);
        for_shared (head, B * NH, worth(T * HS), team)
            for (int64_t t = 0; t < T; t++) {
                const float *from = qkv + (head / NH * T + t) * 3 * C + head % NH * HS;
                memcpy(keys + (head * P + position + t) * HS, from + C, row);
                memcpy(values + (head * P + position + t) * HS, from + 2 * C, row);
            }
    }
    for_shared (task, B * NH * blocks, worth(min64(T, TILE) * HS), team) {
        /* a head's longest row of blocks first, so that a short one comes last */
        const int64_t first = (blocks - 1 - task % blocks) * TILE, head = task / blocks, b = head / NH, h = head % NH;
        const float *q = qkv + b * T * 3 * C + h * HS;
        attend(out + (b * T + first) * C + h * HS, lse ? lse + head * T + first : NULL, q + first * 3 * C,
               keys ? keys + head * P * HS : q + C, keys ? values + head * P * HS : q + 2 * C, keys ? HS : 3 * C,
               (keys ? position : 0) + first, min64(TILE, T - first), C, HS, scratch + team->member * share(T, HS));
    }
}

/* ---- backward ----------------------------------------------------------------------------------------------- */

/* to (TILE x padded HS) = rows x HS numbers of a head, row stride `stride`, and zeros around them. */
static void copy_rows(float *to, const float *from, int64_t stride, int64_t rows, int64_t HS) {
    const int64_t HSP = padded(HS);
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t c = 0; c < HSP; c += VF_LEN)
            vf_store(to + i * HSP + c, i < rows ? vf_load_n(from + i * stride + c, HS - c) : vf_set1(0.0f));
}

/* One head: dqkv (T rows, stride 3C) from dout, out (T rows, stride C) and lse (T). dqkv may be qkv: q of a block is
 * last read before its dq is written, and dk and dv are gathered in scratch until the head is done. */
static void attend_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                            int64_t T, int64_t C, int64_t HS, float *scratch) {
    const int64_t stride = 3 * C, HSP = padded(HS);
    float *p = scratch, *dp = p + TILE * TILE, *q_t = dp + TILE * TILE, *dout_t = q_t + TILE * HS;
    float *dq_t = dout_t + TILE * HS, *q = dq_t + TILE * HS, *dblock = q + TILE * HSP, *dk = dblock + TILE * HSP;
    float *dv = dk + round_up(T, TILE) * HSP;
    const vf scale = vf_set1(1.0f / sqrtf((float)HS));
    for (int64_t first = 0; first < T; first += TILE) {
        const int64_t rows = min64(TILE, T - first);
        copy_rows(q, qkv + first * stride, stride, rows, HS);
        copy_rows(dblock, dout + first * C, C, rows, HS);
        transpose(q_t, TILE, q, HSP, TILE, HS, TILE);
        transpose(dout_t, TILE, dblock, HSP, TILE, HS, TILE);
        /* Queries past T have q, dout, minus_lse and average 0: whatever they add is 0. */
        float minus_lse[TILE] = {0.0f}, average[TILE] = {0.0f};
        for (int64_t i = 0; i < rows; i++) {
            /* For softmax, dscores = p * (dp - sum(p * dp)), and that sum is dout . out, whatever the keys. */
            vf dot = vf_set1(0.0f);
            for (int64_t c = 0; c < HS; c += VF_LEN)
                dot = vf_fma(vf_load(dblock + i * HSP + c), vf_load_n(out + (first + i) * C + c, HS - c), dot);
            average[i] = vf_sum(dot);
            minus_lse[i] = -lse[first + i];
        }
        for (int64_t key = 0; key < first + rows; key += TILE) {
            const Block block = {first - key, min64(TILE, T - key)};
            const float *k = qkv + key * stride + C, *v = k + C;
            score(p, block, (Left){k, stride, 1}, q_t, HS);
            score(dp, block, (Left){v, stride, 1}, dout_t, HS);
            for (int64_t j = 0; j < TILE; j += VF_LEN)
                for (int64_t i = 0; i < visible(block, j); i++) {
                    float *pi = p + i * TILE + j, *dpi = dp + i * TILE + j;
                    vf probability = vf_exp(vf_fma(vf_load(pi), scale, vf_load(minus_lse + j)));
                    probability = mask(block, i, j, probability, vf_set1(0.0f));
                    vf dscore = vf_mul(probability, vf_sub(vf_load(dpi), vf_load(average + j)));
                    vf_store(pi, probability);
                    vf_store(dpi, vf_mul(dscore, scale));
                }
            sum_over_queries(dv + key * HSP, block, p, dblock, HS, first > key);
            sum_over_queries(dk + key * HSP, block, dp, q, HS, first > key);
            sum_over_keys(dq_t, block, (Left){k, 1, stride}, dp, HS, key > 0);
        }
        transpose(dqkv + first * stride, stride, dq_t, TILE, HS, rows, HS);
    }
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < HS; c += VF_LEN) {
            vf_store_n(dqkv + t * stride + C + c, vf_load(dk + t * HSP + c), HS - c);
            vf_store_n(dqkv + t * stride + 2 * C + c, vf_load(dv + t * HSP + c), HS - c);
        }
}

void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                        float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, Team *team) {
    const int64_t HS = C / NH;
    for_shared (task, B * NH, worth(T * HS), team) {
        const int64_t b = task / NH, h = task % NH;
        attend_backward(dqkv + b * T * 3 * C + h * HS, dout + b * T * C + h * HS, qkv + b * T * 3 * C + h * HS,
                        out + b * T * C + h * HS, lse + (b * NH + h) * T, T, C, HS,
                        scratch + team->member * share(T, HS));
    }
}
