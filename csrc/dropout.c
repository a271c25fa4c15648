/* out (N,C) = x * factor: 0 where dropout takes an element, 1 / (1 - dropout) where it keeps it. Srivastava et al.
 * 2014.
 *
 * No mask is stored: a factor is a function of the key, the row's number and the column (philox.h), so the backward
 * pass computes the same ones. A few dozen instructions make a vector of them; threads share the rows. */

#include "internal.h"
#include "philox.h"

enum { PART = 64 }; /* columns whose factors are made together */

void dropout_forward(float *out, const float *x, double dropout, uint64_t key, uint64_t first, int64_t N, int64_t C,
                     Team *team) {
    const Dropout drop = dropout_of(dropout, key, first);
    for_shared (i, N, worth(4 * C), team)
        for (int64_t from = 0; from < C; from += PART) {
            float factors[PART];
            for (int64_t k = 0; k < PART; k += 4)
                keep_four(factors + k, &drop, (uint32_t)((from + k) / 4), (uint32_t)i);
            for (int64_t c = from; c < min64(C, from + PART); c += VF_LEN) {
                const int64_t at = i * C + c;
                vf_store_n(out + at, vf_mul(vf_load_n(x + at, C - c), vf_load(factors + c - from)), C - c);
            }
        }
}
