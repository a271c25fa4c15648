/* AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) and the global gradient norm of n parameters.
 *
 *   g = grad * grad_scale, m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2
 *   param -= learning_rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * param)
 *
 * Memory limits the speed. One pass reads 4 floats of each parameter (param, m, v, grad) and writes 3; the norm
 * reads 1. Threads share the parameters, and for the norm SLICES parts of them. */

#include "internal.h"

void adamw_update(float *param, float *m, float *v, const float *grad, float learning_rate, double beta1, double beta2,
                  float eps, float weight_decay, int64_t t, float grad_scale, int64_t n, Team *team) {
    /* m_hat = m / (1 - beta1^t) and v_hat = v / (1 - beta2^t) correct the bias of starting from 0. The factors are in
     * double, because 1 - beta^t cancels. */
    const vf b1 = vf_set1((float)beta1), c1 = vf_set1((float)(1.0 - beta1));
    const vf b2 = vf_set1((float)beta2), c2 = vf_set1((float)(1.0 - beta2));
    const vf m_correction = vf_set1((float)(1.0 / (1.0 - pow(beta1, (double)t))));
    const vf v_correction = vf_set1((float)(1.0 / (1.0 - pow(beta2, (double)t))));
    for_shared (vector, ceil_div(n, VF_LEN), worth(VF_LEN), team) {
        const int64_t i = vector * VF_LEN;
        vf g = vf_mul(vf_load_n(grad + i, n - i), vf_set1(grad_scale));
        vf p = vf_load_n(param + i, n - i);
        vf first = vf_fma(b1, vf_load_n(m + i, n - i), vf_mul(c1, g));
        vf second = vf_fma(b2, vf_load_n(v + i, n - i), vf_mul(c2, vf_mul(g, g)));
        vf root = vf_add(vf_sqrt(vf_mul(second, v_correction)), vf_set1(eps));
        vf step = vf_fma(vf_set1(weight_decay), p, vf_div(vf_mul(first, m_correction), root));
        vf_store_n(m + i, first, n - i);
        vf_store_n(v + i, second, n - i);
        vf_store_n(param + i, vf_sub(p, vf_mul(vf_set1(learning_rate), step)), n - i);
    }
}

enum { LANES = 16 }; /* sums side by side in a slice, so that the compiler can use vectors */

double global_norm(const float *grad, double *sums, int64_t n, Team *team) {
    double total = 0.0;
    const int64_t length = round_up(ceil_div(n, SLICES), LANES);
    for_shared (slice, SLICES, worth(length), team) {
        int64_t i = min64(n, slice * length), end = min64(n, i + length);
        double lanes[LANES] = {0.0}, sum = 0.0;
        for (; i + LANES <= end; i += LANES)
            for (int l = 0; l < LANES; l++) lanes[l] += (double)grad[i + l] * (double)grad[i + l];
        for (; i < end; i++) sum += (double)grad[i] * (double)grad[i];
        for (int l = 0; l < LANES; l++) sum += lanes[l];
        sums[slice] = sum;
    }
    for (int slice = 0; slice < SLICES; slice++) total += sums[slice];
    return sqrt(total);
}
