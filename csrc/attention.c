/* Causal attention of NH heads, block by block: out = softmax(mask(q k^T / sqrt(HS))) v for each head; q, k, v (T,HS).
 *
 * Method: FlashAttention (Dao et al. 2022, arXiv:2205.14135; online softmax, Milakov and Gimelshein 2018,
 * arXiv:1805.02867). A thread has the scores of one block of TILE keys x TILE queries at a time, in its first-level
 * cache. Beside the output, forward keeps one number for each query: lse, the log of the softmax denominator. Backward
 * recomputes the probabilities of a block as exp(score - lse). Blocks above the diagonal are skipped, which halves the
 * work.
 *
 * Scores are stored as k q^T, with queries across the lanes of a vector. A softmax, which runs over keys, then goes
 * down the rows and never across lanes. A product reads its left operand row by row or column by column, one number
 * repeated in all lanes, and its right operand row by row. A head's rows of q, k, v lie far apart, at places that share
 * few sets of a cache; so they are copied, and a thread copies keys and values once for all the queries that it takes.
 * Those of a cache, or few of them, products of floats read where they lie.
 *
 * BF16: the factors of a product are pairs of numbers along the sum (simd.h), two channels of a row, or two rows.
 * Softmax, its gradient and all sums stay in float.
 *
 * Threads share the heads and, in forward, the blocks of queries; in backward the key heads, each with the query heads
 * that share it. The order of each sum depends on the sequence's length alone. */

#include "internal.h"
#include "philox.h"
#include "vmath.h"

enum { TILE = 64 };

/* A tile of a product is ROWS x WIDTH. With two vectors of the right operand it must fit the registers, 32 or 16. */
#if VF_LEN == 16
enum { ROWS = 8 };
#elif VF_LEN == 1
enum { ROWS = 2 };
#else
enum { ROWS = 4 };
#endif
enum { WIDTH = 2 * VF_LEN };
/* So score() writes all pairs of ROWS keys and WIDTH queries or none of them, and sum_over_queries() relies on it. */
_Static_assert(WIDTH % ROWS == 0 && TILE % WIDTH == 0, "tiles of attention must nest");

/* The channels of a head in scratch, padded with zeros to whole vectors. */
static int64_t padded(int64_t HS) { return round_up(HS, VF_LEN); }

/* Floats for one thread: beside those of a block, two arrays of a head's P keys, or five of the T of backward. */
static int64_t thread_scratch_size(int64_t T, int64_t P, int64_t HS) {
    const int64_t backward = 5 * round_up(T, TILE), forward = 2 * round_up(P, TILE);
    return 4 * TILE * TILE + (6 * TILE + (backward > forward ? backward : forward)) * padded(HS);
}

int64_t attention_scratch_size(int64_t T, int64_t P, int64_t HS, int threads) {
    return threads * thread_scratch_size(T, P, HS);
}

/* to = from: n rows of HS floats. */
static void copy_rows(float *to, int64_t to_stride, const float *from, int64_t stride, int64_t n, int64_t HS) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < HS; c += VF_LEN)
            vf_store_n(to + i * to_stride + c, vf_load_n(from + i * stride + c, HS - c), HS - c);
}

/* ---- products of blocks ------------------------------------------------------------------------------------- */

/* c (rows x vectors * VF_LEN, row stride ldc) (+)= left (rows x depth) b (depth rows, row stride ldb). Here and below,
 * depth counts lanes. */
static inline __attribute__((always_inline)) void tile_product(float *restrict c, int64_t ldc, Operand left,
                                                               const float *restrict b, int64_t ldb, int64_t depth,
                                                               int accumulate, const int rows, const int vectors,
                                                               const int type) {
    vf acc[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) acc[i][j] = accumulate ? vf_load(c + i * ldc + j * VF_LEN) : vf_set1(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        vf bk[2];
        for (int j = 0; j < vectors; j++) bk[j] = vf_load(b + k * ldb + j * VF_LEN);
        for (int i = 0; i < rows; i++) {
            vf ai = vf_set1(((const float *)left.data)[i * left.row_stride + k * left.k_stride]);
            for (int j = 0; j < vectors; j++) acc[i][j] = multiply_lanes(ai, bk[j], acc[i][j], type);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) vf_store(c + i * ldc + j * VF_LEN, acc[i][j]);
}

/* The lanes of `numbers` in a block of BF16: where tiles multiply, whole tiles. */
static inline int64_t block_lanes(int64_t numbers) {
    return on_tiles(BF16) ? round_up(ceil_div(numbers, 2), VF_LEN) : ceil_div(numbers, 2);
}

/* c (m x n) (+)= left (m x depth) b (depth x n); n is a multiple of VF_LEN. */
static inline __attribute__((always_inline)) void block_product(float *c, int64_t ldc, Operand left, const float *b,
                                                                int64_t ldb, int64_t m, int64_t n, int64_t depth,
                                                                int accumulate, const int type) {
    for (int64_t i = 0; i < m;) {
        const int whole = m - i >= ROWS;
        const Operand rows = {(const float *)left.data + i * left.row_stride, left.row_stride, left.k_stride, FP32};
        for (int64_t j = 0; j < n;) {
            const int wide = n - j >= WIDTH;
            float *to = c + i * ldc + j;
            if (whole && wide)
                tile_product(to, ldc, rows, b + j, ldb, depth, accumulate, ROWS, 2, type);
            else if (whole)
                tile_product(to, ldc, rows, b + j, ldb, depth, accumulate, ROWS, 1, type);
            else
                tile_product(to, ldc, rows, b + j, ldb, depth, accumulate, 1, 1, type);
            j += whole && wide ? WIDTH : VF_LEN;
        }
        i += whole ? ROWS : 1;
    }
}

/* A block of scores: its first query is `offset` positions after its first key, and it has `keys` keys. */
typedef struct {
    int64_t offset, keys;
} Block;

/* The number of the block's keys that any of the WIDTH queries around query j may see. */
static int64_t visible_keys(Block block, int64_t j) {
    return min64(block.keys, block.offset + j / WIDTH * WIDTH + WIDTH);
}

/* The first query of the block that may see the key. */
static int64_t first_query(Block block, int64_t key) { return key > block.offset ? key - block.offset : 0; }

/* x, with `other` in the lanes of queries that may not see the key; lane 0 is query j. */
static inline vf mask(Block block, int64_t key, int64_t j, vf x, vf other) {
    const int64_t masked = first_query(block, key) - j;
    return masked <= 0 ? x : vf_first_n(other, x, min64(masked, VF_LEN));
}

/* scores (keys x TILE) = left right. Here and below, keys that none of WIDTH queries may see are left out. */
static inline __attribute__((always_inline)) void score(float *scores, Block block, Operand left, const float *right,
                                                        int64_t HS, const int type) {
    const int64_t depth = ceil_div(HS, numbers_of_lane(type));
    if (on_tiles(type)) {
        product_on_tiles(scores, TILE, left, right, TILE, block.keys, TILE, depth, 0);
        return;
    }
    for (int64_t j = 0; j < TILE; j += WIDTH)
        block_product(scores + j, TILE, left, right + j, TILE, visible_keys(block, j), WIDTH, depth, 0, type);
}

/* sums (HS x TILE) (+)= left (HS x keys) weights (keys x TILE). */
static inline __attribute__((always_inline)) void sum_over_keys(float *sums, Block block, Operand left,
                                                                const float *weights, int64_t HS, int accumulate,
                                                                const int type) {
    if (on_tiles(type)) {
        product_on_tiles(sums, TILE, left, weights, TILE, HS, TILE, ceil_div(block.keys, 2), accumulate);
        return;
    }
    for (int64_t j = 0; j < TILE; j += WIDTH)
        block_product(sums + j, TILE, left, weights + j, TILE, HS, WIDTH,
                      ceil_div(visible_keys(block, j), numbers_of_lane(type)), accumulate, type);
}

/* sums (keys x padded HS) (+)= weights (keys x TILE) right (TILE x padded HS). */
static inline __attribute__((always_inline)) void sum_over_queries(float *sums, Block block, const float *weights,
                                                                   const float *right, int64_t HS, int accumulate,
                                                                   const int type) {
    const int64_t HSP = padded(HS), each = numbers_of_lane(type);
    if (on_tiles(type)) {
        const Operand left = {weights, TILE, 1, FP32};
        product_on_tiles(sums, HSP, left, right, HSP, block.keys, HSP, TILE / 2, accumulate);
        return;
    }
    for (int64_t i = 0; i < block.keys; i += ROWS) {
        const int64_t j = first_query(block, i) / WIDTH * WIDTH / each;
        block_product(sums + i * HSP, HSP, (Operand){weights + i * TILE + j, TILE, 1, FP32}, right + j * HSP, HSP,
                      min64(ROWS, block.keys - i), HSP, TILE / each - j, accumulate, type);
    }
}

/* ---- pairs of BF16 ------------------------------------------------------------------------------------------ */

/* to (rows x columns / 2, row stride to_stride) = from (rows x columns), two columns in a lane, then the zeros that
 * tiles need; to may be from. */
static void pair_columns(float *to, int64_t to_stride, const void *from, int64_t stride, int64_t rows, int64_t columns,
                         int memory) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < columns; c += 2 * VF_LEN)
            vf_store_n(to + i * to_stride + c / 2,
                       load_lanes(element(from, i * stride + c, memory), columns - c, BF16, memory),
                       block_lanes(columns - c));
}

/* to (rows / 2 x columns, row stride to_stride) = from (rows x columns), two rows in a lane; to may be from. */
static void pair_rows(float *to, int64_t to_stride, const void *from, int64_t stride, int64_t rows, int64_t columns,
                      int memory) {
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t c = 0; c < columns; c += VF_LEN) {
            const void *first = element(from, i * stride + c, memory);
            const void *second = i + 1 < rows ? element(first, stride, memory) : NULL;
            vf_store_n(to + i / 2 * to_stride + c, load_pair(first, second, columns - c, memory), columns - c);
        }
}

/* Rows [from, to) of x (row stride TILE), `columns` of them wide, are 0. */
static void clear_rows(float *x, int64_t from, int64_t to, int64_t columns) {
    for (int64_t i = from; i < to; i++)
        for (int64_t j = 0; j < columns; j += VF_LEN) vf_store(x + i * TILE + j, vf_set1(0.0f));
}

/* pair_rows() of a block's weights (keys x TILE) where they lie. */
static void pair_keys(float *weights, Block block) {
    for (int64_t j = 0; j < TILE; j += WIDTH) {
        const int64_t seen = visible_keys(block, j), visible = seen > 0 ? seen : 0; /* the first key may come later */
        pair_rows(weights + j, TILE, weights + j, TILE, visible, WIDTH, FP32);
        if (on_tiles(BF16)) clear_rows(weights + j, ceil_div(visible, 2), TILE / 2, WIDTH);
    }
}

/* q_t (lanes x TILE) = the transpose of a block of queries, or of their gradients, with lanes as a product takes them.
 */
static inline __attribute__((always_inline)) void transpose_queries(float *q_t, const void *q, int64_t stride,
                                                                    int64_t rows, int64_t HS, const int type,
                                                                    int memory) {
    transpose(q_t, TILE, q, stride, rows, HS, TILE, type, memory);
    if (on_tiles(type)) clear_rows(q_t, ceil_div(HS, 2), block_lanes(HS), TILE);
}

/* to (HS x TILE / 2) = the transpose of pairs (keys / 2 x HS), two rows of a block in a lane: so tiles take them. */
static void transpose_pairs(float *to, const float *pairs, int64_t keys, int64_t HS) {
    transpose(to, TILE / 2, pairs, HS, ceil_div(keys, 2), HS, TILE / 2, FP32, FP32);
}

/* A block of keys or values as the left operand (HS x keys) of a sum over keys: x (keys x HS) of floats, or of pairs,
 * which for tiles are transposed. */
static inline Operand by_key_operand(const float *x, int64_t HS, const int type) {
    return on_tiles(type) ? (Operand){x, TILE / 2, 1, FP32} : (Operand){x, 1, HS, FP32};
}

/* ---- dropout ------------------------------------------------------------------------------------------------ */

/* factors (keys x TILE) of a block whose first key is `key` of its sequence; drop's first row is the first query. A
 * counter has the words of four keys: they are four rows of the block, and queries lie across the lanes. */
static void keep_block(float *factors, Block block, const Dropout *drop, int64_t key) {
    for (int64_t i = 0; i < block.keys; i += 4)
        for (int64_t j = first_query(block, i) / WIDTH * WIDTH; j < TILE; j++) {
            float four[4];
            keep_four(four, drop, (uint32_t)((key + i) / 4), (uint32_t)j);
            for (int64_t k = 0; k < 4; k++) factors[(i + k) * TILE + j] = four[k];
        }
}

/* weights (keys x TILE) *= factors. */
static void multiply(float *weights, Block block, const float *factors) {
    for (int64_t i = 0; i < block.keys; i++)
        for (int64_t j = first_query(block, i) / WIDTH * WIDTH; j < TILE; j += VF_LEN)
            vf_store(weights + i * TILE + j, vf_mul(vf_load(weights + i * TILE + j), vf_load(factors + i * TILE + j)));
}

/* The dropout of a head h, for rows from `row` of the batch on. */
static Dropout dropout_from(Dropout drop, int64_t h, int64_t row) {
    drop.head = (uint32_t)h;
    drop.first += (uint64_t)row;
    return drop;
}

/* ---- rows of a cache ---------------------------------------------------------------------------------------- */

void store_cached(void *cache, float *scales, int64_t row, const void *x, int64_t HS, int type, int memory) {
    for (int64_t c = 0; c < HS && type != SIGNED8; c += VF_LEN) {
        const vf numbers = load_n(x, c, HS - c, memory);
        if (type == FP16)
            vf_store_half_n((uint16_t *)cache + row * HS + c, numbers, HS - c);
        else
            vf_store_n((float *)cache + row * HS + c, numbers, HS - c);
    }
    int32_t sum;
    if (type == SIGNED8) scales[row] = quantize((int8_t *)cache + row * HS, &sum, x, HS);
}

/* to (n x HS) = n rows from number `first` on, of type FP16 or SIGNED8, as floats. */
static void widen(float *to, Rows from, int64_t first, int64_t n, int64_t HS) {
    for (int64_t row = first; row < first + n; row++, to += HS)
        for (int64_t c = 0; c < HS; c += VF_LEN) {
            const int64_t at = row * from.stride + c;
            const vf x = from.type == FP16
                             ? load_numbers(from.numbers, at, HS - c, FP16)
                             : vf_mul(load_numbers(from.numbers, at, HS - c, SIGNED8), vf_set1(from.scales[row]));
            vf_store_n(to + c, x, HS - c);
        }
}

/* How many keys the queries of a head see, all added up, with `before` of them in a cache. */
static int64_t seen_keys(Sequences all, int64_t before) {
    int64_t seen = 0;
    for (int64_t s = 0; s < sequence_count(all); s++) {
        const int64_t length = sequence_length(all, s);
        seen += length * before + length * (length + 1) / 2;
    }
    return seen;
}

/* ---- forward ------------------------------------------------------------------------------------------------ */

/* A head's keys and values as products take them, in blocks of TILE. A thread makes them when its first block of
 * queries needs them, and keeps them for the head's other blocks. */
typedef struct {
    int64_t head, made; /* of all sequences, -1: none yet; the blocks that are there */
    float *keys, *values;
    int in_place; /* then products of floats read keys and values where they lie, and none are made */
} Prepared;

/* Floats lie well if one row follows the other, as in a cache, or if there are few of them. */
static int read_in_place(int type, int64_t stride, int64_t length, int64_t HS) {
    return type == FP32 && (stride == HS || length <= TILE);
}

/* The floats of a block of keys, and of one of values. */
static int64_t prepared_size(int64_t HS) { return TILE * padded(HS); }

/* Block `number` of the keys and of the values, n of each; scratch (3,TILE,padded HS). Keys that come after
 * the queries get the weight 0, so any finite number may stand there. */
static inline __attribute__((always_inline)) void prepare_block(const Prepared *to, Rows keys, Rows values,
                                                                int64_t number, int64_t n, int64_t HS, float *scratch,
                                                                const int type) {
    const int wide = keys.type == FP32 || keys.type == BF16, held = wide ? keys.type : FP32;
    const int64_t size = prepared_size(HS), first = number * TILE, stride = wide ? keys.stride : HS;
    float *k_to = to->keys + number * size, *v_to = to->values + number * size;
    float *v_pairs = scratch, *k_wide = scratch + size, *v_wide = k_wide + size;
    const void *k = k_wide, *v = v_wide;
    if (wide) {
        k = element(keys.numbers, first * stride, held);
        v = element(values.numbers, first * stride, held);
    } else {
        widen(type == BF16 ? k_wide : k_to, keys, first, n, HS);
        widen(type == BF16 ? v_wide : v_to, values, first, n, HS);
    }
    if (type != BF16) {
        if (!wide || to->in_place) return;
        copy_rows(k_to, HS, k, stride, n, HS);
        copy_rows(v_to, HS, v, stride, n, HS);
        return;
    }
    pair_columns(k_to, block_lanes(HS), k, stride, n, HS, held);
    pair_rows(on_tiles(BF16) ? v_pairs : v_to, HS, v, stride, n, HS, held);
    if (on_tiles(BF16)) transpose_pairs(v_to, v_pairs, n, HS);
}

/* The keys (keys x HS) of a block as the left operand of scores, and the values (HS x keys) of a sum over keys. */
static inline Operand key_operand(const Prepared *all, Rows keys, int64_t number, int64_t HS, const int type) {
    const float *block = all->keys + number * prepared_size(HS);
    if (type == BF16) return (Operand){block, block_lanes(HS), 1, FP32};
    if (all->in_place) return (Operand){element(keys.numbers, number * TILE * keys.stride, FP32), keys.stride, 1, FP32};
    return (Operand){block, HS, 1, FP32};
}
static inline Operand value_operand(const Prepared *all, Rows values, int64_t number, int64_t HS, const int type) {
    if (type != BF16 && all->in_place)
        return (Operand){element(values.numbers, number * TILE * values.stride, FP32), 1, values.stride, FP32};
    return by_key_operand(all->values + number * prepared_size(HS), HS, type);
}

/* out (rows x HS, row stride C) and lse (rows) of one block of queries q (rows x HS, row stride W). The first query is
 * at position `first` of keys and values (length), whose blocks are made in `all` unless they are there. drop is NULL
 * without dropout. `memory` is the type of q and out: BF16 only where the products are. */
static inline __attribute__((always_inline)) void forward_block(void *out, float *lse, const void *q, Prepared *all,
                                                                Rows keys, Rows values, int64_t length, int64_t first,
                                                                int64_t rows, int64_t C, int64_t W, int64_t HS,
                                                                const Dropout *drop, float *scratch, const int type,
                                                                int memory) {
    const int64_t size = TILE * padded(HS);
    float *p = scratch, *factors = p + TILE * TILE, *q_t = factors + TILE * TILE, *out_t = q_t + size;
    float maximum[TILE], denominator[TILE];
    const vf scale = vf_set1(1.0f / sqrtf((float)HS));
    for (int64_t j = 0; j < TILE; j++) maximum[j] = -INFINITY;
    transpose_queries(q_t, q, W, rows, HS, type, memory);
    for (int64_t key = 0; key < first + rows; key += TILE) {
        const Block block = {first - key, min64(TILE, first + rows - key)};
        const Operand by_channel = key_operand(all, keys, key / TILE, HS, type);
        const Operand by_key = value_operand(all, values, key / TILE, HS, type);
        for (; all->made <= key / TILE; all->made++)
            prepare_block(all, keys, values, all->made, min64(TILE, length - all->made * TILE), HS, out_t + size, type);
        score(p, block, by_channel, q_t, HS, type);
        for (int64_t j = 0; j < TILE; j += WIDTH) { /* two vectors: one would wait for each maximum and sum */
            const int64_t seen = visible_keys(block, j);
            vf before[2], highest[2], sum[2];
            for (int v = 0; v < 2; v++) {
                highest[v] = before[v] = vf_load(maximum + j + v * VF_LEN);
                sum[v] = vf_set1(0.0f);
            }
            for (int64_t i = 0; i < seen; i++)
                for (int64_t v = 0, at = j; v < 2; v++, at += VF_LEN) {
                    const vf x = vf_mul(vf_load(p + i * TILE + at), scale);
                    highest[v] = vf_max(highest[v], mask(block, i, at, x, before[v]));
                }
            for (int64_t i = 0; i < seen; i++)
                for (int64_t v = 0, at = j; v < 2; v++, at += VF_LEN) {
                    float *x = p + i * TILE + at;
                    vf e = vf_exp(vf_fma(vf_load(x), scale, vf_sub(vf_set1(0.0f), highest[v])));
                    e = mask(block, i, at, e, vf_set1(0.0f));
                    sum[v] = vf_add(sum[v], e);
                    vf_store(x, e);
                }
            for (int64_t v = 0, at = j; v < 2; v++, at += VF_LEN) {
                vf_store(maximum + at, highest[v]);
                if (key > 0) { /* rescale the earlier sums from the old maximum to the new one */
                    const vf rescale = vf_exp(vf_sub(before[v], highest[v]));
                    sum[v] = vf_fma(vf_load(denominator + at), rescale, sum[v]);
                    for (int64_t c = 0; c < HS; c++)
                        vf_store(out_t + c * TILE + at, vf_mul(vf_load(out_t + c * TILE + at), rescale));
                }
                vf_store(denominator + at, sum[v]);
            }
        }
        if (drop) { /* after the sums of the softmax */
            keep_block(factors, block, drop, key);
            multiply(p, block, factors);
        }
        if (type == BF16) pair_keys(p, block);
        sum_over_keys(out_t, block, by_key, p, HS, key > 0, type);
    }
    for (int64_t j = 0; j < TILE; j += VF_LEN) {
        const vf inverse = vf_div(vf_set1(1.0f), vf_load(denominator + j));
        for (int64_t c = 0; c < HS; c++) vf_store(out_t + c * TILE + j, vf_mul(vf_load(out_t + c * TILE + j), inverse));
    }
    if (memory == BF16) {
        transpose(q_t, HS, out_t, TILE, HS, rows, HS, FP32, FP32); /* the queries are not needed any more */
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < HS; c += VF_LEN)
                store_n(out, i * C + c, vf_load_n(q_t + i * HS + c, HS - c), HS - c, memory);
    } else
        transpose(out, C, out_t, TILE, HS, rows, HS, FP32, FP32);
    for (int64_t i = 0; i < rows; i++) lse[i] = maximum[i] + logf(denominator[i]);
}

/* lse is (B,NH,T); this is where the rows of head h of sequence s begin. */
static int64_t lse_at(Sequences all, int64_t NH, int64_t s, int64_t h) {
    return all.offsets ? h * all.T + all.offsets[s] : (s * NH + h) * all.T;
}

/* A task of the forward pass: a block of queries of one head, `rows` of them from `first` on in sequence s. */
typedef struct {
    int64_t s, h, first, rows;
} ForwardTask;

/* Blocks of queries are numbered so that a number gives its sequence without a list: in a ragged batch, those of a head
 * of sequence s are from first_number(s) on. Some numbers stand for no block. */
static int64_t first_number(Sequences all, int64_t s) { return all.offsets[s] / TILE + s; }
static int64_t block_numbers(Sequences all) {
    return all.offsets ? first_number(all, all.S - 1) : all.B * ceil_div(all.T, TILE);
}

/* The blocks of a head follow each other, because they share its keys. Its last queries come first: they see the most
 * keys, so the longest tasks come first. */
static ForwardTask forward_task(Sequences all, int64_t NH, int64_t number) {
    int64_t s, h, block;
    if (all.offsets) {
        const int64_t sought = number / NH;
        int64_t high = all.S - 1;
        for (s = 0; high - s > 1;) {
            const int64_t middle = (s + high) / 2;
            if (first_number(all, middle) <= sought)
                s = middle;
            else
                high = middle;
        }
        const int64_t begin = first_number(all, s), numbers = first_number(all, s + 1) - begin;
        h = (number - NH * begin) / numbers;
        block = (number - NH * begin) % numbers;
    } else {
        const int64_t blocks = ceil_div(all.T, TILE);
        s = number / (NH * blocks);
        h = number / blocks % NH;
        block = number % blocks;
    }
    const int64_t length = sequence_length(all, s), blocks = ceil_div(length, TILE);
    if (block >= blocks) return (ForwardTask){s, h, 0, 0};
    const int64_t first = (blocks - 1 - block) * TILE;
    return (ForwardTask){s, h, first, min64(TILE, length - first)};
}

void attention_forward(void *out, float *lse, void *keys, void *values, float *key_scales, float *value_scales,
                       const void *qkv, const int32_t *offsets, int64_t position, double dropout, uint64_t key,
                       uint64_t first, int precision, int qkv_type, int type, float *scratch, int64_t B, int64_t T,
                       int64_t C, int64_t NH, int64_t W, int64_t P, int64_t S, Team *team) {
    const int64_t HS = C / NH, KV = (W - C) / (2 * HS);
    const Sequences all = {offsets, B, T, S};
    const Dropout batch = dropout_of(dropout, key, first);
    const int64_t longest = P > T ? P : T;
    float *own = scratch + team->member * thread_scratch_size(T, P, HS);
    Prepared prepared = {-1, 0, own + 2 * TILE * TILE + 5 * TILE * padded(HS), NULL, 0};
    prepared.values = prepared.keys + round_up(longest, TILE) * padded(HS);
    expect_tasks(team, 2 * seen_keys(all, keys ? position : 0) * C / WAKE_PRODUCTS);
    if (precision == BF16) tiles_begin();
    if (keys)
        for_shared (row, B * T, worth(2 * KV * HS), team) /* in the order of memory */
            for (int64_t head = 0; head < KV; head++) {
                const int64_t to = (row / T * KV + head) * P + position + row % T;
                const void *k = element(qkv, row * W + C + head * HS, qkv_type), *v = element(k, KV * HS, qkv_type);
                if (type == SIGNED8 && qkv_type == BF16) {
                    for (int64_t c = 0; c < HS; c += VF_LEN) {
                        vf_store_n(own + c, load_n(k, c, HS - c, BF16), HS - c);
                        vf_store_n(own + HS + c, load_n(v, c, HS - c, BF16), HS - c);
                    }
                    k = own;
                    v = own + HS;
                }
                store_cached(keys, key_scales, to, k, HS, type, qkv_type);
                store_cached(values, value_scales, to, v, HS, type, qkv_type);
            }
    for_shared (number, NH * block_numbers(all), worth(min64(T, TILE) * HS), team) {
        const ForwardTask task = forward_task(all, NH, number);
        if (!task.rows) continue;
        const int64_t start = sequence_at(all, task.s), row = start + task.first, kv = task.h / (NH / KV);
        const void *q = element(qkv, row * W + task.h * HS, qkv_type);
        const void *own_keys = element(qkv, start * W + C + kv * HS, qkv_type);
        const void *own_values = element(own_keys, KV * HS, qkv_type);
        const int64_t cached = (task.s * KV + kv) * P;
        const Dropout drop = dropout_from(batch, task.h, row);
        const Rows k = keys ? cached_rows(keys, key_scales, cached, HS, type) : (Rows){own_keys, NULL, W, qkv_type};
        const Rows v =
            keys ? cached_rows(values, value_scales, cached, HS, type) : (Rows){own_values, NULL, W, qkv_type};
        void *to = element_to(out, row * C + task.h * HS, qkv_type);
        float *to_lse = lse + lse_at(all, NH, task.s, task.h) + task.first;
        const int64_t before = keys ? position : 0, at = before + task.first;
        const int64_t length = before + sequence_length(all, task.s);
        if (prepared.head != task.s * KV + kv) {
            prepared.head = task.s * KV + kv;
            prepared.made = 0;
            prepared.in_place = read_in_place(k.type, k.stride, length, HS);
        }
        const Dropout *dropped = dropout > 0 ? &drop : NULL;
        if (precision == BF16)
            forward_block(to, to_lse, q, &prepared, k, v, length, at, task.rows, C, W, HS, dropped, own, BF16,
                          qkv_type);
        else
            forward_block(to, to_lse, q, &prepared, k, v, length, at, task.rows, C, W, HS, dropped, own, FP32, FP32);
    }
    if (precision == BF16) tiles_end();
}

/* ---- backward ----------------------------------------------------------------------------------------------- */

/* to (TILE x padded HS) = from (rows x HS, row stride `stride`), and zeros around it. */
static void pad_rows(float *to, const void *from, int64_t stride, int64_t rows, int64_t HS, int memory) {
    const int64_t HSP = padded(HS);
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t c = 0; c < HSP; c += VF_LEN)
            vf_store(to + i * HSP + c, i < rows ? load_n(from, i * stride + c, HS - c, memory) : vf_set1(0.0f));
}

/* A block of keys and values as backward's products take them: k and v (keys x HS), and k as a left operand (HS x keys)
 * of a sum over keys. */
typedef struct {
    Operand k_by_channel, v_by_channel, by_key;
} KeyBlock;

/* That of rows of k and v (n x HS, row stride `stride`): `in_place`, where products are of floats, or in `to`
 * (3,TILE,padded HS), where it may be `made` already. scratch (TILE,padded HS). */
static inline __attribute__((always_inline)) KeyBlock key_block(float *to, const void *k, const void *v, int64_t stride,
                                                                int64_t n, int64_t HS, int made, int in_place,
                                                                float *scratch, const int type, int memory) {
    const int64_t lanes = block_lanes(HS);
    if (type != BF16 && in_place) return (KeyBlock){{k, stride, 1, FP32}, {v, stride, 1, FP32}, {k, 1, stride, FP32}};
    if (type != BF16) {
        float *v_to = to + TILE * HS;
        if (!made) {
            copy_rows(to, HS, k, stride, n, HS);
            copy_rows(v_to, HS, v, stride, n, HS);
        }
        return (KeyBlock){{to, HS, 1, FP32}, {v_to, HS, 1, FP32}, {to, 1, HS, FP32}};
    }
    float *v_to = to + TILE * lanes, *by_key = v_to + TILE * lanes;
    if (!made) {
        pair_columns(to, lanes, k, stride, n, HS, memory);
        pair_columns(v_to, lanes, v, stride, n, HS, memory);
        pair_rows(on_tiles(BF16) ? scratch : by_key, HS, k, stride, n, HS, memory);
        if (on_tiles(BF16)) transpose_pairs(by_key, scratch, n, HS);
    }
    return (KeyBlock){{to, lanes, 1, FP32}, {v_to, lanes, 1, FP32}, by_key_operand(by_key, HS, BF16)};
}

/* The query heads that share a key head: dqkv (T rows, stride W) from dout and out (T rows, stride C), qkv and lse
 * (group,lse_stride). Pointers are at the first of these heads; k and v lie `to_k` and `to_v` after q. dqkv may be qkv:
 * q of a block is read before its dq is written, and dk and dv stay in scratch until all heads are done. drop is that
 * of the first head, or NULL. `memory` is the type of qkv and out: BF16 only where the products are. */
static inline __attribute__((always_inline)) void backward_group(float *dqkv, const float *dout, const void *qkv,
                                                                 const void *out, const float *lse, int64_t lse_stride,
                                                                 int64_t group, int64_t to_k, int64_t to_v, int64_t T,
                                                                 int64_t C, int64_t W, int64_t HS, const Dropout *drop,
                                                                 float *scratch, const int type, int memory) {
    const int64_t HSP = padded(HS), size = TILE * HSP;
    float *p = scratch, *dp = p + TILE * TILE, *dp_pairs = dp + TILE * TILE, *factors = dp_pairs + TILE * TILE;
    float *q_t = factors + TILE * TILE, *dout_t = q_t + size, *dq_t = dout_t + size, *q = dq_t + size;
    float *dout_block = q + size, *pairs = dout_block + size, *dk = pairs + size, *dv = dk + round_up(T, TILE) * HSP;
    float *blocks = dv + round_up(T, TILE) * HSP;
    const int in_place = read_in_place(type, W, T, HS);
    const vf scale = vf_set1(1.0f / sqrtf((float)HS));
    for (int64_t h = 0; h < group; h++)
        for (int64_t first = 0; first < T; first += TILE) {
            const int64_t rows = min64(TILE, T - first);
            pad_rows(q, element(qkv, first * W + h * HS, memory), W, rows, HS, memory);
            pad_rows(dout_block, dout + first * C + h * HS, C, rows, HS, FP32);
            transpose_queries(q_t, q, HSP, TILE, HS, type, FP32);
            transpose_queries(dout_t, dout_block, HSP, TILE, HS, type, FP32);
            /* Queries past T have q, dout, minus_lse and delta 0, so they add 0 to every sum. */
            float minus_lse[TILE] = {0.0f}, delta[TILE] = {0.0f};
            for (int64_t i = 0; i < rows; i++) {
                /* Gradient of softmax: dscores = p * (dp - delta); delta = sum(p * dp) over all keys equals dout . out.
                 */
                const int64_t row = (first + i) * C + h * HS;
                vf dot = vf_set1(0.0f);
                for (int64_t c = 0; c < HS; c += VF_LEN)
                    dot = vf_fma(vf_load(dout_block + i * HSP + c), load_n(out, row + c, HS - c, memory), dot);
                delta[i] = vf_sum(dot);
                minus_lse[i] = -lse[h * lse_stride + first + i];
            }
            if (type == BF16) {
                pair_rows(q, HSP, q, HSP, TILE, HSP, FP32);
                pair_rows(dout_block, HSP, dout_block, HSP, TILE, HSP, FP32);
            }
            for (int64_t key = 0; key < first + rows; key += TILE) {
                const Block block = {first - key, min64(TILE, T - key)};
                const int accumulate = h > 0 || first > key;
                const void *k = element(qkv, key * W + to_k, memory), *v = element(qkv, key * W + to_v, memory);
                const KeyBlock keys = key_block(blocks + 3 * key * HSP, k, v, W, block.keys, HS, accumulate, in_place,
                                                pairs, type, memory);
                score(p, block, keys.k_by_channel, q_t, HS, type);
                score(dp, block, keys.v_by_channel, dout_t, HS, type);
                if (drop) {
                    const Dropout own = dropout_from(*drop, drop->head + h, first);
                    keep_block(factors, block, &own, key);
                    multiply(dp, block, factors);
                }
                for (int64_t j = 0; j < TILE; j += VF_LEN) {
                    for (int64_t i = 0; i < visible_keys(block, j); i++) {
                        float *pi = p + i * TILE + j, *dpi = dp + i * TILE + j;
                        vf probability = vf_exp(vf_fma(vf_load(pi), scale, vf_load(minus_lse + j)));
                        probability = mask(block, i, j, probability, vf_set1(0.0f));
                        vf dscore = vf_mul(probability, vf_sub(vf_load(dpi), vf_load(delta + j)));
                        vf_store(pi, probability);
                        vf_store(dpi, vf_mul(dscore, scale));
                    }
                    if (on_tiles(type)) {
                        clear_rows(p + j, visible_keys(block, j), block.keys, VF_LEN);
                        clear_rows(dp + j, visible_keys(block, j), block.keys, VF_LEN);
                    }
                }
                if (drop) multiply(p, block, factors);
                const float *by_query = dp;
                if (type == BF16) {
                    pair_columns(p, TILE, p, TILE, block.keys, TILE, FP32);
                    pair_columns(dp_pairs, TILE, dp, TILE, block.keys, TILE, FP32);
                    pair_keys(dp, block);
                    by_query = dp_pairs;
                }
                sum_over_queries(dv + key * HSP, block, p, dout_block, HS, accumulate, type);
                sum_over_queries(dk + key * HSP, block, by_query, q, HS, accumulate, type);
                sum_over_keys(dq_t, block, keys.by_key, dp, HS, key > 0, type);
            }
            transpose(dqkv + first * W + h * HS, W, dq_t, TILE, HS, rows, HS, FP32, FP32);
        }
    copy_rows(dqkv + to_k, W, dk, HSP, T, HS);
    copy_rows(dqkv + to_v, W, dv, HSP, T, HS);
}

void attention_backward(float *dqkv, const float *dout, const void *qkv, const void *out, const float *lse,
                        const int32_t *offsets, double dropout, uint64_t key, uint64_t first, int precision,
                        int qkv_type, float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, int64_t W, int64_t S,
                        Team *team) {
    const int64_t HS = C / NH, KV = (W - C) / (2 * HS), group = NH / KV;
    const Sequences all = {offsets, B, T, S};
    const Dropout batch = dropout_of(dropout, key, first);
    if (sequence_count(all) * KV > 1)
        expect_tasks(team, 5 * seen_keys(all, 0) * C / WAKE_PRODUCTS); /* its tasks are long */
    if (precision == BF16) tiles_begin();
    for_shared (task, sequence_count(all) * KV, worth(B * T / sequence_count(all) * group * HS), team) {
        const int64_t s = task / KV, kv = task % KV, h = kv * group, start = sequence_at(all, s);
        const int64_t wide = start * W + h * HS, narrow = start * C + h * HS, to_k = C + (kv - h) * HS;
        const Dropout drop = dropout_from(batch, h, start);
        const float *head_lse = lse + lse_at(all, NH, s, h);
        float *own = scratch + team->member * thread_scratch_size(T, 0, HS);
        const void *heads = element(qkv, wide, qkv_type), *outs = element(out, narrow, qkv_type);
        const int64_t length = sequence_length(all, s), to_v = to_k + KV * HS;
        const Dropout *dropped = dropout > 0 ? &drop : NULL;
        if (precision != BF16)
            backward_group(dqkv + wide, dout + narrow, heads, outs, head_lse, T, group, to_k, to_v, length, C, W, HS,
                           dropped, own, FP32, FP32);
        else
            backward_group(dqkv + wide, dout + narrow, heads, outs, head_lse, T, group, to_k, to_v, length, C, W, HS,
                           dropped, own, BF16, qkv_type);
    }
    if (precision == BF16) tiles_end();
}
