/* out (N,OC) = layer(x (N,C)) for few rows on the tiles of AMX: linear_columns() of linear.c where a CPU has them, with
 * products of BF16, or of bytes for an INT8 layer.
 *
 * Memory limits the speed here, so weights are the left operand: 16 rows of a weight are 16 rows of a tile, and no
 * weight is transposed (compare tiles.c). Weights of 8 bits are tiles where they lie. Others are rounded to BF16 on
 * their way, into a ring of tiles. The right operand is x, whose words each thread transposes for itself: it is small.
 * A tile of sums has 16 columns of out in its rows and 16 rows of x in its columns; up to four of them use a tile of
 * weights, one after the other. An output is one chain of sums along C, whatever the number of rows, so a row gets the
 * same bits alone and with others. */

#include "internal.h"

#ifdef HAS_TILES

enum {
    WORD_PAIR = 2,                 /* numbers of BF16 in a word of 32 bits */
    WORD_BYTES = 4,                /* numbers of 8 bits in it */
    ROW_BYTES = WORD_BYTES * SIDE, /* bytes of a row of a tile, and so of a cache line */
    GROUPS = 4,                    /* of SIDE rows of x that one tile of weights is multiplied by */
    INT8_LEAST = 12                /* rows: for fewer, linear.c is as fast, and adds up the same integers */
};

static int64_t numbers_of_word(const int type) { return type == INT8 ? WORD_BYTES : WORD_PAIR; }

/* The words of a row of x, and of the zeros that fill its last tile. */
static int64_t words_of_row(int64_t C, const int type) { return round_up(ceil_div(C, numbers_of_word(type)), SIDE); }

int64_t input_size(int64_t N, int64_t C) { return round_up(N, SIDE) * words_of_row(C, FP16); }

Input input_of(const Linear *layer, const void *x, int memory, const Quantized *bytes, int precision, float *words,
               int64_t N) {
    const int64_t C = layer->C, row = words_of_row(C, layer->type), used = ceil_div(C, numbers_of_word(layer->type));
    const Input in_place = {x, bytes, NULL}, on_tiles = {NULL, bytes, words};
    if (layer->type == INT8 ? N < INT8_LEAST || C % WORD_BYTES > 0 : precision != BF16) return in_place;
    for (int64_t i = 0; i < N; i += SIDE, words += row * SIDE) { /* (row,SIDE): a word of each of SIDE rows */
        if (layer->type == INT8)                                 /* a word is moved as one float */
            transpose(words, SIDE, bytes->values + i * bytes->stride, bytes->stride / WORD_BYTES, N - i, used, SIDE,
                      FP32, FP32);
        else if (memory == BF16)
            transpose(words, SIDE, element(x, i * C, BF16), C, N - i, C, SIDE, BF16, BF16);
        else
            transpose(words, SIDE, element(x, i * C, FP32), C, N - i, C, SIDE, BF16, FP32);
        memset(words + used * SIDE, 0, (size_t)((row - used) * SIDE) * sizeof(float));
    }
    return on_tiles;
}

/* tile (SIDE,SIDE words) = numbers of `rows` rows of weight, from (j, c) on; the rest is 0. Prefetches SIDE rows of a
 * tile from `ahead` on, unless it is NULL. */
static inline __attribute__((always_inline)) void make_tile(float *tile, const Linear *layer, int64_t j, int64_t c,
                                                            int64_t rows, const char *ahead, const int type) {
    const int64_t stride = layer->C * bytes_of(type), left = layer->C - c;
    const char *from = (const char *)layer->weight + j * stride + c * bytes_of(type);
    for (int64_t o = 0; o < SIDE; o++, from += stride, tile += SIDE) {
        for (int64_t line = 0; ahead && line < (type == FP32 ? 2 : 1); line++, ahead += ROW_BYTES)
            __builtin_prefetch(ahead, 0, 2);
        if (o >= rows)
            vf_store(tile, vf_set1(0.0f));
        else if (type == INT8) {
            memset(tile, 0, ROW_BYTES);
            memcpy(tile, from, (size_t)min64(ROW_BYTES, left));
        } else
            vf_store(tile, load_lanes(from, left, BF16, type));
    }
}

/* sums[t] += tile 4 times tile x. */
#define MULTIPLY(t, x, type)            \
    do {                                \
        if (type == INT8)               \
            tile_dot_unsigned(t, 4, x); \
        else                            \
            tile_dot_bf16(t, 4, x);     \
    } while (0)

/* sums (groups,SIDE,SIDE) = SIDE rows of weight from row j on times `groups` groups of rows of x. Tiles in the ring are
 * made some steps before they are read, because a tile waits for the stores of what it reads. The next rows of weight
 * come into the second-level cache meanwhile, the `first` time that these are read. */
static inline __attribute__((always_inline)) void multiply_rows(float sums[GROUPS][SIDE * SIDE], const Linear *layer,
                                                                int64_t j, const float *words, const int64_t groups,
                                                                const int first, const int type) {
    enum { LATER = 2, RING = 2 * LATER };
    float ring[RING][SIDE * SIDE];
    const int64_t C = layer->C, numbers = SIDE * numbers_of_word(type), steps = ceil_div(C, numbers);
    const int64_t rows = min64(SIDE, layer->OC - j), group = words_of_row(C, type) * SIDE;
    const int64_t in_place = type == INT8 && rows == SIDE ? C / numbers : 0; /* steps whose tile is the weight itself */
    const char *weight = (const char *)layer->weight + j * C * bytes_of(type);
    const char *ahead = weight + SIDE * C * bytes_of(type);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int64_t step = 0; step < steps + LATER; step++, ahead += SIDE * numbers * bytes_of(type)) {
        const int64_t s = step - LATER;
        if (step < steps && step >= in_place)
            make_tile(ring[step % RING], layer, j, step * numbers, rows, first ? ahead : NULL, type);
        else if (step < steps && first)
            for (int64_t i = 0; i < SIDE; i++) __builtin_prefetch(ahead + i * ROW_BYTES, 0, 2);
        if (s < 0) continue;
        const float *x = words + s * SIDE * SIDE;
        if (s < in_place)
            tile_load(4, weight + s * numbers, C);
        else
            tile_load(4, ring[s % RING], ROW_BYTES);
        tile_load(5, x, ROW_BYTES);
        MULTIPLY(0, 5, type);
        if (groups > 1) {
            tile_load(6, x + group, ROW_BYTES);
            MULTIPLY(1, 6, type);
        }
        if (groups > 2) {
            tile_load(7, x + 2 * group, ROW_BYTES);
            MULTIPLY(2, 7, type);
        }
        if (groups > 3) {
            tile_load(5, x + 3 * group, ROW_BYTES);
            MULTIPLY(3, 5, type);
        }
    }
    tile_store(0, sums[0], ROW_BYTES);
    if (groups > 1) tile_store(1, sums[1], ROW_BYTES);
    if (groups > 2) tile_store(2, sums[2], ROW_BYTES);
    if (groups > 3) tile_store(3, sums[3], ROW_BYTES);
}

/* Up to SIDE rows and columns of out, from row i and column j on, of sums (SIDE columns,SIDE rows): scales those of
 * bytes, adds the bias and, if `accumulate`, the old out. */
static inline __attribute__((always_inline)) void store_sums(float *out, const Linear *layer, const Quantized *bytes,
                                                             const float *sums, int64_t i, int64_t j, int64_t rows,
                                                             int64_t columns, int accumulate, const int type) {
    vf lines[SIDE];
    for (int o = 0; o < SIDE; o++) lines[o] = vf_load(sums + o * SIDE);
    vf_transpose(lines);
    for (int64_t r = 0; r < rows; r++) {
        float *to = out + (i + r) * layer->OC + j;
        vf y = lines[r];
        if (type == INT8) { /* takes 128 off each byte */
            const vi whole = vi_add(vf_as_vi(y), vi_set1(-128 * bytes->sums[i + r]));
            y = vf_mul(vi_to_vf(whole), vf_mul(vf_set1(bytes->scales[i + r]), vf_load_n(layer->scale + j, columns)));
        }
        if (layer->bias) y = vf_add(y, vf_load_n(layer->bias + j, columns));
        vf_store_n(to, accumulate ? vf_add(vf_load_n(to, columns), y) : y, columns);
    }
}

static inline __attribute__((always_inline)) void columns_of_type(float *out, const Linear *layer, const Input *x,
                                                                  int64_t N, int64_t from, int64_t to, int accumulate,
                                                                  const int type) {
    float sums[GROUPS][SIDE * SIDE];
    for (int64_t j = from; j < to; j += SIDE)
        for (int64_t i = 0; i < N; i += GROUPS * SIDE) {
            const int64_t groups = min64(GROUPS, ceil_div(N - i, SIDE));
            const float *words = x->words + i * words_of_row(layer->C, type);
            if (groups == 1)
                multiply_rows(sums, layer, j, words, 1, i == 0, type);
            else
                multiply_rows(sums, layer, j, words, groups, i == 0, type);
            for (int64_t g = 0; g < groups; g++)
                store_sums(out, layer, x->bytes, sums[g], i + g * SIDE, j, min64(SIDE, N - i - g * SIDE),
                           min64(SIDE, to - j), accumulate, type);
        }
}

void columns_on_tiles(float *out, const Linear *layer, const Input *x, int64_t N, int64_t from, int64_t to,
                      int accumulate) {
    if (layer->type == INT8)
        columns_of_type(out, layer, x, N, from, to, accumulate, INT8);
    else if (layer->type == FP16)
        columns_of_type(out, layer, x, N, from, to, accumulate, FP16);
    else
        columns_of_type(out, layer, x, N, from, to, accumulate, FP32);
}

#endif
