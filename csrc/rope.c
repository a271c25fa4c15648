/* Rotary positions: each pair (a, b) of a head's channels, i and i + D, becomes (a cos - b sin, b cos + a sin).
 * Su et al. 2021, arXiv:2104.09864.
 *
 * Bound by memory: in place, q and k are read and written once; the tables stay in the cache. */

#include "internal.h"

static inline __attribute__((always_inline)) void head_of_type(void *out, const float *x, const float *cos,
                                                               const float *sin, float direction, int64_t D,
                                                               const int type) {
    for (int64_t i = 0; i < D; i += VF_LEN) {
        vf a = vf_load_n(x + i, D - i), b = vf_load_n(x + D + i, D - i);
        vf c = vf_load_n(cos + i, D - i), s = vf_mul(vf_set1(direction), vf_load_n(sin + i, D - i));
        store_n(out, i, vf_sub(vf_mul(a, c), vf_mul(b, s)), D - i, type);
        store_n(out, D + i, vf_fma(b, c, vf_mul(a, s)), D - i, type);
    }
}

void rope_head(float *out, const float *x, const float *cos, const float *sin, float direction, int64_t D) {
    head_of_type(out, x, cos, sin, direction, D, FP32);
}

/* A row of W channels, of which `heads` heads are turned. */
static inline __attribute__((always_inline)) void turn_row(void *to, const float *row, const float *cos,
                                                           const float *sin, float direction, int64_t heads, int64_t W,
                                                           int64_t D, const int type) {
    for (int64_t first = 0; first < heads * 2 * D; first += 2 * D)
        head_of_type(element_to(to, first, type), row + first, cos, sin, direction, D, type);
    if (to != row) /* in place, the values are there already */
        for (int64_t i = heads * 2 * D; i < W; i += VF_LEN) store_n(to, i, vf_load_n(row + i, W - i), W - i, type);
}

static void turn(void *out, const float *x, const float *cos, const float *sin, const int32_t *offsets, float direction,
                 int64_t heads, int64_t position, int out_type, int64_t B, int64_t T, int64_t W, int64_t D, int64_t S,
                 Team *team) {
    const Sequences all = {offsets, B, T, S};
    for_shared (bt, B * T, worth(W), team) {
        const int64_t angle = (position + bt - sequence_start(all, bt)) * D;
        void *to = element_to(out, bt * W, out_type);
        if (out_type == BF16)
            turn_row(to, x + bt * W, cos + angle, sin + angle, direction, heads, W, D, BF16);
        else
            turn_row(to, x + bt * W, cos + angle, sin + angle, direction, heads, W, D, FP32);
    }
}

void rope_forward(void *out, const float *qkv, const float *cos, const float *sin, const int32_t *offsets,
                  int64_t heads, int64_t position, int out_type, int64_t B, int64_t T, int64_t W, int64_t D, int64_t S,
                  Team *team) {
    turn(out, qkv, cos, sin, offsets, 1.0f, heads, position, out_type, B, T, W, D, S, team);
}

void rope_backward(float *dqkv, const float *dout, const float *cos, const float *sin, const int32_t *offsets,
                   int64_t heads, int64_t position, int64_t B, int64_t T, int64_t W, int64_t D, int64_t S, Team *team) {
    turn(dqkv, dout, cos, sin, offsets, -1.0f, heads, position, FP32, B, T, W, D, S, team);
}
