/* out = silu(gate) * up with silu(gate) = gate * s, s = 1 / (1 + e^-gate). Shazeer 2020, arXiv:2002.05202.
 *
 * A row of x holds gate, then up, because one linear layer makes both. s never overflows: vf_exp is clamped, so for
 * gate far below 0 s is about 4e-39 and not 0. There the factor gate is clamped too: the product stays tiny. */

#include "internal.h"
#include "vmath.h"

static const float FAR = 88.0f; /* s(-88) is below the smallest normal float */

static inline vf sigmoid(vf x) {
    vf e = vf_exp(vf_sub(vf_set1(0.0f), x));
    return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), e));
}

static inline __attribute__((always_inline)) void part_of_type(void *out, const void *gate, const void *up,
                                                               int64_t from, int64_t to, const int type) {
    for (int64_t c = from; c < to; c += VF_LEN) {
        vf g = load_n(gate, c, to - c, type), silu = vf_mul(vf_max(vf_set1(-FAR), g), sigmoid(g));
        store_n(out, c, vf_mul(silu, load_n(up, c, to - c, type)), to - c, type);
    }
}

void swiglu_part(float *out, const float *gate, const float *up, int64_t from, int64_t to) {
    part_of_type(out, gate, up, from, to, FP32);
}

void swiglu_forward(void *out, const void *x, int x_type, int64_t N, int64_t C, Team *team) {
    for_shared (i, N, worth(C), team) {
        void *to = element_to(out, i * C, x_type);
        const void *gate = element(x, i * 2 * C, x_type), *up = element(gate, C, x_type);
        if (x_type == BF16)
            part_of_type(to, gate, up, 0, C, BF16);
        else
            part_of_type(to, gate, up, 0, C, FP32);
    }
}

/* A row of dx (2C) from dout (C) and x (2C). */
static inline __attribute__((always_inline)) void backward_row(float *dx, const float *dout, const void *x, int64_t C,
                                                               const int type) {
    /* dgate = dout * up * s * (1 + gate * (1 - s)), dup = dout * gate * s */
    for (int64_t c = 0; c < C; c += VF_LEN) {
        vf gate = load_n(x, c, C - c, type), up = load_n(x, C + c, C - c, type), s = sigmoid(gate);
        vf d = vf_mul(vf_load_n(dout + c, C - c), s);
        vf above = vf_max(vf_set1(-FAR), gate);
        vf near = vf_min(vf_set1(FAR), above); /* beyond, 1 - s is 0 */
        vf slope = vf_fma(near, vf_sub(vf_set1(1.0f), s), vf_set1(1.0f));
        vf_store_n(dx + c, vf_mul(vf_mul(d, up), slope), C - c);
        vf_store_n(dx + C + c, vf_mul(d, above), C - c);
    }
}

void swiglu_backward(float *dx, const float *dout, const void *x, int x_type, int64_t N, int64_t C, Team *team) {
    for_shared (i, N, worth(C), team) {
        const void *row = element(x, i * 2 * C, x_type);
        if (x_type == BF16)
            backward_row(dx + i * 2 * C, dout + i * C, row, C, BF16);
        else
            backward_row(dx + i * 2 * C, dout + i * C, row, C, FP32);
    }
}
