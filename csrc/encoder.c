/* out (B,T,C) = wte[idx] + wpe[position + t]: a row of the token table plus a row of the position table, if there is
 * one.
 *
 * Memory limits the speed: for each element forward reads 2 floats and writes 1, backward reads 3 and writes 2. Threads
 * share the rows in forward and the channels in backward. */

#include "internal.h"

void embed_row(float *out, const Linear *wte, const float *position, int32_t token) {
    const int64_t C = wte->C, row = token * C;
    for (int64_t c = 0; c < C; c += VF_LEN) {
        const int64_t n = C - c;
        vf w;
        if (wte->type == INT8) {
            float lanes[VF_LEN] = {0.0f};
            for (int64_t k = 0; k < min64(VF_LEN, n); k++)
                lanes[k] = (float)(((const uint8_t *)wte->weight)[row + c + k] - 128);
            w = vf_mul(vf_load(lanes), vf_set1(wte->scale[token]));
        } else if (wte->type == FP16) {
            w = vf_load_half_n((const uint16_t *)wte->weight + row + c, n);
        } else {
            w = vf_load_n((const float *)wte->weight + row + c, n);
        }
        vf_store_n(out + c, position ? vf_add(w, vf_load_n(position + c, n)) : w, n);
    }
}

void encoder_forward(float *out, const int32_t *idx, const void *wte, const float *wpe, const float *scale,
                     const int32_t *offsets, int64_t position, int type, int64_t B, int64_t T, int64_t C, int64_t S,
                     Team *team) {
    const Linear table = {wte, scale, NULL, C, 0, type};
    const Sequences all = {offsets, B, T, S};
    for_shared (bt, B * T, worth(C), team) {
        const int64_t t = bt - sequence_start(all, bt);
        embed_row(out + bt * C, &table, wpe ? wpe + (position + t) * C : NULL, idx[bt]);
    }
}

/* dtable += the row drow of dout, n channels of it. */
static void add_row(float *dtable, const float *drow, int64_t n) {
    vf_store_n(dtable, vf_add(vf_load_n(dtable, n), vf_load_n(drow, n)), n);
}

void encoder_backward(float *dwte, float *dwpe, const float *dout, const int32_t *idx, const int32_t *offsets,
                      int64_t B, int64_t T, int64_t C, int64_t S, Team *team) {
    const Sequences all = {offsets, B, T, S};
    /* Tokens repeat, so several rows of dout may add to one row of dwte. Threads therefore share columns, not rows. */
    for_shared (vector, ceil_div(C, VF_LEN), worth(B * T * VF_LEN), team) {
        const int64_t c = vector * VF_LEN, n = C - c;
        for (int64_t s = 0; s < sequence_count(all); s++)
            for (int64_t t = 0, bt = sequence_at(all, s); t < sequence_length(all, s); t++, bt++) {
                if (dwte) add_row(dwte + idx[bt] * C + c, dout + bt * C + c, n);
                if (dwpe) add_row(dwpe + t * C + c, dout + bt * C + c, n);
            }
    }
}
