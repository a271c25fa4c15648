/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC) for few rows, with weights in FP32, FP16 or INT8, and products of
 * floats or, of the first two, of BF16.
 *
 * With few rows memory limits the speed: each weight is read once for few products, and smaller weights are faster. So
 * weights are read in place, row by row, for all rows of x at once. A tile is some rows of weight times one or four
 * rows of x. Each pair of rows has a vector of partial sums; all vectors of a tile are reduced together. The order of a
 * sum does not depend on the tile: a row of x gets the same bits alone and with others. Threads share the columns of
 * out and blocks of TASK_ROWS rows.
 *
 * INT8: weight = scale * (byte - 128), with a scale for each row. A row of x is quantized to 8 bits too, with its own
 * scale (dynamic quantization, as in Dettmers et al. 2022, arXiv:2208.07339, but without separate outliers). Sums of
 * products are then integers, exact and equal on every instruction set:
 * sum((byte - 128) x8) = sum(byte x8) - 128 sum(x8).
 *
 * BF16: the words of x are pairs of its numbers (simd.h), and weights become pairs as they are read. Where a CPU has
 * tiles, linear_tiles.c does this, and the products of bytes of more than a few rows.
 *
 * With many rows arithmetic limits the speed. FP32 and FP16 then go through gemm.c (see matmul.c). INT8 stays here,
 * because one instruction does more of its products; the columns of out then lie in the lanes. */

#include "internal.h"

/* A tile is TILE_ROWS rows of x times TILE_OUTS rows of weight, VF_LEN pairs. With fewer rows of x it is one row of x
 * times VF_LEN rows of weight, SINGLE_OUTS at a time: few rows at a time fit the registers and are read nearly in
 * memory order. */
enum {
    TILE_ROWS = VF_LEN >= 4 ? 4 : 1,
    TILE_OUTS = VF_LEN / TILE_ROWS,
    SINGLE_OUTS = VF_LEN > 1 ? 2 : 1,
    MAX_OUTS = TILE_OUTS > SINGLE_OUTS ? TILE_OUTS : SINGLE_OUTS
};

/* ---- quantizing x ------------------------------------------------------------------------------------------- */

int64_t quantized_size(int64_t N, int64_t C) { return N * (ceil_div(C, 4) + 2); }

Quantized quantized_in(float *memory, int64_t N, int64_t C) {
    return (Quantized){memory, (int32_t *)(memory + N), (int8_t *)(memory + 2 * N), C};
}

float quantize(int8_t *to, int32_t *sum, const float *x, int64_t C) {
    vf highest = vf_set1(0.0f), not_finite = vf_set1(0.0f);
    for (int64_t c = 0; c < C; c += VF_LEN) {
        const vf xc = vf_load_n(x + c, C - c);
        highest = vf_max(highest, vf_max(xc, vf_sub(vf_set1(0.0f), xc)));
        not_finite = vf_fma(xc, vf_set1(0.0f), not_finite); /* NaN if x has NaN or infinity, else 0 */
    }
    const float largest = vf_hmax(highest), inverse = largest > 1e-36f ? 127.0f / largest : 0.0f; /* never infinite */
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    int32_t all = 0;
    for (int64_t c = 0; c < C; c++) {
        const float shifted = x[c] * inverse + shift;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        to[c] = (int8_t)bits;
        all += to[c];
    }
    *sum = all;
    return largest / 127.0f + vf_sum(not_finite);
}

void quantize_row(Quantized q, const float *x, int64_t i, int64_t C) {
    q.scales[i] = quantize(q.values + i * q.stride, q.sums + i, x, C);
}

/* ---- a tile ------------------------------------------------------------------------------------------------- */

/* Prefetches `vectors` vectors of the weights that follow this tile's, from `ahead` on. Each step of a tile prefetches
 * a few, so that memory stays busy. They go to the second-level cache: it has room for them, and takes more lines at a
 * time than the first. */
static inline __attribute__((always_inline)) void prefetch_weights(const char **ahead, const int vectors,
                                                                   const int type) {
    const int bytes = type == INT8 ? VB_LEN : VF_LEN * (int)bytes_of(type);
    for (int i = 0; i < vectors; i++) __builtin_prefetch(*ahead + i * bytes, 0, 2);
    *ahead += vectors * bytes;
}

/* acc[r * outs + o] += weight row o . row r of x over the n channels from c on, at most a vector of them. w[o] and
 * x + r * ldx are the rows, x of floats or of pairs of BF16. */
static inline __attribute__((always_inline)) void float_products(vf *acc, const void *const *w, const float *x,
                                                                 int64_t ldx, int64_t c, int64_t n, const int outs,
                                                                 const int rows, const int type, const int precision) {
    const int64_t each = numbers_of_lane(precision);
    vf wc[MAX_OUTS];
    for (int o = 0; o < outs; o++)
        wc[o] = precision == BF16 ? load_lanes(element(w[o], c, type), n, BF16, type) : load_numbers(w[o], c, n, type);
    for (int r = 0; r < rows; r++) {
        const vf xc = vf_load_n(x + r * ldx + c / each, ceil_div(n, each));
        for (int o = 0; o < outs; o++) acc[r * outs + o] = multiply_lanes(wc[o], xc, acc[r * outs + o], precision);
    }
}

static inline __attribute__((always_inline)) void int8_products(vi *acc, const void *const *w, const int8_t *x,
                                                                int64_t ldx, int64_t c, int64_t n, const int outs,
                                                                const int rows) {
    vb wc[MAX_OUTS];
    for (int o = 0; o < outs; o++) wc[o] = vb_load_unsigned_n((const uint8_t *)w[o] + c, n);
    for (int r = 0; r < rows; r++) {
        const vb xc = vb_load_signed_n(x + r * ldx + c, n);
        for (int o = 0; o < outs; o++) acc[r * outs + o] = vi_dot(acc[r * outs + o], wc[o], xc);
    }
}

/* Stores a tile (rows x outs, of which n columns are in out) at row i, column j of out: scales the sums of bytes, adds
 * the bias and, if `accumulate`, the old out. */
static inline __attribute__((always_inline)) void store_tile(float *out, vf sums, const Linear *layer,
                                                             const Quantized *q, int64_t i, int64_t j, const int64_t n,
                                                             int accumulate, const int rows, const int type) {
    const int outs = VF_LEN / rows;
    float lanes[VF_LEN] = {0.0f};
    if (type == INT8 || type == SIGNED8) {
        for (int r = 0; r < rows; r++)
            for (int64_t o = 0; o < n; o++)
                lanes[r * outs + o] = (type == INT8 ? q->scales[i + r] : 1.0f) * layer->scale[j + o];
        sums = vf_mul(sums, vf_load(lanes));
    }
    if (layer->bias) {
        for (int r = 0; r < rows; r++)
            for (int64_t o = 0; o < n; o++) lanes[r * outs + o] = layer->bias[j + o];
        sums = vf_add(sums, vf_load(lanes));
    }
    vf_store(lanes, sums);
    for (int r = 0; r < rows; r++) {
        float *to = out + (i + r) * layer->OC + j;
        if (accumulate)
            for (int64_t o = 0; o < n; o++) to[o] += lanes[r * outs + o];
        else
            memcpy(to, lanes + r * outs, (size_t)n * sizeof(float));
    }
}

/* w = `outs` rows of weight from row j on; rows past the last are the last. */
static inline __attribute__((always_inline)) void weight_rows(const void *w[MAX_OUTS], const Linear *layer, int64_t j,
                                                              const int outs, const int type) {
    const int64_t row_bytes = layer->C * bytes_of(type);
    for (int o = 0; o < outs; o++) w[o] = (const char *)layer->weight + min64(j + o, layer->OC - 1) * row_bytes;
}

/* acc = partial sums of outs * rows pairs, a vector for each pair. */
static inline __attribute__((always_inline)) void sum_floats(vf *acc, const Linear *layer, const float *x, int64_t ldx,
                                                             int64_t j, const char **ahead, const int vectors,
                                                             const int outs, const int rows, const int type,
                                                             const int precision) {
    const int64_t C = layer->C, step = VF_LEN * numbers_of_lane(precision);
    const void *w[MAX_OUTS];
    int64_t c = 0;
    weight_rows(w, layer, j, outs, type);
    for (int k = 0; k < outs * rows; k++) acc[k] = vf_set1(0.0f);
    for (; c + step <= C; c += step) {
        prefetch_weights(ahead, vectors * (precision == BF16 ? 2 : 1), type);
        float_products(acc, w, x, ldx, c, step, outs, rows, type, precision);
    }
    if (c < C) float_products(acc, w, x, ldx, c, C - c, outs, rows, type, precision);
}

static inline __attribute__((always_inline)) void sum_int8(vi *acc, const Linear *layer, const Quantized *q, int64_t i,
                                                           int64_t j, const char **ahead, const int vectors,
                                                           const int outs, const int rows) {
    const int64_t C = layer->C;
    const int8_t *x = q->values + i * q->stride;
    const void *w[MAX_OUTS];
    vi part[VF_LEN]; /* not acc, which bytes may alias: a compiler would store it at each step */
    int64_t c = 0;
    weight_rows(w, layer, j, outs, INT8);
    for (int r = 0; r < rows; r++) /* takes 128 off each byte */
        for (int o = 0; o < outs; o++) part[r * outs + o] = vi_first(-128 * q->sums[i + r]);
    for (; c + VB_LEN <= C; c += VB_LEN) {
        prefetch_weights(ahead, vectors, INT8);
        int8_products(part, w, x, q->stride, c, VB_LEN, outs, rows);
    }
    if (c < C) int8_products(part, w, x, q->stride, c, C - c, outs, rows);
    for (int k = 0; k < outs * rows; k++) acc[k] = part[k];
}

/* Floats of a row of x, or words of it in products of BF16. */
static inline int64_t input_stride(int64_t C, const int precision) { return ceil_div(C, numbers_of_lane(precision)); }

/* The tile at row i, column j of out: TILE_ROWS rows of x. */
static inline __attribute__((always_inline)) void multi_row_tile(float *out, const Linear *layer, const float *x,
                                                                 const Quantized *q, int64_t i, int64_t j,
                                                                 int accumulate, const char **ahead, const int vectors,
                                                                 const int type, const int precision) {
    const int64_t ldx = input_stride(layer->C, precision);
    vf sums;
    if (type == INT8) {
        vi acc[VF_LEN];
        sum_int8(acc, layer, q, i, j, ahead, vectors, TILE_OUTS, TILE_ROWS);
        sums = vi_to_vf(vi_sums(acc));
    } else {
        vf acc[VF_LEN];
        sum_floats(acc, layer, x + i * ldx, ldx, j, ahead, vectors, TILE_OUTS, TILE_ROWS, type, precision);
        sums = vf_sums(acc);
    }
    if (layer->OC - j >= TILE_OUTS)
        store_tile(out, sums, layer, q, i, j, TILE_OUTS, accumulate, TILE_ROWS, type);
    else
        store_tile(out, sums, layer, q, i, j, layer->OC - j, accumulate, TILE_ROWS, type);
}

/* The same for one row of x. */
static inline __attribute__((always_inline)) void single_row_tile(float *out, const Linear *layer, const float *x,
                                                                  const Quantized *q, int64_t i, int64_t j,
                                                                  int accumulate, const char **ahead, const int type,
                                                                  const int precision) {
    const int64_t ldx = input_stride(layer->C, precision);
    vf sums;
    if (type == INT8) {
        vi acc[VF_LEN];
        for (int o = 0; o < VF_LEN; o += SINGLE_OUTS)
            sum_int8(acc + o, layer, q, i, j + o, ahead, SINGLE_OUTS, SINGLE_OUTS, 1);
        sums = vi_to_vf(vi_sums(acc));
    } else {
        vf acc[VF_LEN];
        for (int o = 0; o < VF_LEN; o += SINGLE_OUTS)
            sum_floats(acc + o, layer, x + i * ldx, ldx, j + o, ahead, SINGLE_OUTS, SINGLE_OUTS, 1, type, precision);
        sums = vf_sums(acc);
    }
    if (layer->OC - j >= VF_LEN)
        store_tile(out, sums, layer, q, i, j, VF_LEN, accumulate, 1, type);
    else
        store_tile(out, sums, layer, q, i, j, layer->OC - j, accumulate, 1, type);
}

/* linear_columns() compiled for one type of weight and one precision; x has floats or words. */
static inline __attribute__((always_inline)) void columns_of_type(float *out, const Linear *layer, const float *x,
                                                                  const Quantized *q, int64_t N, int64_t from,
                                                                  int64_t to, int accumulate, const int type,
                                                                  const int precision) {
    const int64_t groups = TILE_ROWS > 1 ? N / TILE_ROWS : 0;
    const int64_t rows_ahead = groups > 0 ? VF_LEN / 2 : VF_LEN; /* the first level holds rows of x, too */
    for (int64_t j = from; j < to; j += VF_LEN) {
        const char *ahead = (const char *)layer->weight + (j + rows_ahead) * layer->C * bytes_of(type);
        for (int64_t k = j; k < min64(j + VF_LEN, to) && groups > 0; k += TILE_OUTS) {
            if (groups == 1)
                multi_row_tile(out, layer, x, q, 0, k, accumulate, &ahead, TILE_OUTS, type, precision);
            else
                for (int64_t i = 0; i < groups; i++)
                    if (i < 2) /* more groups would prefetch too far */
                        multi_row_tile(out, layer, x, q, i * TILE_ROWS, k, accumulate, &ahead, (TILE_OUTS + 1) / 2,
                                       type, precision);
                    else
                        multi_row_tile(out, layer, x, q, i * TILE_ROWS, k, accumulate, &ahead, 0, type, precision);
        }
        for (int64_t i = groups * TILE_ROWS; i < N; i++)
            single_row_tile(out, layer, x, q, i, j, accumulate, &ahead, type, precision);
    }
}

Linear linear_rows_of(const Linear *layer, int64_t from, int64_t to) {
    const char *weight = (const char *)layer->weight + from * layer->C * bytes_of(layer->type);
    const float *scale = layer->scale ? layer->scale + from : NULL, *bias = layer->bias ? layer->bias + from : NULL;
    return (Linear){weight, scale, bias, layer->C, to - from, layer->type};
}

#ifndef HAS_TILES
int64_t input_size(int64_t N, int64_t C) { return N * input_stride(C, BF16); }

Input input_of(const Linear *layer, const void *x, int memory, const Quantized *bytes, int precision, float *words,
               int64_t N) {
    const int64_t C = layer->C, stride = input_stride(C, BF16);
    const Input in = {x, bytes, NULL}, pairs = {NULL, bytes, words};
    if (layer->type == INT8 || precision != BF16) return in;
    for (int64_t i = 0; i < N; i++)
        for (int64_t c = 0; c < C; c += 2 * VF_LEN)
            vf_store_n(words + i * stride + c / 2, load_lanes(element(x, i * C + c, memory), C - c, BF16, memory),
                       stride - c / 2);
    return pairs;
}
#endif

void linear_columns(float *out, const Linear *layer, const Input *x, int64_t N, int64_t from, int64_t to,
                    int accumulate) {
#ifdef HAS_TILES
    if (x->words) {
        columns_on_tiles(out, layer, x, N, from, to, accumulate);
        return;
    }
#endif
    if (layer->type == INT8)
        columns_of_type(out, layer, NULL, x->bytes, N, from, to, accumulate, INT8, FP32);
    else if (layer->type == SIGNED8)
        columns_of_type(out, layer, x->floats, NULL, N, from, to, accumulate, SIGNED8, FP32);
    else if (layer->type == FP16 && x->words)
        columns_of_type(out, layer, x->words, NULL, N, from, to, accumulate, FP16, BF16);
    else if (layer->type == FP16)
        columns_of_type(out, layer, x->floats, NULL, N, from, to, accumulate, FP16, FP32);
    else if (x->words)
        columns_of_type(out, layer, x->words, NULL, N, from, to, accumulate, FP32, BF16);
    else
        columns_of_type(out, layer, x->floats, NULL, N, from, to, accumulate, FP32, FP32);
}

/* ---- many rows, INT8 ------------------------------------------------------------------------------------------ */

#ifdef VB_OF_LANE
/* With many rows of x arithmetic limits the speed, and reductions across lanes would cost as much as the products. So
 * columns of out lie in the lanes: weights are packed with four channels of each column side by side, and multiplied by
 * the same four channels of a row of x, repeated in all lanes. Four channels are a word of 32 bits, their bytes. Where
 * an instruction multiplies numbers of 16 bits they are two words, the first and third channel and the others. */
enum {
    CHANNELS = 4,
    WORDS = CHANNELS / VB_OF_LANE,
    STRIP_LEAST = WORDS > 1 ? 128 : FEW_ROWS, /* up to this N packing costs more than reductions */
    STRIP_ROWS = VF_LEN == 16 ? 8 : 6,        /* rows times vectors of sums, and some factors, fit the registers */
    STRIP_VECTORS = 2,
    STRIP_COLUMNS = STRIP_VECTORS * VF_LEN
};

#ifdef HAS_TILES
enum { PACKED_CHANNELS = 64 }; /* a row of a tile; the channels that are added are 0 in the weights */
#else
enum { PACKED_CHANNELS = CHANNELS };
#endif
static int64_t packed_size(int64_t C) { return round_up(C, PACKED_CHANNELS) / CHANNELS * WORDS * STRIP_COLUMNS; }
static int64_t words_size(int64_t N, int64_t C) { return WORDS > 1 ? N * (C / CHANNELS * WORDS) : 0; }

/* A word in all lanes. */
static inline vi repeat_word(float word) { return vf_as_vi(vf_set1(word)); }

/* words (C / 2) = a quantized row, as numbers of 16 bits. */
static void make_words(float *words, const int8_t *x, int64_t C) {
    for (int64_t c = 0; c < C; c += CHANNELS) {
        const int16_t numbers[CHANNELS] = {x[c], x[c + 2], x[c + 1], x[c + 3]};
        memcpy(words + c / CHANNELS * WORDS, numbers, sizeof numbers);
    }
}

/* packed (C / 4,WORDS,STRIP_COLUMNS) = n rows of weight (row stride C bytes). */
static void pack_strip(float *packed, const uint8_t *weight, int64_t n, int64_t C) {
    const int64_t size = C / CHANNELS * STRIP_COLUMNS;
    float *bytes = packed + (WORDS - 1) * size;
    for (int64_t v = 0; v < n; v += VF_LEN) /* a word is moved as one float */
        transpose(bytes + v, STRIP_COLUMNS, weight + v * C, C / CHANNELS, min64(VF_LEN, n - v), C / CHANNELS, VF_LEN,
                  FP32, FP32);
    for (int64_t c = 0; WORDS > 1 && c < size; c += STRIP_COLUMNS, packed += WORDS * STRIP_COLUMNS) {
        uint32_t row[STRIP_COLUMNS], split[WORDS * STRIP_COLUMNS];
        memcpy(row, bytes + c, sizeof row);
        for (int k = 0; k < STRIP_COLUMNS; k++) split[k] = row[k] & 0x00ff00ff;
        for (int k = 0; k < STRIP_COLUMNS; k++) split[(WORDS - 1) * STRIP_COLUMNS + k] = row[k] >> 8 & 0x00ff00ff;
        memcpy(packed, split, sizeof split);
    }
}

/* out (n) = a row of sums of products, scaled; column j of the layer is the first. */
static inline void store_sums(float *out, vi sums, const Linear *layer, float scale, int64_t j, int64_t n) {
    vf y = vf_mul(vi_to_vf(sums), vf_mul(vf_set1(scale), vf_load_n(layer->scale + j, n)));
    if (layer->bias) y = vf_add(y, vf_load_n(layer->bias + j, n));
    vf_store_n(out, y, n);
}

#ifdef HAS_TILES
/* Columns [j, j + n), n <= STRIP_COLUMNS, of out (N,OC), on tiles, 32 rows at a time. Rows of x are tiles where they
 * lie; what is read behind the last row is memory of `packed`, and its products are not used. */
static void multiply_strip(float *out, const Linear *layer, Quantized q, const float *x, int64_t N, int64_t j,
                           int64_t n, float *packed) {
    enum { ROWS = 2 * SIDE };
    const int64_t C = layer->C, used = C / CHANNELS * STRIP_COLUMNS, row = 4 * STRIP_COLUMNS;
    (void)x;
    pack_strip(packed, (const uint8_t *)layer->weight + j * C, n, C);
    memset(packed + used, 0, (size_t)(packed_size(C) - used) * sizeof(float));
    for (int64_t i = 0; i < N; i += ROWS) {
        const int8_t *a = q.values + i * q.stride;
        int32_t sums[ROWS][STRIP_COLUMNS];
        const float *w = packed;
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        for (int64_t c = 0; c < C; c += PACKED_CHANNELS, w += SIDE * STRIP_COLUMNS) {
            tile_load(6, w, row);
            tile_load(4, a + c, q.stride);
            tile_load(7, w + SIDE, row);
            tile_load(5, a + SIDE * q.stride + c, q.stride);
            tile_dot_bytes(0, 4, 6);
            tile_dot_bytes(1, 4, 7);
            tile_dot_bytes(2, 5, 6);
            tile_dot_bytes(3, 5, 7);
        }
        tile_store(0, sums[0], row);
        tile_store(1, sums[0] + SIDE, row);
        tile_store(2, sums[SIDE], row);
        tile_store(3, sums[SIDE] + SIDE, row);
        for (int64_t r = 0; r < min64(ROWS, N - i); r++)
            for (int64_t v = 0; v < n; v += VF_LEN) {
                const vi whole = vi_add(vf_as_vi(vf_load((const float *)sums[r] + v)), vi_set1(-128 * q.sums[i + r]));
                store_sums(out + (i + r) * layer->OC + j + v, whole, layer, q.scales[i + r], j + v, n - v);
            }
    }
}
#else
/* Columns [j, j + n), n <= STRIP_COLUMNS, of out (N,OC). C is a multiple of CHANNELS; x has the words of q, packed
 * (packed_size) is scratch. */
static void multiply_strip(float *out, const Linear *layer, Quantized q, const float *x, int64_t N, int64_t j,
                           int64_t n, float *packed) {
    const int64_t OC = layer->OC, words = layer->C / CHANNELS * WORDS;
    pack_strip(packed, (const uint8_t *)layer->weight + j * layer->C, n, layer->C);
    for (int64_t i = 0; i < N; i += STRIP_ROWS) {
        vi acc[STRIP_ROWS][STRIP_VECTORS];
        const float *row[STRIP_ROWS], *w = packed;
        for (int r = 0; r < STRIP_ROWS; r++) { /* rows past the last are the last */
            row[r] = x + min64(i + r, N - 1) * words;
            for (int v = 0; v < STRIP_VECTORS; v++) acc[r][v] = vi_set1(-128 * q.sums[min64(i + r, N - 1)]);
        }
        for (int64_t c = 0; c < words; c++, w += STRIP_COLUMNS) {
            vb wc[STRIP_VECTORS];
            for (int v = 0; v < STRIP_VECTORS; v++) wc[v] = vf_as_vi(vf_load(w + v * VF_LEN));
            for (int r = 0; r < STRIP_ROWS; r++) {
                const vb xc = repeat_word(row[r][c]);
                for (int v = 0; v < STRIP_VECTORS; v++) acc[r][v] = vi_dot(acc[r][v], wc[v], xc);
            }
        }
        for (int r = 0; r < STRIP_ROWS; r++)
            for (int v = 0; v < STRIP_VECTORS; v++) {
                const int64_t left = n - v * VF_LEN, column = j + v * VF_LEN;
                if (i + r < N && left > 0)
                    store_sums(out + (i + r) * OC + column, acc[r][v], layer, q.scales[i + r], column, left);
            }
    }
}
#endif
#else /* many rows are computed as few rows are */
enum { STRIP_COLUMNS = VF_LEN, STRIP_LEAST = FEW_ROWS, CHANNELS = 1, WORDS = 1 };
static int64_t packed_size(int64_t C) { return (void)C, 0; }
static int64_t words_size(int64_t N, int64_t C) { return (void)N, (void)C, 0; }
static void make_words(float *words, const int8_t *x, int64_t C) { (void)words, (void)x, (void)C; }
static void multiply_strip(float *out, const Linear *layer, Quantized q, const float *x, int64_t N, int64_t j,
                           int64_t n, float *packed) {
    (void)packed, (void)x;
    const Input in = {NULL, &q, NULL};
    linear_columns(out, layer, &in, N, j, j + n, 0);
}
#endif

/* ---- the layer ---------------------------------------------------------------------------------------------- */

enum {
    TASK_ROWS = 128, /* rows of x in a task: they stay in the second-level cache */
    TASK_COLUMNS = 64
};

/* Floats of one thread: packed weights of many rows, or the input of few. */
static int64_t own_size(int64_t N, int64_t C, int type) {
    const int64_t input = N <= FEW_ROWS ? input_size(N, C) : 0, packed = type == INT8 ? packed_size(C) : 0;
    return round_up(input > packed ? input : packed, LINE);
}

int64_t linear_scratch_size(int64_t N, int64_t C, int type, int threads) {
    const int64_t shared = type == INT8 ? quantized_size(N, C) + words_size(N, C) : 0;
    return round_up(shared, LINE) + threads * own_size(N, C, type);
}

void linear_rows(float *out, const Linear *layer, const void *x, int memory, int precision, float *scratch, int64_t N,
                 Team *team) {
    const int64_t C = layer->C, OC = layer->OC;
    const int int8 = layer->type == INT8, in_strips = int8 && N > STRIP_LEAST && C % CHANNELS == 0;
    const Quantized q = quantized_in(scratch, N, C);
    const int64_t task_rows = in_strips ? N : TASK_ROWS, task_columns = in_strips ? STRIP_COLUMNS : TASK_COLUMNS,
                  column_tasks = ceil_div(OC, task_columns);
    const int64_t shared = int8 ? quantized_size(N, C) + words_size(N, C) : 0;
    float *words = scratch + quantized_size(N, C);
    float *own = scratch + round_up(shared, LINE) + team->member * own_size(N, C, layer->type);
    if (int8)
        for_shared (i, N, worth(C), team) {
            quantize_row(q, (const float *)x + i * C, i, C);
            if (in_strips && WORDS > 1) make_words(words + i * (C / CHANNELS * WORDS), q.values + i * q.stride, C);
        }
    tiles_begin();
    Input few = {NULL, NULL, NULL};
    if (N <= FEW_ROWS) few = input_of(layer, x, memory, &q, precision, own, N);
    const float *x_words = WORDS > 1 ? words : (const float *)q.values;
    for_shared (task, column_tasks * ceil_div(N, task_rows), worth(task_columns * min64(task_rows, N) * C / 16), team) {
        const int64_t j = task % column_tasks * task_columns, i = task / column_tasks * task_rows,
                      n = min64(task_columns, OC - j);
        const Quantized part = {q.scales + i, q.sums + i, q.values + i * q.stride, q.stride};
        const Input of_part = {few.floats, &part, few.words}; /* only INT8 layers take more than few rows */
        if (in_strips)
            multiply_strip(out, layer, q, x_words, N, j, n, own);
        else
            linear_columns(out + i * OC, layer, &of_part, min64(task_rows, N - i), j, j + n, 0);
    }
    tiles_end();
}
