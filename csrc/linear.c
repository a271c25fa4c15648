/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC) for few rows: weights of 32, 16 or 8 bits, read where they lie.
 *
 * With few rows the weights are read once and little is done with each: the speed is that of memory, and smaller
 * weights are faster. So every weight is used where it lies, row by row, for all rows of x at once: a tile is some rows
 * of weight times one or four rows of x, each pair a sum in a vector of its own, and the sums of a tile are added up
 * together. A pair's sum has the same order whatever the tile: a row of x gets the same bits alone and among others.
 *
 * INT8: weight = scale (weight8 - 128), a scale for each of its rows. A row of x is rounded to 8 bits as well, with a
 * scale of its own (dynamic quantization, as in Dettmers et al. 2022, arXiv:2208.07339, without outliers kept apart),
 * so that products and sums are of integers, exact, and the same on every instruction set: sum(weight8 - 128) x8 =
 * sum(weight8 x8) - 128 sum(x8).
 *
 * With many rows the arithmetic decides. FP32 and FP16 then go through gemm.c (matmul.c); INT8 has more products in an
 * instruction and stays here, with columns in the lanes where the instruction set has sums of four products. */

#include "internal.h"

/* A tile is QUAD rows of x times OUTS of weight, VF_LEN pairs, where there are as many rows of x; else one row of x
 * times VF_LEN of weight, PART at a time: what is read at the same time stays in the registers, and in the order of
 * memory. */
enum { QUAD = VF_LEN >= 4 ? 4 : 1, OUTS = VF_LEN / QUAD, PART = VF_LEN > 1 ? 2 : 1, MOST = OUTS > PART ? OUTS : PART };

/* ---- x in 8 bits -------------------------------------------------------------------------------------------- */

int64_t quantized_size(int64_t N, int64_t C) { return N * (ceil_div(C, 4) + 2); }

Quantized quantized_in(float *memory, int64_t N, int64_t C) {
    return (Quantized){memory, (int32_t *)(memory + N), (int8_t *)(memory + 2 * N), C};
}

void quantize_row(Quantized q, const float *x, int64_t i, int64_t C) {
    vf highest = vf_set1(0.0f), poison = vf_set1(0.0f);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        const vf xc = vf_load_n(x + c, C - c);
        highest = vf_max(highest, vf_max(xc, vf_sub(vf_set1(0.0f), xc)));
        poison = vf_fma(xc, vf_set1(0.0f), poison); /* NaN if x holds NaN or infinity, else 0 */
    }
    const float largest = vf_hmax(highest), inverse = largest > 1e-36f ? 127.0f / largest : 0.0f; /* finite */
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    int8_t *to = q.values + i * q.stride;
    int32_t sum = 0;
    for (int64_t c = 0; c < C; c++) {
        const float shifted = x[c] * inverse + shift;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        to[c] = (int8_t)bits;
        sum += to[c];
    }
    q.sums[i] = sum;
    q.scales[i] = largest / 127.0f + vf_sum(poison);
}

/* ---- a tile ------------------------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) vf load_float(const void *weight, int64_t i, int64_t n, const int type) {
    return type == FP16 ? vf_load_half_n((const uint16_t *)weight + i, n) : vf_load_n((const float *)weight + i, n);
}

/* The weights of the next tiles lie behind those of this one. Some of them are called into the cache at each step,
 * evenly, so that memory never rests: `count` times what a step reads of a row. `next` is whose turn it is. */
static inline __attribute__((always_inline)) void call(const char **next, const int count, const int type) {
    const int bytes = type == INT8 ? VB_LEN : VF_LEN * (type == FP16 ? 2 : 4);
    for (int i = 0; i < count; i++) __builtin_prefetch(*next + i * bytes, 0, 3);
    *next += count * bytes;
}

static inline int64_t weight_size(int type) { return type == INT8 ? 1 : type == FP16 ? 2 : 4; }

/* acc[r * outs + o] += weight row o . row r of x, n channels from c on, at most a vector's; w and x point at the rows.
 */
static inline __attribute__((always_inline)) void float_products(vf *acc, const void *const *w, const float *x,
                                                                 int64_t ldx, int64_t c, int64_t n, const int outs,
                                                                 const int rows, const int type) {
    vf wc[MOST];
    for (int o = 0; o < outs; o++) wc[o] = load_float(w[o], c, n, type);
    for (int r = 0; r < rows; r++) {
        const vf xc = vf_load_n(x + r * ldx + c, n);
        for (int o = 0; o < outs; o++) acc[r * outs + o] = vf_fma(wc[o], xc, acc[r * outs + o]);
    }
}

static inline __attribute__((always_inline)) void int8_products(vi *acc, const void *const *w, const int8_t *x,
                                                                int64_t ldx, int64_t c, int64_t n, const int outs,
                                                                const int rows) {
    vb wc[MOST];
    for (int o = 0; o < outs; o++) wc[o] = vb_load_unsigned_n((const uint8_t *)w[o] + c, n);
    for (int r = 0; r < rows; r++) {
        const vb xc = vb_load_signed_n(x + r * ldx + c, n);
        for (int o = 0; o < outs; o++) acc[r * outs + o] = vi_dot(acc[r * outs + o], wc[o], xc);
    }
}

/* out (rows x outs of the tile at row i, column j) = sums, scaled and with bias, or added to what out holds. */
static inline __attribute__((always_inline)) void finish(float *out, vf sums, const Linear *layer, const Quantized *q,
                                                         int64_t i, int64_t j, const int64_t n, int accumulate,
                                                         const int rows, const int type) {
    const int outs = VF_LEN / rows;
    float lanes[VF_LEN] = {0.0f};
    if (type == INT8) {
        for (int r = 0; r < rows; r++)
            for (int64_t o = 0; o < n; o++) lanes[r * outs + o] = q->scales[i + r] * layer->scale[j + o];
        sums = vf_mul(sums, vf_load(lanes));
    }
    if (layer->bias) {
        for (int r = 0; r < rows; r++)
            for (int64_t o = 0; o < n; o++) lanes[r * outs + o] = layer->bias[j + o];
        sums = vf_add(sums, vf_load(lanes));
    }
    vf_store(lanes, sums);
    for (int r = 0; r < rows; r++) {
        float *to = out + (i + r) * layer->OC + j;
        if (accumulate)
            for (int64_t o = 0; o < n; o++) to[o] += lanes[r * outs + o];
        else
            memcpy(to, lanes + r * outs, (size_t)n * sizeof(float));
    }
}

/* `outs` rows of weight from row j on; beyond the last, that row once more. */
static inline __attribute__((always_inline)) void find_rows(const void *w[MOST], const Linear *layer, int64_t j,
                                                            const int outs, const int type) {
    const int64_t row = layer->C * weight_size(type);
    for (int o = 0; o < outs; o++) w[o] = (const char *)layer->weight + min64(j + o, layer->OC - 1) * row;
}

/* acc = the sums of outs * rows pairs, each in a vector of its own. */
static inline __attribute__((always_inline)) void sum_floats(vf *acc, const Linear *layer, const float *x, int64_t j,
                                                             const char **next, const int count, const int outs,
                                                             const int rows, const int type) {
    const int64_t C = layer->C;
    const void *w[MOST];
    int64_t c = 0;
    find_rows(w, layer, j, outs, type);
    for (int k = 0; k < outs * rows; k++) acc[k] = vf_set1(0.0f);
    for (; c + VF_LEN <= C; c += VF_LEN) {
        call(next, count, type);
        float_products(acc, w, x, C, c, VF_LEN, outs, rows, type);
    }
    if (c < C) float_products(acc, w, x, C, c, C - c, outs, rows, type);
}

static inline __attribute__((always_inline)) void sum_int8(vi *acc, const Linear *layer, const Quantized *q, int64_t i,
                                                           int64_t j, const char **next, const int count,
                                                           const int outs, const int rows) {
    const int64_t C = layer->C;
    const int8_t *x = q->values + i * q->stride;
    const void *w[MOST];
    int64_t c = 0;
    find_rows(w, layer, j, outs, INT8);
    for (int r = 0; r < rows; r++) /* the weights are 128 too large */
        for (int o = 0; o < outs; o++) acc[r * outs + o] = vi_first(-128 * q->sums[i + r]);
    for (; c + VB_LEN <= C; c += VB_LEN) {
        call(next, count, INT8);
        int8_products(acc, w, x, q->stride, c, VB_LEN, outs, rows);
    }
    if (c < C) int8_products(acc, w, x, q->stride, c, C - c, outs, rows);
}

/* A tile: VF_LEN pairs, rows i.. of x times columns j.. of out. */
static inline __attribute__((always_inline)) void quad_tile(float *out, const Linear *layer, const float *x,
                                                            const Quantized *q, int64_t i, int64_t j, int accumulate,
                                                            const char **next, const int count, const int type) {
    vf sums;
    if (type == INT8) {
        vi acc[VF_LEN];
        sum_int8(acc, layer, q, i, j, next, count, OUTS, QUAD);
        sums = vi_to_vf(vi_sums(acc));
    } else {
        vf acc[VF_LEN];
        sum_floats(acc, layer, x + i * layer->C, j, next, count, OUTS, QUAD, type);
        sums = vf_sums(acc);
    }
    if (layer->OC - j >= OUTS)
        finish(out, sums, layer, q, i, j, OUTS, accumulate, QUAD, type);
    else
        finish(out, sums, layer, q, i, j, layer->OC - j, accumulate, QUAD, type);
}

static inline __attribute__((always_inline)) void single_tile(float *out, const Linear *layer, const float *x,
                                                              const Quantized *q, int64_t i, int64_t j, int accumulate,
                                                              const char **next, const int type) {
    vf sums;
    if (type == INT8) {
        vi acc[VF_LEN];
        for (int o = 0; o < VF_LEN; o += PART) sum_int8(acc + o, layer, q, i, j + o, next, PART, PART, 1);
        sums = vi_to_vf(vi_sums(acc));
    } else {
        vf acc[VF_LEN];
        for (int o = 0; o < VF_LEN; o += PART)
            sum_floats(acc + o, layer, x + i * layer->C, j + o, next, PART, PART, 1, type);
        sums = vf_sums(acc);
    }
    if (layer->OC - j >= VF_LEN)
        finish(out, sums, layer, q, i, j, VF_LEN, accumulate, 1, type);
    else
        finish(out, sums, layer, q, i, j, layer->OC - j, accumulate, 1, type);
}

static inline __attribute__((always_inline)) void columns(float *out, const Linear *layer, const float *x,
                                                          const Quantized *q, int64_t N, int64_t from, int64_t to,
                                                          int accumulate, const int type) {
    const int64_t quads = QUAD > 1 ? N / QUAD : 0;
    for (int64_t j = from; j < to; j += VF_LEN) {
        const char *next = (const char *)layer->weight + (j + VF_LEN) * layer->C * weight_size(type);
        for (int64_t k = j; k < min64(j + VF_LEN, to) && quads > 0; k += OUTS) {
            if (quads == 1)
                quad_tile(out, layer, x, q, 0, k, accumulate, &next, OUTS, type);
            else
                for (int64_t i = 0; i < quads; i++)
                    quad_tile(out, layer, x, q, i * QUAD, k, accumulate, &next, (OUTS + 1) / 2, type);
        }
        for (int64_t i = quads * QUAD; i < N; i++) single_tile(out, layer, x, q, i, j, accumulate, &next, type);
    }
}

void linear_columns(float *out, const Linear *layer, const float *x, const Quantized *q, int64_t N, int64_t from,
                    int64_t to, int accumulate) {
    if (layer->type == INT8)
        columns(out, layer, x, q, N, from, to, accumulate, INT8);
    else if (layer->type == FP16)
        columns(out, layer, x, NULL, N, from, to, accumulate, FP16);
    else
        columns(out, layer, x, NULL, N, from, to, accumulate, FP32);
}

/* ---- many rows, in 8 bits ------------------------------------------------------------------------------------ */

#ifdef VB_FOURS
/* With many rows of x the products are the work, and sums across lanes cost as much again. So columns lie in the lanes:
 * weights are packed, four channels of each column side by side, and met by the same four of a row of x. */
enum { TALL = 8, WIDE = 2, STRIP = WIDE * VF_LEN, FOUR = 4 };

static int64_t packed_size(int64_t C) { return C / FOUR * STRIP; }

/* Columns [j, j + n), n <= STRIP, of out (N,OC); C is a multiple of FOUR. */
static void strip(float *out, const Linear *layer, Quantized q, int64_t N, int64_t j, int64_t n, float *packed) {
    const int64_t C = layer->C, OC = layer->OC;
    for (int64_t v = 0; v < n; v += VF_LEN) /* four bytes move as a float would */
        transpose(packed + v, STRIP, (const float *)((const uint8_t *)layer->weight + (j + v) * C), C / FOUR,
                  min64(VF_LEN, n - v), C / FOUR, VF_LEN);
    for (int64_t i = 0; i < N; i += TALL) {
        vi acc[TALL][WIDE];
        const int8_t *x[TALL];
        for (int r = 0; r < TALL; r++) { /* beyond the last row, it once more */
            x[r] = q.values + min64(i + r, N - 1) * q.stride;
            for (int v = 0; v < WIDE; v++) acc[r][v] = vi_set1(-128 * q.sums[min64(i + r, N - 1)]);
        }
        const uint8_t *w = (const uint8_t *)packed;
        for (int64_t c = 0; c < C; c += FOUR, w += WIDE * VB_LEN) {
            vb wc[WIDE];
            for (int v = 0; v < WIDE; v++) wc[v] = vb_load_unsigned(w + v * VB_LEN);
            for (int r = 0; r < TALL; r++) {
                const vb xc = vb_four(x[r] + c);
                for (int v = 0; v < WIDE; v++) acc[r][v] = vi_dot(acc[r][v], wc[v], xc);
            }
        }
        for (int r = 0; r < TALL; r++)
            for (int v = 0; v < WIDE; v++) {
                const int64_t left = n - v * VF_LEN, column = j + v * VF_LEN;
                if (i + r >= N || left <= 0) continue;
                vf y = vi_to_vf(acc[r][v]);
                y = vf_mul(y, vf_mul(vf_set1(q.scales[i + r]), vf_load_n(layer->scale + column, left)));
                if (layer->bias) y = vf_add(y, vf_load_n(layer->bias + column, left));
                vf_store_n(out + (i + r) * OC + column, y, left);
            }
    }
}
#else
enum { STRIP = VF_LEN, FOUR = 1 };
static int64_t packed_size(int64_t C) { return 0 * C; }
static void strip(float *out, const Linear *layer, Quantized q, int64_t N, int64_t j, int64_t n, float *packed) {
    (void)packed;
    linear_columns(out, layer, NULL, &q, N, j, j + n, 0);
}
#endif

/* ---- the layer ---------------------------------------------------------------------------------------------- */

enum {
    ROWS = 128, /* rows of x that a task multiplies: they stay in the second-level cache */
    COLUMNS = 64
};

int64_t linear_scratch_size(int64_t N, int64_t C, int type, int threads) {
    return type == INT8 ? quantized_size(N, C) + threads * packed_size(C) : 0;
}

void linear_rows(float *out, const Linear *layer, const float *x, float *scratch, int64_t N, Team *team) {
    const int64_t C = layer->C, OC = layer->OC;
    const int int8 = layer->type == INT8, strips = int8 && N > FEW && C % FOUR == 0;
    const Quantized q = quantized_in(scratch, N, C);
    const int64_t rows = strips ? N : ROWS, columns_each = strips ? STRIP : COLUMNS,
                  across = ceil_div(OC, columns_each);
    float *packed = scratch + quantized_size(N, C) + team->member * packed_size(C);
    if (int8)
        for_shared (i, N, worth(C), team) quantize_row(q, x + i * C, i, C);
    for_shared (task, across * ceil_div(N, rows), worth(columns_each * min64(rows, N) * C / 16), team) {
        const int64_t j = task % across * columns_each, i = task / across * rows, n = min64(columns_each, OC - j);
        const Quantized part = {q.scales + i, q.sums + i, q.values + i * q.stride, q.stride};
        if (strips)
            strip(out, layer, q, N, j, n, packed);
        else
            linear_columns(out + i * OC, layer, x + i * C, int8 ? &part : NULL, min64(rows, N - i), j, j + n, 0);
    }
}
