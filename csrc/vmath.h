/* The exponential, built from simd.h alone: every instruction set computes the same formula. */

#ifndef VMATH_H
#define VMATH_H

#include "simd.h"

/* e^x to 2 ULP for x in [-87.3, 88.3]. Other x are clamped, so the result is never 0 or infinite. NaN stays NaN.
 *
 * e^x = 2^k e^r with k = round(x / ln 2) and |r| <= ln(2)/2. ln 2 is split in two floats so that r is exact (Cody &
 * Waite 1980). e^r is approximated by its Taylor polynomial of degree 7, whose remainder r^8/8! is below 6e-9 there. */
static inline vf vf_exp(vf x) {
    const vf shift = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    x = vf_min(vf_set1(88.3f), vf_max(vf_set1(-87.3f), x));
    vf t = vf_fma(x, vf_set1(1.44269504088896341f), shift);
    vf k = vf_sub(t, shift);
    vf r = vf_fma(k, vf_set1(-0.693359375f), x);
    r = vf_fma(k, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.0f / 5040.0f);
    p = vf_fma(p, r, vf_set1(1.0f / 720.0f));
    p = vf_fma(p, r, vf_set1(1.0f / 120.0f));
    p = vf_fma(p, r, vf_set1(1.0f / 24.0f));
    p = vf_fma(p, r, vf_set1(1.0f / 6.0f));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, t);
}

#endif
