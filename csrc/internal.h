/* Functions that kernel files share and Python does not see: transposition, matrix products, single rows of ops. */

#ifndef INTERNAL_H
#define INTERNAL_H

#include "gpt2c.h"
#include "simd.h"
#include "team.h"

enum {
    LINE = 16,              /* floats of a cache line */
    WAKE_PRODUCTS = 1 << 20 /* multiply-adds of floats that count as a task where threads must be woken */
};

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* An array that is a factor of products holds floats or, in a training step in BF16, these: its type is FP32 or BF16.
 * Below, `memory` is such a type, and `i` the number of an element. */
static inline const void *element(const void *x, int64_t i, const int memory) {
    return (const char *)x + i * (memory == FP32 ? 4 : 2);
}
static inline void *element_to(void *x, int64_t i, const int memory) {
    return (char *)x + i * (memory == BF16 ? 2 : 4);
}
static inline vf load_n(const void *x, int64_t i, int64_t n, const int memory) {
    return memory == BF16 ? vf_load_bf16_n((const uint16_t *)x + i, n) : vf_load_n((const float *)x + i, n);
}
static inline void store_n(void *out, int64_t i, vf x, int64_t n, const int memory) {
    if (memory == BF16)
        vf_store_bf16_n((uint16_t *)out + i, x, n);
    else
        vf_store_n((float *)out + i, x, n);
}

/* Numbers of a row that one 32-bit lane holds in products of this type. */
static inline int64_t numbers_of_lane(const int type) { return type == BF16 ? 2 : 1; }

/* The first n numbers of a row, then zeros, in VF_LEN lanes. */
static inline vf load_lanes(const void *row, int64_t n, const int type, const int memory) {
    if (memory == BF16) return vf_load_bf16_row_n(row, n);
    if (memory == FP16) {
        const vf second = n > VF_LEN ? vf_load_half_n((const uint16_t *)row + VF_LEN, n - VF_LEN) : vf_set1(0.0f);
        return vf_bf16(vf_load_half_n(row, n), second);
    }
    const vf first = vf_load_n(row, n);
    if (type != BF16) return first;
    return vf_bf16(first, n > VF_LEN ? vf_load_n((const float *)row + VF_LEN, n - VF_LEN) : vf_set1(0.0f));
}

/* Lanes of two rows in products of BF16: n numbers of `first` and, unless it is NULL, of `second`. */
static inline vf load_pair(const void *first, const void *second, int64_t n, const int memory) {
    if (memory == BF16) return second ? vf_load_bf16_pair_n(first, second, n) : vf_of_bits(vf_load_halves_n(first, n));
    return vf_bf16_pair(vf_load_n(first, n), second ? vf_load_n(second, n) : vf_set1(0.0f));
}

/* sum + a * b, or, of lanes that hold two numbers, + both products. */
static inline vf multiply_lanes(vf a, vf b, vf sum, const int type) {
    return type == BF16 ? vf_bf16_dot(sum, a, b) : vf_fma(a, b, sum);
}

/* to[c * to_stride + r] = lane c of row r for r < rows, c < lanes; 0 for rows <= r < width. Row r starts at
 * from[r * from_stride] and has `columns` numbers. */
static inline __attribute__((always_inline)) void transpose(float *restrict to, int64_t to_stride,
                                                            const void *restrict from, int64_t from_stride,
                                                            int64_t rows, int64_t columns, const int64_t width,
                                                            const int type, const int memory) {
    const int64_t each = numbers_of_lane(type), lanes = ceil_div(columns, each);
    for (int64_t r = 0; r < width; r += VF_LEN)
        for (int64_t c = 0; c < lanes; c += VF_LEN) {
            vf block[VF_LEN];
            for (int64_t i = 0; i < VF_LEN; i++)
                block[i] = r + i < rows ? load_lanes(element(from, (r + i) * from_stride + c * each, memory),
                                                     columns - c * each, type, memory)
                                        : vf_set1(0.0f);
            vf_transpose(block);
            for (int64_t i = 0; i < min64(VF_LEN, lanes - c); i++)
                vf_store_n(to + (c + i) * to_stride + r, block[i], width - r);
        }
}

/* The sequences of a batch: B of T rows or, with offsets (S), S - 1 of their own lengths in one row of T. */
typedef struct {
    const int32_t *offsets;
    int64_t B, T, S;
} Sequences;
static inline int64_t sequence_count(Sequences all) { return all.offsets ? all.S - 1 : all.B; }
static inline int64_t sequence_at(Sequences all, int64_t s) { return all.offsets ? all.offsets[s] : s * all.T; }
static inline int64_t sequence_length(Sequences all, int64_t s) {
    return all.offsets ? all.offsets[s + 1] - all.offsets[s] : all.T;
}

/* The first row of the sequence that `row` belongs to. */
static inline int64_t sequence_start(Sequences all, int64_t row) {
    if (!all.offsets) return row - row % all.T;
    int64_t low = 0, high = all.S - 1; /* offsets[low] <= row < offsets[high] */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (all.offsets[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return all.offsets[low];
}

/* An operand of a matrix product: element (i, k), where k is summed over, is data[i * row_stride + k * k_stride]. One
 * of the strides is 1; exchanging them transposes the operand. Its memory is BF16 only where the products are, and FP16
 * only on tiles. */
typedef struct {
    const void *data;
    int64_t row_stride, k_stride;
    int memory;
} Operand;

/* x from this row and this k on. */
static inline Operand operand_from(Operand x, int64_t row, int64_t k) {
    x.data = element(x.data, row * x.row_stride + k * x.k_stride, x.memory);
    return x;
}

enum { HALF_BLOCK = 64 }; /* products of FP16 that are added in FP16, before their sum is added in float */

/* c[i*ldc + j] (M x N) = sum over k of a(i,k) b(j,k), plus bias[j] if not NULL, or plus the old c if `accumulate`. The
 * products are of floats, or of the BF16 or FP16 numbers nearest to them. */
void gemm(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int precision, int64_t M,
          int64_t N, int64_t K, float *scratch, Team *team);
/* gemm() in BF16 where HAS_TILES is defined. It writes a c of BF16, too, if K is at most tiles_depth() and it does not
 * accumulate. */
void gemm_in_tiles(void *c, int c_type, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M,
                   int64_t N, int64_t K, float *scratch, Team *team);
int64_t tiles_scratch_size(int threads);
/* Floats of scratch memory of gemm() in this precision. */
static inline int64_t products_scratch_size(const int precision, int threads) {
#ifdef HAS_TILES
    if (precision == BF16) return tiles_scratch_size(threads);
#endif
    return (void)precision, gemm_scratch_size(threads);
}
int64_t tiles_depth(void);

/* Whether a product of a block of attention goes through product_on_tiles(): c (m x n) (+)= left (m x depth) b (depth x
 * n), of pairs of BF16; m and depth are rounded up to 16 and n is a multiple of 16; what left and b hold in the added
 * lanes are zeros. k_stride of left is 1. */
#ifdef HAS_TILES
static inline int on_tiles(const int type) { return type == BF16; }
void product_on_tiles(float *c, int64_t ldc, Operand left, const float *b, int64_t ldb, int64_t m, int64_t n,
                      int64_t depth, int accumulate);
#else
static inline int on_tiles(const int type) { return (void)type, 0; }
static inline void product_on_tiles(float *c, int64_t ldc, Operand left, const float *b, int64_t ldb, int64_t m,
                                    int64_t n, int64_t depth, int accumulate) {
    (void)c, (void)ldc, (void)left, (void)b, (void)ldb, (void)m, (void)n, (void)depth, (void)accumulate;
}
#endif
int64_t gemm_rows(void); /* of C in a block: those that a packed part of B serves */

/* A row of encoder_forward: out (C) = the token's row of wte + its position's row of wpe, unless that is NULL. */
void embed_row(float *out, const Linear *wte, const float *position, int32_t token);

/* A row of a norm, elements [from, to) of an activation, a head of rope_forward (direction 1) or _backward (-1) at the
 * row of its position in cos and sin. */
void layernorm_row(void *out, float *mean, float *rstd, const float *row, const float *weight, const float *bias,
                   float eps, int out_type, int64_t C);
void rmsnorm_row(void *out, float *rstd, const float *row, const float *weight, float eps, int out_type, int64_t C);
void gelu_part(float *out, const float *x, int64_t from, int64_t to);
void swiglu_part(float *out, const float *gate, const float *up, int64_t from, int64_t to);
void rope_head(float *out, const float *x, const float *cos, const float *sin, float direction, int64_t D);

/* Rounds x (C) to 8 bits and returns their scale: x = scale * to, -127 <= to <= 127; *sum is the sum of `to`. NaN or
 * infinity in x makes the scale NaN. */
float quantize(int8_t *to, int32_t *sum, const float *x, int64_t C);

/* Rows quantized to 8 bits: row i is scales[i] * values[i * stride ...], and sums[i] is the sum of its values. */
typedef struct {
    float *scales;
    int32_t *sums;
    int8_t *values;
    int64_t stride;
} Quantized;

/* Floats of memory that N quantized rows of C channels need, and such rows in that memory. */
int64_t quantized_size(int64_t N, int64_t C);
Quantized quantized_in(float *memory, int64_t N, int64_t C);

/* Quantizes x (C) into row i of q. */
void quantize_row(Quantized q, const float *x, int64_t i, int64_t C);

/* Bytes of a number of this type. */
static inline int64_t bytes_of(const int type) { return type == INT8 || type == SIGNED8 ? 1 : type == FP16 ? 2 : 4; }

/* n numbers of type FP32, FP16 or SIGNED8, without its scale, from number i on; then zeros. */
static inline __attribute__((always_inline)) vf load_numbers(const void *numbers, int64_t i, int64_t n,
                                                             const int type) {
    if (type == FP16) return vf_load_half_n((const uint16_t *)numbers + i, n);
    if (type == SIGNED8) return vf_load_bytes_n((const int8_t *)numbers + i, n);
    return vf_load_n((const float *)numbers + i, n);
}

/* Keys or values of one head: row i begins at number i * stride, and has a scale where the type is SIGNED8. */
typedef struct {
    const void *numbers;
    const float *scales;
    int64_t stride;
    int type;
} Rows;

/* The rows of a cache (rows of HS) from row number `row` on. */
static inline Rows cached_rows(const void *cache, const float *scales, int64_t row, int64_t HS, int type) {
    return (Rows){(const char *)cache + row * HS * bytes_of(type), scales ? scales + row : NULL, HS, type};
}

/* Row number `row` of a cache (rows of HS) = x (HS), rounded to the cache's type. x is FP32 or BF16 in memory, and FP32
 * for a cache of SIGNED8. */
void store_cached(void *cache, float *scales, int64_t row, const void *x, int64_t HS, int type, int memory);

/* The rows of x (N,C) as the products of a layer read them: floats; what quantize_row() makes of them, for an INT8
 * layer; and words of 32 bits, for products of BF16 and all that are on tiles, else NULL. */
typedef struct {
    const float *floats;
    const Quantized *bytes;
    const float *words;
} Input;

/* The input of a layer: words where its products are of BF16 or on tiles, and then floats is NULL; else floats. A
 * thread has `words` (input_size at most) for itself; it is between tiles_begin() and tiles_end() when it uses them.
 * `bytes` is NULL unless the layer is INT8. */
Input input_of(const Linear *layer, const void *x, int memory, const Quantized *bytes, int precision, float *words,
               int64_t N);
int64_t input_size(int64_t N, int64_t C);

/* Columns [from, to) of out (N,OC) = layer(x), added to out if `accumulate`. `from` is a multiple of VF_LEN. A layer of
 * SIGNED8 is a cache, whose rows multiply floats. One thread does all of it: threads call it for different columns. */
void linear_columns(float *out, const Linear *layer, const Input *x, int64_t N, int64_t from, int64_t to,
                    int accumulate);

#ifdef HAS_TILES
/* linear_columns() of words. */
void columns_on_tiles(float *out, const Linear *layer, const Input *x, int64_t N, int64_t from, int64_t to,
                      int accumulate);
#endif

/* The layer that computes columns [from, to) of `layer`'s output. */
Linear linear_rows_of(const Linear *layer, int64_t from, int64_t to);

/* out (N,OC) = layer(x (N,C)) for few rows, or with INT8 for any number; `memory` is the type of x. */
void linear_rows(float *out, const Linear *layer, const void *x, int memory, int precision, float *scratch, int64_t N,
                 Team *team);
int64_t linear_scratch_size(int64_t N, int64_t C, int type, int threads);

enum { FEW_ROWS = 16 }; /* up to this N, reading the weights takes longer than the arithmetic */

#endif
