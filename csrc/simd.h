/* One vector of floats. A kernel written with these runs with 16, 8, 4 or 1 lanes: the compiler's flags decide.
 *
 * This is the only file that names an instruction set's intrinsics. `..._part` and `..._n` touch the first n lanes only
 * and read the others as 0; part wants 0 < n < VF_LEN, n any n > 0. vf_first_n(a, b, n), 0 <= n <= VF_LEN, has n lanes
 * of a and then b's. vf_max(a, b) and vf_min(a, b) give b where either is NaN on x86 and NaN on NEON, so a constant
 * stands first and a NaN in the data survives. */

#ifndef SIMD_H
#define SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vf;
#define VF_LEN 16
static inline __mmask16 vf_mask(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf vf_load_part(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(vf_mask(n), p); }
static inline void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline void vf_store_part(float *p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, vf_mask(n), x); }
static inline vf vf_set1(float a) { return _mm512_set1_ps(a); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } /* a*b + c */
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
static inline vf vf_first_n(vf a, vf b, int64_t n) { return _mm512_mask_mov_ps(b, vf_mask(n), a); }
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
/* a * 2^k, where k is the integer in the low bits of t = k + 1.5*2^23: added to the exponent field. */
static inline vf vf_scale2(vf a, vf t) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
/* The lanes of a and b alternating: the lower half of each (a0 b0 a1 b1 ...), then the upper half. */
static inline vf vf_zip_lo(vf a, vf b) {
    const __m512i lanes = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, lanes, b);
}
static inline vf vf_zip_hi(vf a, vf b) {
    const __m512i lanes = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
}

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
typedef __m256 vf;
#define VF_LEN 8
static inline __m256i vf_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline vf vf_load_part(const float *p, int64_t n) { return _mm256_maskload_ps(p, vf_mask(n)); }
static inline void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
static inline void vf_store_part(float *p, vf x, int64_t n) { _mm256_maskstore_ps(p, vf_mask(n), x); }
static inline vf vf_set1(float a) { return _mm256_set1_ps(a); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf vf_first_n(vf a, vf b, int64_t n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(vf_mask(n))); }
static inline float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vf_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf vf_scale2(vf a, vf t) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
static inline vf vf_zip_lo(vf a, vf b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
static inline vf vf_zip_hi(vf a, vf b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

#elif defined(__SSE2__) || defined(__ARM_NEON)
#define VF_LEN 4
#if defined(__SSE2__)
#include <emmintrin.h>
typedef __m128 vf;
static inline vf vf_load(const float *p) { return _mm_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm_storeu_ps(p, x); }
static inline vf vf_set1(float a) { return _mm_set1_ps(a); }
static inline vf vf_add(vf a, vf b) { return _mm_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); } /* SSE2 has none: rounds twice */
static inline vf vf_max(vf a, vf b) { return _mm_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm_min_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm_sqrt_ps(a); }
static inline float vf_sum(vf a) {
    __m128 s = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float vf_hmax(vf a) {
    __m128 s = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline vf vf_scale2(vf a, vf t) {
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_slli_epi32(_mm_castps_si128(t), 23)));
}
static inline vf vf_zip_lo(vf a, vf b) { return _mm_unpacklo_ps(a, b); }
static inline vf vf_zip_hi(vf a, vf b) { return _mm_unpackhi_ps(a, b); }
#else
#include <arm_neon.h>
typedef float32x4_t vf;
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf x) { vst1q_f32(p, x); }
static inline vf vf_set1(float a) { return vdupq_n_f32(a); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
static inline vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
static inline vf vf_sqrt(vf a) { return vsqrtq_f32(a); }
static inline float vf_sum(vf a) { return vaddvq_f32(a); }
static inline float vf_hmax(vf a) { return vmaxvq_f32(a); }
static inline vf vf_scale2(vf a, vf t) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vreinterpretq_s32_f32(t), 23)));
}
static inline vf vf_zip_lo(vf a, vf b) { return vzip1q_f32(a, b); }
static inline vf vf_zip_hi(vf a, vf b) { return vzip2q_f32(a, b); }
#endif
static inline vf vf_first_n(vf a, vf b, int64_t n) {
    float lanes[8];
    vf_store(lanes, b);
    vf_store(lanes + 4, a);
    memcpy(lanes, lanes + 4, (size_t)n * sizeof(float));
    return vf_load(lanes);
}
static inline vf vf_load_part(const float *p, int64_t n) {
    float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    memcpy(lanes, p, (size_t)n * sizeof(float));
    return vf_load(lanes);
}
static inline void vf_store_part(float *p, vf x, int64_t n) {
    float lanes[4];
    vf_store(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof(float));
}

#else /* any other CPU: one lane, plain C */
typedef float vf;
#define VF_LEN 1
static inline vf vf_load(const float *p) { return *p; }
static inline void vf_store(float *p, vf x) { *p = x; }
static inline vf vf_first_n(vf a, vf b, int64_t n) { return n > 0 ? a : b; }
static inline vf vf_load_part(const float *p, int64_t n) { return n > 0 ? *p : 0.0f; } /* one lane has no parts */
static inline void vf_store_part(float *p, vf x, int64_t n) {
    if (n > 0) *p = x;
}
static inline vf vf_set1(float a) { return a; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; }
static inline vf vf_sqrt(vf a) { return sqrtf(a); }
static inline float vf_sum(vf a) { return a; }
static inline float vf_hmax(vf a) { return a; }
static inline vf vf_scale2(vf a, vf t) {
    uint32_t bits, k;
    memcpy(&bits, &a, 4);
    memcpy(&k, &t, 4);
    bits += k << 23;
    memcpy(&a, &bits, 4);
    return a;
}
static inline vf vf_zip_lo(vf a, vf b) {
    (void)b;
    return a;
}
static inline vf vf_zip_hi(vf a, vf b) {
    (void)a;
    return b;
}
#endif

/* The loop of every row: for (i = 0; i < n; i += VF_LEN) with vf_load_n(p + i, n - i), so that the last, partial vector
 * needs no second loop. */
static inline vf vf_load_n(const float *p, int64_t n) { return n >= VF_LEN ? vf_load(p) : vf_load_part(p, n); }
static inline void vf_store_n(float *p, vf x, int64_t n) {
    if (n >= VF_LEN)
        vf_store(p, x);
    else
        vf_store_part(p, x, n);
}
/* x with the lanes from n on set to 0. */
static inline vf vf_keep_n(vf x, int64_t n) { return n >= VF_LEN ? x : vf_first_n(x, vf_set1(0.0f), n); }
/* rows[VF_LEN] becomes its transpose: log2(VF_LEN) times, zip row i with row i + VF_LEN/2 (the perfect shuffle). */
static inline void vf_transpose(vf rows[VF_LEN]) {
    for (int stage = 1; stage < VF_LEN; stage *= 2) {
        vf zipped[VF_LEN];
        for (int i = 0; i < VF_LEN / 2; i++) {
            zipped[2 * i] = vf_zip_lo(rows[i], rows[i + VF_LEN / 2]);
            zipped[2 * i + 1] = vf_zip_hi(rows[i], rows[i + VF_LEN / 2]);
        }
        for (int i = 0; i < VF_LEN; i++) rows[i] = zipped[i];
    }
}

#endif
