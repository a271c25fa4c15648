/* What the kernels share and Python does not see: threads, and the matrix product that matmul and attention stand on.
 */

#ifndef INTERNAL_H
#define INTERNAL_H

#include "gpt2c.h"
#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

/* Threads worth waking for `work` elements: below this, starting them costs more than they save. */
static inline int team(int threads, int64_t work) { return work < 16384 ? 1 : threads; }

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* One operand of a product: element (i, k), where k is summed over, is at data[i * stride + k * k_stride].
 * Either stride or k_stride is 1. Transposition is only a matter of strides; packing makes it disappear. */
typedef struct {
    const float *data;
    int64_t stride, k_stride;
} Operand;

/* c[i*ldc + j] (M x N) = sum over k of a(i,k) b(j,k), plus bias[j] if not NULL, plus what c held if `accumulate`. */
void gemm(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M, int64_t N,
          int64_t K, float *scratch, int threads);

/* The same on one thread for small M, N, K, whose packed operands fit in the cache: gemm_tile_scratch_size floats. */
void gemm_tile(float *c, int64_t ldc, Operand a, Operand b, int accumulate, int64_t M, int64_t N, int64_t K,
               float *scratch);
int64_t gemm_tile_scratch_size(int64_t M, int64_t N, int64_t K);

#endif
