/* out = x * rstd * weight over each row of C channels. Zhang and Sennrich 2019, arXiv:1910.07467.
 *
 * Bound by memory: a row of x comes once from memory and stays in the first-level cache for its two passes (mean
 * square, output). */

#include "internal.h"

/* out (C) = row * rstd * weight. */
static inline __attribute__((always_inline)) void write_row(void *out, const float *row, float rstd,
                                                            const float *weight, int64_t C, const int type) {
    vf s = vf_set1(rstd);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        vf norm = vf_mul(vf_load_n(row + c, C - c), s);
        store_n(out, c, vf_mul(norm, vf_load_n(weight + c, C - c)), C - c, type);
    }
}

void rmsnorm_row(void *out, float *rstd, const float *row, const float *weight, float eps, int out_type, int64_t C) {
    vf squares = vf_set1(0.0f);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        vf v = vf_load_n(row + c, C - c);
        squares = vf_fma(v, v, squares);
    }
    *rstd = 1.0f / sqrtf(vf_sum(squares) / (float)C + eps);
    if (out_type == BF16)
        write_row(out, row, *rstd, weight, C, BF16);
    else
        write_row(out, row, *rstd, weight, C, FP32);
}

void rmsnorm_forward(void *out, float *rstd, const float *x, const float *weight, float eps, int out_type, int64_t N,
                     int64_t C, Team *team) {
    for_shared (i, N, worth(C), team)
        rmsnorm_row(element_to(out, i * C, out_type), rstd + i, x + i * C, weight, eps, out_type, C);
}

void rmsnorm_backward(float *dx, float *dweight, const float *dout, const float *x, const float *weight,
                      const float *rstd, int64_t N, int64_t C, Team *team) {
    /* With norm = x * rstd and dnorm = dout * weight: dx += rstd * (dnorm - norm * average(dnorm * norm)), the average
     * over the row. */
    for_shared (i, N, worth(C), team) {
        const float *row = x + i * C, *drow = dout + i * C;
        float *dxrow = dx + i * C;
        vf s = vf_set1(rstd[i]), product = vf_set1(0.0f);
        for (int64_t c = 0; c < C; c += VF_LEN) {
            vf norm = vf_mul(vf_load_n(row + c, C - c), s);
            vf dnorm = vf_mul(vf_load_n(drow + c, C - c), vf_load_n(weight + c, C - c)); /* 0 past the end */
            product = vf_fma(dnorm, norm, product);
        }
        vf average = vf_set1(vf_sum(product) / (float)C);
        for (int64_t c = 0; c < C; c += VF_LEN) {
            vf norm = vf_mul(vf_load_n(row + c, C - c), s);
            vf dnorm = vf_mul(vf_load_n(drow + c, C - c), vf_load_n(weight + c, C - c));
            vf d = vf_sub(dnorm, vf_mul(norm, average));
            vf_store_n(dxrow + c, vf_fma(d, s, vf_load_n(dxrow + c, C - c)), C - c);
        }
    }
    if (!dweight) return;
    /* out = norm * weight, so dweight += column sums of dout * norm; a task has whole columns, so the order of the sums
     * is fixed. */
    for_shared (vector, ceil_div(C, VF_LEN), worth(N * VF_LEN), team) {
        const int64_t c = vector * VF_LEN;
        vf weights = vf_set1(0.0f);
        for (int64_t i = 0; i < N; i++) {
            vf norm = vf_mul(vf_load_n(x + i * C + c, C - c), vf_set1(rstd[i]));
            weights = vf_fma(vf_load_n(dout + i * C + c, C - c), norm, weights);
        }
        vf_store_n(dweight + c, vf_add(vf_load_n(dweight + c, C - c), weights), C - c);
    }
}
