/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC): the linear layer, three matrix products in all.
 *
 * Forward is 2 N C OC operations, backward twice that; both run at the speed of gemm.c. */

#include "internal.h"

void matmul_forward(float *out, const float *x, const float *weight, const float *bias, float *scratch, int64_t N,
                    int64_t C, int64_t OC, int threads) {
    gemm(out, OC, (Operand){x, C, 1}, (Operand){weight, C, 1}, bias, 0, N, OC, C, scratch, threads);
}

/* dbias (OC) += column sums of dout (N,OC); a thread owns whole columns, so the order of the sums is fixed. */
static void add_column_sums(float *restrict dbias, const float *restrict dout, int64_t N, int64_t OC, int threads) {
#pragma omp parallel for num_threads(team(threads, N *OC)) schedule(static)
    for (int64_t j = 0; j < OC; j += VF_LEN) {
        vf sum = vf_set1(0.0f);
        for (int64_t i = 0; i < N; i++) sum = vf_add(sum, vf_load_n(dout + i * OC + j, OC - j));
        vf_store_n(dbias + j, vf_add(vf_load_n(dbias + j, OC - j), sum), OC - j);
    }
}

void matmul_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                     float *scratch, int64_t N, int64_t C, int64_t OC, int threads) {
    /* out = x weight^T, so dx = dout weight (summed over OC) and dweight += dout^T x (summed over N) */
    gemm(dx, C, (Operand){dout, OC, 1}, (Operand){weight, 1, C}, NULL, 0, N, C, OC, scratch, threads);
    gemm(dweight, C, (Operand){dout, 1, OC}, (Operand){x, 1, C}, NULL, 1, OC, C, N, scratch, threads);
    if (dbias) add_column_sums(dbias, dout, N, OC, threads);
}
