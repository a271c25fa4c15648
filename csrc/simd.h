/* vf, a vector of floats. A kernel written with these functions runs with 16, 8, 4 or 1 lanes: compiler flags decide.
 *
 * This is the only file with the intrinsics of instruction sets. `..._part` and `..._n` access the first n lanes only;
 * a load sets the others to 0. part requires 0 < n < VF_LEN, n requires n > 0. vf_first_n(a, b, n), 0 <= n <= VF_LEN,
 * takes the first n lanes from a and the others from b. Where an operand is NaN, vf_max(a, b) and vf_min(a, b) return b
 * on x86 and NaN on NEON, so kernels put a constant first and a NaN in the data survives.
 *
 * For BF16 and FP16, see the end: pairs of 16-bit numbers in the lanes of a vf, and vh, a vector of halves.
 *
 * For INT8: vi holds VF_LEN sums of 32 bits, vb holds VB_LEN numbers of 8 bits. vi_dot multiplies two vb and adds each
 * product to one of the sums. Nothing saturates, so every instruction set computes the same integers. */

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
static inline vf vf_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void vf_store_half(uint16_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline vf vf_load_bytes(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* The upper halves of a's 32-bit lanes, then b's: as 16-bit lanes in this order. */
static inline vf vf_upper_halves(vf a, vf b) {
    const __m256i high_a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a), 16));
    const __m256i high_b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(b), 16));
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(high_a), high_b, 1));
}
typedef __m512i vi;
static inline vi vi_first(int32_t a) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(a)); } /* a, 0, 0, ... */
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vf vi_as_vf(vi a) { return _mm512_castsi512_ps(a); }
static inline vi vf_as_vi(vf a) { return _mm512_castps_si512(a); }
static inline vf vi_to_vf(vi a) { return _mm512_cvtepi32_ps(a); }
typedef __m512i vb;
#if defined(__AVX512VNNI__)
#define VB_LEN 64
static inline vb vb_load_unsigned(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline vb vb_load_signed(const int8_t *p) { return _mm512_loadu_si512(p); }
static inline vi vi_dot(vi sum, vb a, vb b) { /* with the intrinsic, gcc 12 copies each sum back and forth */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
    return sum;
}
#define VB_OF_LANE 4 /* lane i of vi_dot sums the products 4i to 4i + 3 */
#else
#define VB_LEN 32
#define VB_OF_LANE 2 /* of 16 bits each */
static inline vb vb_load_unsigned(const uint8_t *p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
static inline vb vb_load_signed(const int8_t *p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
static inline vi vi_dot(vi sum, vb a, vb b) { /* with intrinsics, gcc 12 multiplies first and spills the sums */
    vi products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(products) : "v"(a), "vm"(b));
    return sum;
}
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
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
static inline vf vf_load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void vf_store_half(uint16_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline vf vf_load_bytes(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vf vf_upper_halves(vf a, vf b) {
    const __m256i high_a = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    const __m256i high_b = _mm256_srli_epi32(_mm256_castps_si256(b), 16);
    return _mm256_castsi256_ps(_mm256_permute4x64_epi64(_mm256_packus_epi32(high_a, high_b), 0xd8));
}
typedef __m256i vi;
static inline vi vi_first(int32_t a) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(a)); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vf vi_as_vf(vi a) { return _mm256_castsi256_ps(a); }
static inline vi vf_as_vi(vf a) { return _mm256_castps_si256(a); }
static inline vf vi_to_vf(vi a) { return _mm256_cvtepi32_ps(a); }
typedef __m256i vb;
#define VB_LEN 16
#define VB_OF_LANE 2
static inline vb vb_load_unsigned(const uint8_t *p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
}
static inline vb vb_load_signed(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
static inline vi vi_dot(vi sum, vb a, vb b) { /* with intrinsics, gcc 12 multiplies first and spills the sums */
    vi products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "xm"(b));
    return sum;
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
static inline vf vf_load_half(const uint16_t *p) { /* fp16 fields at the places of fp32: x * 2^-112 */
    const __m128i h = _mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i *)p), _mm_setzero_si128());
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi32(0x8000)), 16);
    const __m128i rest = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi32(0x7fff)), 13);
    const vf x = _mm_mul_ps(_mm_castsi128_ps(rest), vf_set1(0x1p112f));
    /* infinity and NaN, which became 2^16 and more, get float's largest exponent */
    const vf beyond = _mm_and_ps(_mm_cmpge_ps(x, vf_set1(0x1p16f)), vf_set1(INFINITY));
    return _mm_or_ps(_mm_or_ps(x, beyond), _mm_castsi128_ps(sign));
}
static inline vf vf_load_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    const __m128i x = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(x, x);
    return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
}
static inline vf vf_upper_halves(vf a, vf b) {
    const __m128i high_a = _mm_srai_epi32(_mm_castps_si128(a), 16), high_b = _mm_srai_epi32(_mm_castps_si128(b), 16);
    return _mm_castsi128_ps(_mm_packs_epi32(high_a, high_b));
}
typedef __m128i vi;
static inline vi vi_first(int32_t a) { return _mm_cvtsi32_si128(a); }
static inline vi vi_add(vi a, vi b) { return _mm_add_epi32(a, b); }
static inline vf vi_as_vf(vi a) { return _mm_castsi128_ps(a); }
static inline vi vf_as_vi(vf a) { return _mm_castps_si128(a); }
static inline vf vi_to_vf(vi a) { return _mm_cvtepi32_ps(a); }
typedef __m128i vb;
#define VB_LEN 8
#define VB_OF_LANE 2
static inline vb vb_load_unsigned(const uint8_t *p) {
    return _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *)p), _mm_setzero_si128());
}
static inline vb vb_load_signed(const int8_t *p) {
    const __m128i x = _mm_loadl_epi64((const __m128i *)p);
    return _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8);
}
static inline vi vi_dot(vi sum, vb a, vb b) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
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
static inline vf vf_load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void vf_store_half(uint16_t *p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
static inline vf vf_load_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
static inline vf vf_upper_halves(vf a, vf b) {
    const uint16x4_t high_a = vshrn_n_u32(vreinterpretq_u32_f32(a), 16);
    const uint16x4_t high_b = vshrn_n_u32(vreinterpretq_u32_f32(b), 16);
    return vreinterpretq_f32_u16(vcombine_u16(high_a, high_b));
}
typedef int32x4_t vi;
static inline vi vi_first(int32_t a) { return vsetq_lane_s32(a, vdupq_n_s32(0), 0); }
static inline vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
static inline vf vi_as_vf(vi a) { return vreinterpretq_f32_s32(a); }
static inline vi vf_as_vi(vf a) { return vreinterpretq_s32_f32(a); }
static inline vf vi_to_vf(vi a) { return vcvtq_f32_s32(a); }
typedef int16x8_t vb;
#define VB_LEN 8
static inline vb vb_load_unsigned(const uint8_t *p) { return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))); }
static inline vb vb_load_signed(const int8_t *p) { return vmovl_s8(vld1_s8(p)); }
static inline vi vi_dot(vi sum, vb a, vb b) {
    return vmlal_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), vget_high_s16(a), vget_high_s16(b));
}
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
static inline vf vf_load_half(const uint16_t *p) { /* fp16 fields at the places of fp32: x * 2^-112 */
    const uint32_t rest = (uint32_t)(*p & 0x7fff) << 13;
    float x;
    memcpy(&x, &rest, 4);
    x *= 0x1p112f;
    if (x >= 0x1p16f) x = *p & 0x3ff ? NAN : INFINITY;
    return *p & 0x8000 ? -x : x;
}
static inline vf vf_load_bytes(const int8_t *p) { return *p; }
static inline vf vf_upper_halves(vf a, vf b) {
    uint32_t lower, upper;
    memcpy(&lower, &a, 4);
    memcpy(&upper, &b, 4);
    lower = lower >> 16 | (upper & 0xffff0000);
    memcpy(&a, &lower, 4);
    return a;
}
typedef int32_t vi;
static inline vi vi_first(int32_t a) { return a; }
static inline vi vi_add(vi a, vi b) { return a + b; }
static inline vf vi_to_vf(vi a) { return (float)a; }
static inline vf vi_as_vf(vi a) {
    float x;
    memcpy(&x, &a, 4);
    return x;
}
static inline vi vf_as_vi(vf a) {
    int32_t x;
    memcpy(&x, &a, 4);
    return x;
}
typedef int32_t vb;
#define VB_LEN 1
static inline vb vb_load_unsigned(const uint8_t *p) { return *p; }
static inline vb vb_load_signed(const int8_t *p) { return *p; }
static inline vi vi_dot(vi sum, vb a, vb b) { return sum + a * b; }
#endif

/* Write a loop over a row as for (i = 0; i < n; i += VF_LEN) with vf_load_n(p + i, n - i): the last, partial vector
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
/* Transposes rows[VF_LEN]: log2(VF_LEN) times, row i is zipped with row i + VF_LEN/2 (the perfect shuffle). */
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

/* Lane i of the result is the sum of the lanes of rows[i]. Each step zips and adds pairs of rows, which halves their
 * number, so the order of a sum is fixed. */
static inline vf vf_sums(vf rows[VF_LEN]) {
#pragma GCC unroll 4
    for (int count = VF_LEN / 2; count > 0; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            rows[i] = vf_add(vf_zip_lo(rows[i], rows[i + count]), vf_zip_hi(rows[i], rows[i + count]));
    return rows[0];
}
static inline vi vi_sums(vi rows[VF_LEN]) {
#pragma GCC unroll 4
    for (int count = VF_LEN / 2; count > 0; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            const vf a = vi_as_vf(rows[i]), b = vi_as_vf(rows[i + count]);
            rows[i] = vi_add(vf_as_vi(vf_zip_lo(a, b)), vf_as_vi(vf_zip_hi(a, b)));
        }
    return rows[0];
}
/* A number in all lanes. */
static inline vi vi_set1(int32_t a) {
    float word;
    memcpy(&word, &a, 4);
    return vf_as_vi(vf_set1(word));
}

/* ---- BF16: the upper half of a float, so 8 bits of precision and the range of float ---------------------------- */

/* Bits of a vector, and VF_LEN numbers of 16 bits; the arithmetic on them is GCC's and Clang's own. */
typedef uint32_t vf_bits __attribute__((vector_size(4 * VF_LEN)));
typedef int32_t vf_signs __attribute__((vector_size(4 * VF_LEN)));
typedef uint16_t vf_halves __attribute__((vector_size(2 * VF_LEN)));
static inline vf vf_of_bits(vf_bits bits) {
    vf x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline vf_bits vf_to_bits(vf x) {
    vf_bits bits;
    memcpy(&bits, &x, sizeof x);
    return bits;
}
static inline vf vf_abs(vf x) { return vf_of_bits(vf_to_bits(x) & 0x7fffffff); }
/* All ones where a < b; both are below 2^31. */
static inline vf_bits vf_less(vf_bits a, vf_bits b) { return (vf_bits)((vf_signs)(a - b) >> 31); }

/* A pair of BF16 numbers is 32 bits, as wide as a float: vf_transpose and all that only moves lanes works on pairs.
 *
 * vf_bf16(a, b): lane l holds numbers 2l (lower half) and 2l + 1 of the 2 VF_LEN numbers of a, then b.
 * vf_bf16_pair(a, b): lane l holds a[l] (lower half) and b[l].
 * vf_bf16_dot(sum, a, b): sum + a's upper halves * b's upper halves, then + the lower halves' products.
 * vf_to_halves(x): the numbers of x, for memory.
 *
 * As the instructions do, all of them round to nearest even, take denormals for 0 and write 0 for them. */
#if defined(__AVX512BF16__)
static inline vf vf_bf16(vf a, vf b) { return (vf)_mm512_cvtne2ps_pbh(b, a); }
static inline vf vf_bf16_pair(vf a, vf b) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
    return (vf)_mm512_permutexvar_epi16(order, (__m512i)vf_bf16(a, b)); /* number l of a, then of b */
}
static inline vf vf_bf16_dot(vf sum, vf a, vf b) { /* see vi_dot */
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
    return sum;
}
static inline vf_halves vf_to_halves(vf x) { return (vf_halves)_mm512_cvtneps_pbh(x); }
#else
/* x, or a zero of its sign where x is a denormal. */
static inline vf_bits vf_flush(vf_bits x) { return x & ~(vf_less(x & 0x7fffffff, (x & 0) + 0x00800000) >> 1); }
/* The nearest BF16 in the upper half of each lane; the lower half is 0. */
static inline vf_bits vf_to_bf16(vf x) {
    const vf_bits bits = vf_flush(vf_to_bits(x)), nan = vf_less((bits & 0) + 0x7f800000, bits & 0x7fffffff);
    const vf_bits nearest = bits + 0x7fff + (bits >> 16 & 1);
    return ((nearest & ~nan) | ((bits | 0x00400000) & nan)) & 0xffff0000;
}
static inline vf vf_bf16(vf a, vf b) { return vf_upper_halves(vf_of_bits(vf_to_bf16(a)), vf_of_bits(vf_to_bf16(b))); }
static inline vf vf_bf16_pair(vf a, vf b) { return vf_of_bits(vf_to_bf16(a) >> 16 | vf_to_bf16(b)); }
static inline vf vf_bf16_dot(vf sum, vf a, vf b) {
    const vf_bits pa = vf_to_bits(a), pb = vf_to_bits(b);
    sum = vf_fma(vf_of_bits(pa & 0xffff0000), vf_of_bits(pb & 0xffff0000), sum);
    sum = vf_fma(vf_of_bits(pa << 16), vf_of_bits(pb << 16), vf_of_bits(vf_flush(vf_to_bits(sum))));
    return vf_of_bits(vf_flush(vf_to_bits(sum)));
}
static inline vf_halves vf_to_halves(vf x) { return __builtin_convertvector(vf_to_bf16(x) >> 16, vf_halves); }
#endif

/* ---- tiles: 8 registers of 16 rows of 64 bytes ------------------------------------------------------------------- */

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_TILES
enum { SIDE = 16 }; /* rows of a tile, and lanes of 32 bits in each */
/* A thread may use tiles between these two. All eight are whole. */
static inline void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.row_bytes[i] = 64;
        shape.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}
static inline void tiles_end(void) { __asm__ volatile("tilerelease"); }
/* t, a and b are numbers of tiles, written as digits; rows in memory are `stride` bytes apart. gcc's own intrinsics do
 * not say that they read memory. */
#define tile_load(t, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"((const void *)(from)), "r"((int64_t)(stride)) : "memory")
#define tile_store(t, to, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void *)(to)), "r"((int64_t)(stride)) : "memory")
#define tile_zero(t) __asm__ volatile("tilezero %tmm" #t)
/* t += a b, of 16 x 16 floats: a has rows of 32 numbers, b 16 pairs of numbers for each column. */
#define tile_dot_bf16(t, a, b) __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #t)
/* The same of 16 x 16 sums of 32 bits: a has rows of 64 signed bytes, b four unsigned ones for each column. */
#define tile_dot_bytes(t, a, b) __asm__ volatile("tdpbsud %tmm" #b ", %tmm" #a ", %tmm" #t)
/* a has unsigned bytes, and b signed ones. */
#define tile_dot_unsigned(t, a, b) __asm__ volatile("tdpbusd %tmm" #b ", %tmm" #a ", %tmm" #t)
#else
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
#endif

/* Numbers of BF16 in memory: n of them from p on, then zeros. As floats; two rows of them, as vf_bf16_pair has them; 2
 * VF_LEN of a row, as vf_bf16 has them. vf_store_bf16_n rounds. */
#if VF_LEN == 16
static inline __mmask32 vf_halves_mask(int64_t n) { return n < 32 ? (1u << n) - 1 : 0xffffffffu; }
static inline vf_bits vf_load_halves_n(const uint16_t *p, int64_t n) {
    return (vf_bits)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)vf_halves_mask(n), p));
}
static inline vf vf_load_bf16_row_n(const uint16_t *p, int64_t n) {
    return (vf)_mm512_maskz_loadu_epi16(vf_halves_mask(n), p);
}
static inline void vf_store_bf16_n(uint16_t *p, vf x, int64_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)vf_halves_mask(n), (__m256i)vf_to_halves(x));
}
#else
static inline vf_bits vf_load_halves_n(const uint16_t *p, int64_t n) {
    vf_halves x = {0};
    if (n >= VF_LEN)
        memcpy(&x, p, sizeof x);
    else
        memcpy(&x, p, (size_t)n * sizeof(uint16_t));
    return __builtin_convertvector(x, vf_bits);
}
static inline vf vf_load_bf16_row_n(const uint16_t *p, int64_t n) {
    vf x = vf_set1(0.0f);
    if (n >= 2 * VF_LEN)
        memcpy(&x, p, sizeof x);
    else
        memcpy(&x, p, (size_t)n * sizeof(uint16_t));
    return x;
}
static inline void vf_store_bf16_n(uint16_t *p, vf x, int64_t n) {
    const vf_halves halves = vf_to_halves(x);
    if (n >= VF_LEN)
        memcpy(p, &halves, sizeof halves);
    else
        memcpy(p, &halves, (size_t)n * sizeof(uint16_t));
}
#endif
static inline vf vf_load_bf16_n(const uint16_t *p, int64_t n) { return vf_of_bits(vf_load_halves_n(p, n) << 16); }
static inline vf vf_load_bf16_pair_n(const uint16_t *a, const uint16_t *b, int64_t n) {
    return vf_of_bits(vf_load_halves_n(a, n) | vf_load_halves_n(b, n) << 16);
}

#if !defined(__F16C__) && !defined(__ARM_NEON)
/* The IEEE half nearest to x, of two the even one. */
static inline uint16_t half_of(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);  /* NaN */
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* from 65520 on: infinity */
    if (bits >= 0x38800000) return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
    memcpy(&x, &bits, 4); /* denormals are multiples of 2^-24, to which adding 0.5 rounds */
    x += 0.5f;
    memcpy(&bits, &x, 4);
    return (uint16_t)(sign | (bits - 0x3f000000));
}
static inline void vf_store_half(uint16_t *p, vf x) {
    float lanes[VF_LEN];
    vf_store(lanes, x);
    for (int i = 0; i < VF_LEN; i++) p[i] = half_of(lanes[i]);
}
#endif

/* The first n numbers from p, then zeros: for the end of a row. */
static inline vf vf_load_half_n(const uint16_t *p, int64_t n) {
    uint16_t lanes[VF_LEN] = {0};
    if (n >= VF_LEN) return vf_load_half(p);
    memcpy(lanes, p, (size_t)n * sizeof(uint16_t));
    return vf_load_half(lanes);
}
static inline vf vf_load_bytes_n(const int8_t *p, int64_t n) {
    int8_t lanes[VF_LEN] = {0};
    if (n >= VF_LEN) return vf_load_bytes(p);
    memcpy(lanes, p, (size_t)n);
    return vf_load_bytes(lanes);
}
/* Writes the first n numbers only. */
static inline void vf_store_half_n(uint16_t *p, vf x, int64_t n) {
    uint16_t lanes[VF_LEN];
    vf_store_half(lanes, x);
    memcpy(p, lanes, (size_t)(n < VF_LEN ? n : VF_LEN) * sizeof(uint16_t));
}

/* ---- vh: a vector of halves, numbers of FP16 with 11 bits of precision ------------------------------------------- */

/* half is such a number in memory. vh_fma(a, b, c) is a * b + c, rounded once, to nearest even; denormals are numbers.
 * vh_part(x, i) gives lanes i * VF_LEN to (i + 1) * VF_LEN of the VH_PARTS * VF_LEN lanes as floats. vh_store_n rounds
 * n floats, below 65520 or infinite.
 *
 * Without the instructions of AVX512-FP16 a half is a float that has such a number, and the results are the same. */
#if defined(__AVX512FP16__)
typedef __m512h vh;
typedef _Float16 half;
#define VH_PARTS 2
static inline vh vh_zero(void) { return _mm512_setzero_ph(); }
static inline vh vh_set1(half a) { return _mm512_set1_ph(a); }
static inline vh vh_load(const half *p) { return _mm512_loadu_ph(p); }
static inline vh vh_fma(vh a, vh b, vh c) { return _mm512_fmadd_ph(a, b, c); }
static inline vf vh_part(vh x, const int i) {
    const __m512i bits = _mm512_castph_si512(x);
    return _mm512_cvtph_ps(i ? _mm512_extracti64x4_epi64(bits, 1) : _mm512_castsi512_si256(bits));
}
static inline void vh_store_n(half *p, vf x, int64_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)vf_halves_mask(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
typedef vf vh;
typedef float half;
#define VH_PARTS 1
static inline vh vh_zero(void) { return vf_set1(0.0f); }
static inline vh vh_set1(half a) { return vf_set1(a); }
static inline vh vh_load(const half *p) { return vf_load(p); }
static inline vf vh_part(vh x, const int i) { return (void)i, x; }
static inline vf vf_to_half(vf x) {
    const vf_bits bits = vf_to_bits(x), finite = vf_less(bits & 0x7fffffff, (bits & 0) + 0x7f800000);
    const vf_bits nearest = (bits + (finite & (0xfff + (bits >> 13 & 1)))) & 0xffffe000;
    const vf magic = vf_set1(0.75f); /* sums with it are multiples of 2^-24, as denormals are */
    const vf_bits denormal = vf_to_bits(vf_sub(vf_add(x, magic), magic));
    const vf_bits small = vf_less(bits & 0x7fffffff, (bits & 0) + 0x38800000); /* below 2^-14 */
    return vf_of_bits((denormal & small) | (nearest & ~small));
}
/* The product is exact and the sum is rounded to odd, which keeps what the second rounding must know (Boldo and
 * Melquiond 2008): where the sum is not exact, the float next to it towards 0, with its last bit set. */
static inline vh vh_fma(vh a, vh b, vh c) {
    const vf product = vf_mul(a, b), sum = vf_add(c, product), added = vf_sub(sum, c);
    const vf_bits error = vf_to_bits(vf_add(vf_sub(c, vf_sub(sum, added)), vf_sub(product, added)));
    const vf_bits bits = vf_to_bits(sum), finite = vf_less(bits & 0x7fffffff, (bits & 0) + 0x7f800000);
    const vf_bits inexact = finite & vf_less(bits & 0, error & 0x7fffffff);
    const vf_bits too_large = (vf_bits)((vf_signs)(bits ^ error) >> 31);
    return vf_to_half(vf_of_bits((bits + (inexact & too_large)) | (inexact & 1)));
}
static inline void vh_store_n(half *p, vf x, int64_t n) { vf_store_n(p, vf_to_half(x), n); }
#endif

static inline vb vb_load_unsigned_n(const uint8_t *p, int64_t n) {
    uint8_t bytes[VB_LEN] = {0};
    if (n >= VB_LEN) return vb_load_unsigned(p);
    memcpy(bytes, p, (size_t)n);
    return vb_load_unsigned(bytes);
}
static inline vb vb_load_signed_n(const int8_t *p, int64_t n) {
    int8_t bytes[VB_LEN] = {0};
    if (n >= VB_LEN) return vb_load_signed(p);
    memcpy(bytes, p, (size_t)n);
    return vb_load_signed(bytes);
}

/* x as if it were computed here: the compiler does not take a product of it from before. */
static inline vb vb_forget(vb x) {
#if VF_LEN > 1 && defined(__SSE2__)
    __asm__("" : "+x"(x));
#elif VF_LEN > 1
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+r"(x));
#endif
    return x;
}

#endif
