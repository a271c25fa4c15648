/* out (n) = x/2 * (1 + tanh(u)) with u = sqrt(2/pi) * (x + 0.044715 x^3). Hendrycks and Gimpel 2016, arXiv:1606.08415.
 *
 * (1 + tanh(u)) / 2 is the logistic function s(2u) = 1 / (1 + e^-2u), so one exponential of a vector is enough. Nothing
 * overflows, because vf_exp clamps its argument. Threads share the elements. */

#include "internal.h"
#include "vmath.h"

static const float TWO_SQRT_2_OVER_PI = 1.59576912160573f;
static const float CUBIC = 0.044715f;

/* s(2u) */
static inline vf gate(vf x) {
    vf cubic = vf_fma(vf_mul(vf_set1(CUBIC), vf_mul(x, x)), x, x);
    vf e = vf_exp(vf_mul(vf_set1(-TWO_SQRT_2_OVER_PI), cubic));
    return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), e));
}

static inline __attribute__((always_inline)) void part_of_type(void *out, const void *x, int64_t from, int64_t to,
                                                               const int type) {
    for (int64_t i = from; i < to; i += VF_LEN) {
        vf xi = load_n(x, i, to - i, type);
        store_n(out, i, vf_mul(xi, gate(xi)), to - i, type);
    }
}

void gelu_part(float *out, const float *x, int64_t from, int64_t to) { part_of_type(out, x, from, to, FP32); }

void gelu_forward(void *out, const void *x, int x_type, int64_t n, Team *team) {
    enum { PART = 64 * VF_LEN };
    for_shared (part, ceil_div(n, PART), worth(PART), team) {
        const int64_t from = part * PART, to = min64(n, from + PART);
        if (x_type == BF16)
            part_of_type(out, x, from, to, BF16);
        else
            gelu_part(out, x, from, to);
    }
}

/* dx = dout * gelu'(x) for the vector at i. */
static inline __attribute__((always_inline)) void backward_of_type(float *dx, const float *dout, const void *x,
                                                                   int64_t i, int64_t n, const int type) {
    /* out = x s(2u): dx = dout * (s + x s' 2u') with s' = s (1 - s) and u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2) */
    vf xi = load_n(x, i, n - i, type), s = gate(xi);
    /* beyond 32, s' is 0, and x u' must not overflow */
    vf clamped = vf_min(vf_set1(32.0f), vf_max(vf_set1(-32.0f), xi));
    vf du = vf_mul(vf_set1(TWO_SQRT_2_OVER_PI), vf_fma(vf_set1(3.0f * CUBIC), vf_mul(clamped, clamped), vf_set1(1.0f)));
    vf slope = vf_mul(vf_mul(s, vf_sub(vf_set1(1.0f), s)), vf_mul(clamped, du));
    vf_store_n(dx + i, vf_mul(vf_load_n(dout + i, n - i), vf_add(s, slope)), n - i);
}

void gelu_backward(float *dx, const float *dout, const void *x, int x_type, int64_t n, Team *team) {
    const int64_t vectors = ceil_div(n, VF_LEN);
    if (x_type == BF16) {
        for_shared (vector, vectors, worth(VF_LEN), team) backward_of_type(dx, dout, x, vector * VF_LEN, n, BF16);
    } else {
        for_shared (vector, vectors, worth(VF_LEN), team) backward_of_type(dx, dout, x, vector * VF_LEN, n, FP32);
    }
}
