/* out (N,OC) = y + u up^T, u (N,R) = scale * x down^T: a low-rank adapter beside a linear layer, Hu et al. 2021,
 * arXiv:2106.09685.
 *
 * The rank R is small, so the two products take R (C + OC) / (C OC) of the layer's operations. They are of floats,
 * whatever the precision of the layer's own. gemm.c computes them and divides them among the threads. */

#include "internal.h"

int64_t lora_scratch_size(int64_t N, int64_t R, int threads) { return gemm_scratch_size(threads) + N * R; }

/* x (n) *= scale. */
static void multiply_by(float *x, float scale, int64_t n, Team *team) {
    for_shared (vector, ceil_div(n, VF_LEN), worth(VF_LEN), team) {
        const int64_t i = vector * VF_LEN;
        vf_store_n(x + i, vf_mul(vf_load_n(x + i, n - i), vf_set1(scale)), n - i);
    }
}

void lora_forward(float *out, float *u, const float *y, const float *x, const float *down, const float *up, float scale,
                  float *scratch, int64_t N, int64_t C, int64_t OC, int64_t R, Team *team) {
    if (out != y)
        for_shared (i, N, worth(OC), team) memcpy(out + i * OC, y + i * OC, (size_t)OC * sizeof(float));
    gemm(u, R, (Operand){x, C, 1, FP32}, (Operand){down, C, 1, FP32}, NULL, 0, FP32, N, R, C, scratch, team);
    multiply_by(u, scale, N * R, team);
    gemm(out, OC, (Operand){u, R, 1, FP32}, (Operand){up, R, 1, FP32}, NULL, 1, FP32, N, OC, R, scratch, team);
}

void lora_backward(float *dx, float *ddown, float *dup, const float *dout, const float *x, const float *u,
                   const float *down, const float *up, float scale, int accumulate, float *scratch, int64_t N,
                   int64_t C, int64_t OC, int64_t R, Team *team) {
    float *du = scratch + gemm_scratch_size(team->threads);
    if (dup)
        gemm(dup, R, (Operand){dout, 1, OC, FP32}, (Operand){u, 1, R, FP32}, NULL, accumulate, FP32, OC, R, N, scratch,
             team);
    gemm(du, R, (Operand){dout, OC, 1, FP32}, (Operand){up, 1, R, FP32}, NULL, 0, FP32, N, R, OC, scratch, team);
    multiply_by(du, scale, N * R, team);
    if (ddown)
        gemm(ddown, C, (Operand){du, 1, R, FP32}, (Operand){x, 1, C, FP32}, NULL, accumulate, FP32, R, C, N, scratch,
             team);
    if (dx) gemm(dx, C, (Operand){du, R, 1, FP32}, (Operand){down, 1, C, FP32}, NULL, 0, FP32, N, C, R, scratch, team);
}
