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

void swiglu_part(float *out, const float *gate, const float *up, int64_t from, int64_t to) {
    for (int64_t c = from; c < to; c += VF_LEN) {
        vf g = vf_load_n(gate + c, to - c), silu = vf_mul(vf_max(vf_set1(-FAR), g), sigmoid(g));
        vf_store_n(out + c, vf_mul(silu, vf_load_n(up + c, to - c)), to - c);
    }
}

void swiglu_forward(float *out, const float *x, int64_t N, int64_t C, Team *team) {
    for_shared (i, N, worth(C), team) {
        const float *gate = x + i * 2 * C;
        swiglu_part(out + i * C, gate, gate + C, 0, C);
    }
}

void swiglu_backward(float *dx, const float *dout, const float *x, int64_t N, int64_t C, Team *team) {
    /* dgate = dout * up * s * (1 + gate * (1 - s)), dup = dout * gate * s */
    for_shared (i, N, worth(C), team) {
        const float *gates = x + i * 2 * C, *ups = gates + C;
        float *dgates = dx + i * 2 * C, *dups = dgates + C;
        for (int64_t c = 0; c < C; c += VF_LEN) {
            vf gate = vf_load_n(gates + c, C - c), up = vf_load_n(ups + c, C - c), s = sigmoid(gate);
            vf d = vf_mul(vf_load_n(dout + i * C + c, C - c), s);
            vf above = vf_max(vf_set1(-FAR), gate);
            vf near = vf_min(vf_set1(FAR), above); /* beyond, 1 - s is 0 */
            vf slope = vf_fma(near, vf_sub(vf_set1(1.0f), s), vf_set1(1.0f));
            vf_store_n(dgates + c, vf_mul(vf_mul(d, up), slope), C - c);
            vf_store_n(dups + c, vf_mul(d, above), C - c);
        }
    }
}
