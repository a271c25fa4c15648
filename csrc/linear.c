/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC), for reading a model: weights of 32, 16 or 8 bits, few rows.
 *
 * With few rows the weights are read once and little is done with each: the speed is that of memory, and smaller weights
 * are faster. So every weight is used where it lies, row by row, for all rows of x at once: a tile is some rows of weight
 * times one or two rows of x, each pair a sum in a vector of its own, and the sums of a tile are added up together. A
 * pair's sum has the same order whatever the tile: a row of x gets the same bits alone and among others.
 *
 * INT8: weight = scale (weight8 - 128), a scale for each of its rows. A row of x is rounded to 8 bits as well, with a
 * scale of its own (dynamic quantization, as in Dettmers et al. 2022, arXiv:2208.07339, without outliers kept apart), so
 * that products and sums are of integers, exact, and the same on every instruction set:
 * sum(weight8 - 128) x8 = sum(weight8 x8) - 128 sum(x8).
 *
 * With many rows the arithmetic decides. FP32 and FP16 then go through gemm.c; INT8 has four times the products in an
 * instruction and stays here. */

#include "internal.h"

enum { PAIR = VF_LEN > 1 ? 2 : 1 }; /* rows of x in a tile where there are as many */

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
    const float largest = vf_hmax(highest), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
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

/* sums[r * outs + o] of VF_LEN pairs: row r < rows of x times row j + o of weight, o < outs = VF_LEN / rows. Rows of
 * weight from OC on count as its last. */
static inline __attribute__((always_inline)) vf float_tile(const void *weight, int64_t j, int64_t OC, const float *x,
                                                           int64_t ldx, int64_t C, const int rows, const int type) {
    const int outs = VF_LEN / rows;
    int64_t start[VF_LEN];
    vf acc[VF_LEN];
    for (int o = 0; o < outs; o++) start[o] = min64(j + o, OC - 1) * C;
    for (int i = 0; i < VF_LEN; i++) acc[i] = vf_set1(0.0f);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        const int64_t n = C - c;
        vf xc[PAIR];
        for (int r = 0; r < rows; r++) xc[r] = vf_load_n(x + r * ldx + c, n);
        for (int o = 0; o < outs; o++) {
            const vf w = load_float(weight, start[o] + c, n, type);
            for (int r = 0; r < rows; r++) acc[r * outs + o] = vf_fma(w, xc[r], acc[r * outs + o]);
        }
    }
    return vf_sums(acc);
}

static inline __attribute__((always_inline)) vi int8_tile(const uint8_t *weight, int64_t j, int64_t OC, const int8_t *x,
                                                          int64_t ldx, int64_t C, const int rows) {
    const int outs = VF_LEN / rows;
    const uint8_t *w[VF_LEN];
    vi acc[VF_LEN];
    for (int o = 0; o < outs; o++) w[o] = weight + min64(j + o, OC - 1) * C;
    for (int i = 0; i < VF_LEN; i++) acc[i] = vi_zero();
    for (int64_t c = 0; c < C; c += VB_LEN) {
        const int64_t n = C - c;
        vb xc[PAIR];
        for (int r = 0; r < rows; r++) xc[r] = vb_load_signed_n(x + r * ldx + c, n);
        for (int o = 0; o < outs; o++) {
            const vb wc = vb_load_unsigned_n(w[o] + c, n);
            for (int r = 0; r < rows; r++) acc[r * outs + o] = vi_dot(acc[r * outs + o], wc, xc[r]);
        }
    }
    return vi_sums(acc);
}

/* out (rows x outs of the tile at row i, column j) = sums, scaled and with bias, or added to what out holds. */
static inline __attribute__((always_inline)) void finish(float *out, int64_t ldo, vf sums, const Linear *layer,
                                                         const Quantized *q, int64_t i, int64_t j, int accumulate,
                                                         const int rows) {
    const int outs = VF_LEN / rows;
    float lanes[VF_LEN];
    vf_store(lanes, sums);
    const int64_t n = min64(outs, layer->OC - j);
    for (int r = 0; r < rows; r++)
        for (int64_t o = 0; o < n; o++) {
            float y = lanes[r * outs + o], *to = out + (i + r) * ldo + j + o;
            if (q) y *= q->scales[i + r] * layer->scale[j + o];
            if (layer->bias) y += layer->bias[j + o];
            *to = accumulate ? *to + y : y;
        }
}

static inline __attribute__((always_inline)) void tile(float *out, const Linear *layer, const float *x,
                                                       const Quantized *q, int64_t i, int64_t j, int accumulate,
                                                       const int rows, const int type) {
    const int64_t OC = layer->OC, C = layer->C;
    vf sums;
    if (type == INT8) {
        vi pairs = int8_tile(layer->weight, j, OC, q->values + i * q->stride, q->stride, C, rows);
        int32_t missed[VF_LEN]; /* the weights are 128 too large */
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < VF_LEN / rows; o++) missed[r * (VF_LEN / rows) + o] = -128 * q->sums[i + r];
        vf bits;
        memcpy(&bits, missed, sizeof bits);
        sums = vi_to_vf(vi_add(pairs, vi_of_bits(bits)));
    } else {
        sums = float_tile(layer->weight, j, OC, x + i * C, C, C, rows, type);
    }
    finish(out, OC, sums, layer, q, i, j, accumulate, rows);
}

static inline __attribute__((always_inline)) void columns(float *out, const Linear *layer, const float *x,
                                                          const Quantized *q, int64_t N, int64_t from, int64_t to,
                                                          int accumulate, const int type) {
    for (int64_t j = from; j < to; j += VF_LEN) {
        if (N > 1)
            for (int64_t part = j; part < min64(j + VF_LEN, to); part += VF_LEN / PAIR)
                for (int64_t i = 0; i + PAIR <= N; i += PAIR) tile(out, layer, x, q, i, part, accumulate, PAIR, type);
        if (N == 1 || N % PAIR) tile(out, layer, x, q, N - 1, j, accumulate, 1, type);
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

/* ---- the layer ---------------------------------------------------------------------------------------------- */

enum {
    FEW = 16,   /* rows up to which reading weights costs more than the arithmetic */
    ROWS = 128, /* rows of x in 8 bits that a task multiplies: they stay in the second-level cache */
    COLUMNS = 64
};

int64_t linear_scratch_size(int64_t N, int64_t C, int64_t OC, int type, int threads) {
    if (type == INT8) return quantized_size(N, C);
    return N <= FEW ? 0 : matmul_scratch_size(threads) + (type == FP16 ? OC * C : 0);
}

void linear_forward(float *out, const float *x, const void *weight, const float *scale, const float *bias, int type,
                    float *scratch, int64_t N, int64_t C, int64_t OC, int threads) {
    const Linear layer = {weight, scale, bias, C, OC, type};
    if (type != INT8 && N > FEW) {
        float *wide = scratch + matmul_scratch_size(threads);
        if (type == FP16) {
#pragma omp parallel for num_threads(team(threads, OC *C)) schedule(static)
            for (int64_t i = 0; i < OC * C; i += VF_LEN)
                vf_store_n(wide + i, load_float(weight, i, OC * C - i, FP16), OC * C - i);
        }
        matmul_forward(out, x, type == FP16 ? wide : weight, bias, scratch, N, C, OC, threads);
        return;
    }
    const Quantized q = quantized_in(scratch, N, C);
#pragma omp parallel num_threads(team(threads, N * C * OC / 16))
    {
        if (type == INT8) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < N; i++) quantize_row(q, x + i * C, i, C);
        }
        const int64_t across = ceil_div(OC, COLUMNS);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < across * ceil_div(N, ROWS); task++) {
            const int64_t j = task % across * COLUMNS, i = task / across * ROWS;
            const Quantized part = {q.scales + i, q.sums + i, q.values + i * q.stride, q.stride};
            linear_columns(out + i * OC, &layer, x + i * C, type == INT8 ? &part : NULL, min64(ROWS, N - i), j,
                           min64(j + COLUMNS, OC), 0);
        }
    }
}

void matrix_transpose(float *out, const float *x, int64_t R, int64_t C, int threads) {
    enum { BLOCK = 64 };
#pragma omp parallel for num_threads(team(threads, R *C)) schedule(static)
    for (int64_t c = 0; c < C; c += BLOCK)
        for (int64_t r = 0; r < R; r += BLOCK)
            transpose(out + c * R + r, R, x + r * C + c, C, min64(BLOCK, R - r), min64(BLOCK, C - c),
                      min64(BLOCK, R - r));
}
