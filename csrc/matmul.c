/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC): the linear layer, one matrix product forward, two backward.
 *
 * Forward takes 2 N C OC operations, backward twice as many. gemm.c computes both and divides them among the threads.
 * With INT8 weights, or few rows (up to FEW_ROWS), linear.c computes forward. Else smaller weights are converted to
 * FP32, some of their rows at a time, unless tiles take them as they are. An out of BF16 is computed in float, a block
 * of rows at a time. */

#include "internal.h"

enum { FP32_ROWS = 3072 }; /* rows of a smaller weight that are converted at a time */

/* Floats of memory for converted rows. */
static int64_t converted_size(int64_t C, int64_t OC, int type) { return type == FP32 ? 0 : min64(OC, FP32_ROWS) * C; }

/* weight32 (n,C) = rows [j, j + n) of a weight. */
static void convert_rows(float *weight32, const Linear *layer, int64_t j, int64_t n, Team *team) {
    for_shared (i, n, worth(layer->C), team) embed_row(weight32 + i * layer->C, layer, NULL, (int32_t)(j + i));
}

/* Whether linear.c computes forward. */
static int reads_in_place(int64_t N, int type) { return type == INT8 || N <= FEW_ROWS; }

int64_t matmul_scratch_size(int64_t N, int64_t C, int64_t OC, int precision, int out_type, int type, int threads) {
    const int64_t rows = out_type == BF16 ? min64(N, gemm_rows()) * OC : 0;
    if (reads_in_place(N, type)) return rows + linear_scratch_size(N, C, type, threads);
    return rows + products_scratch_size(precision, threads) + converted_size(C, OC, type);
}

int64_t matmul_backward_scratch_size(int64_t C, int64_t OC, int precision, int type, int threads) {
    return products_scratch_size(precision, threads) + converted_size(C, OC, type);
}

/* matmul_forward() in float. in_place: reads_in_place() of all its rows, of which these N may be a part. */
static void forward(float *out, Operand x, const void *weight, const float *bias, const float *scale, int precision,
                    int type, int in_place, float *scratch, int64_t N, int64_t C, int64_t OC, Team *team) {
    const Linear layer = {weight, scale, bias, C, OC, type};
    if (in_place) {
        linear_rows(out, &layer, x.data, x.memory, precision, scratch, N, team);
        return;
    }
    if (type == FP32) {
        gemm(out, OC, x, (Operand){weight, C, 1, FP32}, bias, 0, precision, N, OC, C, scratch, team);
        return;
    }
#ifdef HAS_TILES
    if (type == FP16 && precision == BF16) { /* packing converts them */
        gemm_in_tiles(out, FP32, OC, x, (Operand){weight, C, 1, FP16}, bias, 0, N, OC, C, scratch, team);
        return;
    }
#endif
    float *weight32 = scratch + products_scratch_size(precision, team->threads);
    for (int64_t j = 0; j < OC; j += FP32_ROWS) {
        const int64_t n = min64(FP32_ROWS, OC - j);
        convert_rows(weight32, &layer, j, n, team);
        gemm(out + j, OC, x, (Operand){weight32, C, 1, FP32}, bias ? bias + j : NULL, 0, precision, N, n, C, scratch,
             team);
    }
}

void matmul_forward(void *out, const void *x, const void *weight, const float *bias, const float *scale, int precision,
                    int out_type, int x_type, int type, float *scratch, int64_t N, int64_t C, int64_t OC, Team *team) {
    const int in_place = reads_in_place(N, type);
    if (out_type == FP32) {
        forward(out, (Operand){x, C, 1, x_type}, weight, bias, scale, precision, type, in_place, scratch, N, C, OC,
                team);
        return;
    }
#ifdef HAS_TILES
    if (precision == BF16 && !in_place && C <= tiles_depth()) {
        gemm_in_tiles(out, BF16, OC, (Operand){x, C, 1, x_type}, (Operand){weight, C, 1, type}, bias, 0, N, OC, C,
                      scratch, team);
        return;
    }
#endif
    const int64_t block = min64(N, gemm_rows());
    for (int64_t i = 0; i < N; i += block) { /* the rows of a block are in the cache when they are rounded */
        const int64_t n = min64(block, N - i), size = n * OC;
        uint16_t *to = (uint16_t *)out + i * OC;
        forward(scratch, (Operand){element(x, i * C, x_type), C, 1, x_type}, weight, bias, scale, precision, type,
                in_place, scratch + block * OC, n, C, OC, team);
        for_shared (vector, ceil_div(size, VF_LEN), worth(VF_LEN), team) {
            const int64_t k = vector * VF_LEN;
            vf_store_bf16_n(to + k, vf_load_n(scratch + k, size - k), size - k);
        }
    }
}

enum { STRIP_VECTORS = 4 }; /* vectors of a row that a task sums at a time: neighbouring cache lines */

/* dbias (OC) (+)= column sums of dout (N,OC). A task has whole columns, so the order of a sum is fixed. */
static void column_sums(float *restrict dbias, const float *restrict dout, int accumulate, int64_t N, int64_t OC,
                        Team *team) {
    for_shared (strip, ceil_div(OC, STRIP_VECTORS * VF_LEN), worth(N * STRIP_VECTORS * VF_LEN), team) {
        const int64_t j = strip * STRIP_VECTORS * VF_LEN, n = min64(STRIP_VECTORS * VF_LEN, OC - j);
        vf sums[STRIP_VECTORS];
        for (int s = 0; s < STRIP_VECTORS; s++) sums[s] = vf_set1(0.0f);
        for (int64_t i = 0; i < N; i++)
            for (int64_t s = 0; s * VF_LEN < n; s++)
                sums[s] = vf_add(sums[s], vf_load_n(dout + i * OC + j + s * VF_LEN, n - s * VF_LEN));
        for (int64_t s = 0; s * VF_LEN < n; s++) {
            float *to = dbias + j + s * VF_LEN;
            const int64_t left = n - s * VF_LEN;
            vf_store_n(to, accumulate ? vf_add(vf_load_n(to, left), sums[s]) : sums[s], left);
        }
    }
}

void matmul_backward(float *dx, float *dweight, float *dbias, const float *dout, const void *x, const void *weight,
                     const float *scale, int accumulate, int precision, int add, int x_type, int type, float *scratch,
                     int64_t N, int64_t C, int64_t OC, Team *team) {
    /* out = x weight^T, so dweight += dout^T x (summed over N) and dx = dout weight (summed over OC) */
    if (dweight)
        gemm(dweight, C, (Operand){dout, 1, OC, FP32}, (Operand){x, 1, C, x_type}, NULL, accumulate, precision, OC, C,
             N, scratch, team);
    if (dbias) column_sums(dbias, dout, accumulate, N, OC, team);
    if (!dx) return;
    const Linear layer = {weight, scale, NULL, C, OC, type};
    float *weight32 = scratch + products_scratch_size(precision, team->threads);
    const int64_t rows = type == FP32 ? OC : FP32_ROWS;
    for (int64_t j = 0; j < OC; j += rows) {
        const int64_t n = min64(rows, OC - j);
        if (type != FP32) convert_rows(weight32, &layer, j, n, team);
        gemm(dx, C, (Operand){dout + j, OC, 1, FP32}, (Operand){type == FP32 ? weight : weight32, 1, C, FP32}, NULL,
             add || j > 0, precision, N, C, n, scratch, team);
    }
}

void matrix_transpose(float *out, const float *x, int64_t R, int64_t C, Team *team) {
    enum { BLOCK = 64 };
    for_shared (column, ceil_div(C, BLOCK), worth(R * BLOCK), team) {
        const int64_t c = column * BLOCK;
        for (int64_t r = 0; r < R; r += BLOCK)
            transpose(out + c * R + r, R, x + r * C + c, C, min64(BLOCK, R - r), min64(BLOCK, C - c),
                      min64(BLOCK, R - r), FP32, FP32);
    }
}
