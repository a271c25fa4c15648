/* What the kernels share and Python does not see: transposition, the products of gemm.c and linear.c. */

#ifndef INTERNAL_H
#define INTERNAL_H

#include "gpt2c.h"
#include "simd.h"
#include "team.h"

enum { LINE = 16 }; /* floats of a cache line */

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns; 0 for rows <= r < width. */
static inline __attribute__((always_inline)) void transpose(float *restrict to, int64_t to_stride,
                                                            const float *restrict from, int64_t from_stride,
                                                            int64_t rows, int64_t columns, const int64_t width) {
    for (int64_t r = 0; r < width; r += VF_LEN)
        for (int64_t c = 0; c < columns; c += VF_LEN) {
            vf block[VF_LEN];
            for (int64_t i = 0; i < VF_LEN; i++)
                block[i] = r + i < rows ? vf_load_n(from + (r + i) * from_stride + c, columns - c) : vf_set1(0.0f);
            vf_transpose(block);
            for (int64_t i = 0; i < min64(VF_LEN, columns - c); i++)
                vf_store_n(to + (c + i) * to_stride + r, block[i], width - r);
        }
}

/* One operand of a product: element (i, k), where k is summed over, is at data[i * stride + k * k_stride].
 * Either stride or k_stride is 1. Transposition is only a matter of strides; packing makes it disappear. */
typedef struct {
    const float *data;
    int64_t stride, k_stride;
} Operand;

/* c[i*ldc + j] (M x N) = sum over k of a(i,k) b(j,k), plus bias[j] if not NULL, plus what c held if `accumulate`. */
void gemm(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M, int64_t N,
          int64_t K, float *scratch, Team *team);

/* A row of encoder_forward: out (C) = the token's row of wte + its position's row of wpe. */
void embed_row(float *out, const Linear *wte, const float *position, int32_t token);

/* A row of layernorm_forward, and elements [from, to) of gelu_forward. */
void layernorm_row(float *out, float *mean, float *rstd, const float *row, const float *weight, const float *bias,
                   float eps, int64_t C);
void gelu_part(float *out, const float *x, int64_t from, int64_t to);

/* Rows of 8 bits: row i is scales[i] * values[i * stride ...], and sums[i] the sum of its values. */
typedef struct {
    float *scales;
    int32_t *sums;
    int8_t *values;
    int64_t stride;
} Quantized;

/* Floats that N rows of C need, and such rows there. */
int64_t quantized_size(int64_t N, int64_t C);
Quantized quantized_in(float *memory, int64_t N, int64_t C);

/* Row i of q becomes x (C); NaN or infinity in x makes its scale NaN. */
void quantize_row(Quantized q, const float *x, int64_t i, int64_t C);

/* Columns [from, to) of out (N,OC) = layer(x), added to out if `accumulate`; `from` is a multiple of VF_LEN. x (N,C),
 * or for INT8 the same rows as q. One thread's work: threads call it for columns of their own. */
void linear_columns(float *out, const Linear *layer, const float *x, const Quantized *q, int64_t N, int64_t from,
                    int64_t to, int accumulate);

/* out (N,OC) = layer(x) for few rows, or for INT8 any: the weights are read once, where they lie. */
void linear_rows(float *out, const Linear *layer, const float *x, float *scratch, int64_t N, Team *team);
int64_t linear_scratch_size(int64_t N, int64_t C, int type, int threads);

enum { FEW = 16 }; /* rows up to which reading weights costs more than the arithmetic */

#endif
