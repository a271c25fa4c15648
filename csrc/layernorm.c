/* out (N,C) = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps), with mean and variance of each row.
 * Ba et al. 2016, arXiv:1607.06450.
 *
 * Memory limits the speed: a row of x is read from memory once and stays in the first-level cache for its three passes
 * (mean, variance, output). The second pass also sums the rounding error of the mean and corrects mean and variance: a
 * mean of 1e4 with a deviation of 1 keeps its accuracy (corrected two-pass algorithm, Chan, Golub and LeVeque 1983).
 * Threads share the rows, and in backward the columns for dweight and dbias. */

#include "internal.h"

/* out (C) = (row - mean) * rstd * weight + bias. */
static inline __attribute__((always_inline)) void write_row(void *out, const float *row, float mean, float rstd,
                                                            const float *weight, const float *bias, int64_t C,
                                                            const int type) {
    vf m = vf_set1(mean);
    vf s = vf_set1(rstd);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        vf norm = vf_mul(vf_sub(vf_load_n(row + c, C - c), m), s);
        store_n(out, c, vf_fma(norm, vf_load_n(weight + c, C - c), vf_load_n(bias + c, C - c)), C - c, type);
    }
}

void layernorm_row(void *out, float *mean, float *rstd, const float *row, const float *weight, const float *bias,
                   float eps, int out_type, int64_t C) {
    vf sum = vf_set1(0.0f);
    for (int64_t c = 0; c < C; c += VF_LEN) sum = vf_add(sum, vf_load_n(row + c, C - c));
    float rounded = vf_sum(sum) / (float)C;
    vf deviations = vf_set1(0.0f), squares = vf_set1(0.0f);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        /* lanes past the end add 0, not the mean */
        vf centred = vf_keep_n(vf_sub(vf_load_n(row + c, C - c), vf_set1(rounded)), C - c);
        deviations = vf_add(deviations, centred);
        squares = vf_fma(centred, centred, squares);
    }
    float correction = vf_sum(deviations) / (float)C;
    *mean = rounded + correction;
    float variance = vf_sum(squares) / (float)C - correction * correction;
    *rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps); /* unlike fmaxf, it keeps NaN */
    if (out_type == BF16)
        write_row(out, row, *mean, *rstd, weight, bias, C, BF16);
    else
        write_row(out, row, *mean, *rstd, weight, bias, C, FP32);
}

void layernorm_forward(void *out, float *mean, float *rstd, const float *x, const float *weight, const float *bias,
                       float eps, int out_type, int64_t N, int64_t C, Team *team) {
    for_shared (i, N, worth(C), team)
        layernorm_row(element_to(out, i * C, out_type), mean + i, rstd + i, x + i * C, weight, bias, eps, out_type, C);
}

void layernorm_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                        const float *mean, const float *rstd, int64_t N, int64_t C, Team *team) {
    /* With norm = (x - mean) * rstd and dnorm = dout * weight:
     * dx += rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm)), with averages over the row. */
    for_shared (i, N, worth(C), team) {
        const float *row = x + i * C, *drow = dout + i * C;
        float *dxrow = dx + i * C;
        vf m = vf_set1(mean[i]), s = vf_set1(rstd[i]);
        vf sum = vf_set1(0.0f), product = vf_set1(0.0f);
        for (int64_t c = 0; c < C; c += VF_LEN) {
            vf norm = vf_mul(vf_sub(vf_load_n(row + c, C - c), m), s);
            vf dnorm = vf_mul(vf_load_n(drow + c, C - c), vf_load_n(weight + c, C - c)); /* 0 past the end */
            sum = vf_add(sum, dnorm);
            product = vf_fma(dnorm, norm, product);
        }
        vf average = vf_set1(vf_sum(sum) / (float)C), norm_average = vf_set1(vf_sum(product) / (float)C);
        for (int64_t c = 0; c < C; c += VF_LEN) {
            vf norm = vf_mul(vf_sub(vf_load_n(row + c, C - c), m), s);
            vf dnorm = vf_mul(vf_load_n(drow + c, C - c), vf_load_n(weight + c, C - c));
            vf d = vf_sub(vf_sub(dnorm, average), vf_mul(norm, norm_average));
            vf_store_n(dxrow + c, vf_fma(d, s, vf_load_n(dxrow + c, C - c)), C - c);
        }
    }
    if (!dweight && !dbias) return;
    /* dweight += column sums of dout * norm, dbias += column sums of dout. A task has whole columns, so the order of a
     * sum is fixed. */
    for_shared (vector, ceil_div(C, VF_LEN), worth(N * VF_LEN), team) {
        const int64_t c = vector * VF_LEN;
        vf weight_sum = vf_set1(0.0f), bias_sum = vf_set1(0.0f);
        for (int64_t i = 0; i < N; i++) {
            vf d = vf_load_n(dout + i * C + c, C - c);
            vf norm = vf_mul(vf_sub(vf_load_n(x + i * C + c, C - c), vf_set1(mean[i])), vf_set1(rstd[i]));
            weight_sum = vf_fma(d, norm, weight_sum);
            bias_sum = vf_add(bias_sum, d);
        }
        if (dweight) vf_store_n(dweight + c, vf_add(vf_load_n(dweight + c, C - c), weight_sum), C - c);
        if (dbias) vf_store_n(dbias + c, vf_add(vf_load_n(dbias + c, C - c), bias_sum), C - c);
    }
}
