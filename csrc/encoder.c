/* out = wte[idx] + wpe: a row of the token table plus a row of the position table.
 *
 * Bound by memory: forward reads 2 floats and writes 1 an element, backward reads 3 and writes 2. */

#include "internal.h"

void encoder_forward(float *out, const int32_t *idx, const float *wte, const float *wpe, int64_t B, int64_t T,
                     int64_t C, Team *team) {
    for_shared (bt, B * T, worth(C), team) {
        const float *token = wte + idx[bt] * C, *position = wpe + bt % T * C;
        for (int64_t c = 0; c < C; c += VF_LEN)
            vf_store_n(out + bt * C + c, vf_add(vf_load_n(token + c, C - c), vf_load_n(position + c, C - c)), C - c);
    }
}

void encoder_backward(float *dwte, float *dwpe, const float *dout, const int32_t *idx, int64_t B, int64_t T, int64_t C,
                      Team *team) {
    /* Tokens repeat, so several rows of dout may add to one row of dwte: threads share columns, never rows. */
    for_shared (vector, ceil_div(C, VF_LEN), worth(B * T * VF_LEN), team) {
        const int64_t c = vector * VF_LEN;
        for (int64_t bt = 0; bt < B * T; bt++) {
            vf d = vf_load_n(dout + bt * C + c, C - c);
            float *token = dwte + idx[bt] * C + c, *position = dwpe + bt % T * C + c;
            vf_store_n(token, vf_add(vf_load_n(token, C - c), d), C - c);
            vf_store_n(position, vf_add(vf_load_n(position, C - c), d), C - c);
        }
    }
}
