/* C (+)= A B^T with every transposition hidden in packing: the one matrix product of the library.
 *
 * Method: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with BLIS's names.
 * A microkernel keeps an MR x NR tile of C in registers and walks packed panels of A and B, KC deep. A panel holds MR
 * rows of A (NR of B) interleaved, so that every step of the microkernel reads MR + NR consecutive floats and does
 * MR * NR multiply-adds. Edges are packed with zeros: the microkernel never sees a partial tile.
 *
 *   for each NC columns of C:                 packed B: NC x KC, in the last-level cache
 *     for each KC of the sum:                   all threads pack B together
 *       for each MB rows of C:                  all threads pack A together
 *         for each MC x NT tile, in parallel:     packed A: MC x KC, in the second-level cache
 *           for each NR columns, each MR rows:      packed B: NR x KC
 *             microkernel
 *
 * Every element of C is summed in the same order whatever the thread count is. */

#include "internal.h"

/* MR * NV accumulators, NV of B and one of A must fit the registers: 32 vectors with AVX-512 and NEON, else 16.
 * To look for spills: objdump -d on the extension and count stores to the stack inside the loop of the FMAs. */
#if VF_LEN == 16
enum { MR = 12, NV = 2 };
#elif VF_LEN == 8
enum { MR = 6, NV = 2 };
#elif defined(__ARM_NEON)
enum { MR = 8, NV = 3 };
#else
enum { MR = 4, NV = 2 };
#endif
enum { NR = NV * VF_LEN };

enum {
    KC = 384, /* deep enough that C is read and written seldom; MR x KC of A (18 KB) stays in the first-level cache */
    MC = 16 * MR, /* MC x KC of A: 288 KB with AVX-512, in the second-level cache beside NT x KC of B (192 KB) */
    MB = 64 * MR, /* rows packed at a time: 1.2 MB with AVX-512 */
    NT = 4 * NR,  /* columns a tile: small enough that 16 threads find work in a 1024 x 768 product */
    NC = 64 * NR  /* columns packed at a time: 3 MB with AVX-512 */
};

/* The packed blocks are shared by all threads. */
int64_t matmul_scratch_size(void) { return (int64_t)KC * (MB + NC); }

/* ---- packing ------------------------------------------------------------------------------------------------ */

/* rows[VF_LEN] becomes its transpose: log2(VF_LEN) times, zip row i with row i + VF_LEN/2 (the perfect shuffle). */
static inline void transpose(vf rows[VF_LEN]) {
    for (int stage = 1; stage < VF_LEN; stage *= 2) {
        vf zipped[VF_LEN];
        for (int i = 0; i < VF_LEN / 2; i++) {
            zipped[2 * i] = vf_zip_lo(rows[i], rows[i + VF_LEN / 2]);
            zipped[2 * i + 1] = vf_zip_hi(rows[i], rows[i + VF_LEN / 2]);
        }
        for (int i = 0; i < VF_LEN; i++) rows[i] = zipped[i];
    }
}

/* panel[k * width + i] = x(i, k) for i < width, k < kc; rows from n on are 0. `width` is MR or NR. */
static inline __attribute__((always_inline)) void pack_panel(float *restrict panel, Operand x, int64_t n, int64_t kc,
                                                             int64_t width) {
    for (int64_t i = 0; i < width; i += VF_LEN) {
        int64_t lanes = width - i, valid = min64(lanes, n - i);
        if (valid <= 0) { /* a whole vector of padding */
            for (int64_t k = 0; k < kc; k++) vf_store_n(panel + k * width + i, vf_set1(0.0f), lanes);
        } else if (x.k_stride != 1) { /* rows are contiguous: copy */
            const float *source = x.data + i;
            for (int64_t k = 0; k < kc; k++)
                vf_store_n(panel + k * width + i, vf_load_n(source + k * x.k_stride, valid), lanes);
        } else { /* k is contiguous: transpose VF_LEN x VF_LEN at a time */
            const float *source = x.data + i * x.stride;
            for (int64_t k = 0; k < kc; k += VF_LEN) {
                vf rows[VF_LEN];
                for (int64_t r = 0; r < VF_LEN; r++)
                    rows[r] = r < valid ? vf_load_n(source + r * x.stride + k, kc - k) : vf_set1(0.0f);
                transpose(rows);
                for (int64_t s = 0; s < min64(VF_LEN, kc - k); s++)
                    vf_store_n(panel + (k + s) * width + i, rows[s], lanes);
            }
        }
    }
}

/* x with its first row and first k moved on. */
static inline Operand shifted(Operand x, int64_t row, int64_t k) {
    x.data += row * x.stride + k * x.k_stride;
    return x;
}

/* ---- microkernel -------------------------------------------------------------------------------------------- */

/* What becomes of a finished tile: c = tile + bias, or c += tile. */
typedef struct {
    const float *bias;
    int accumulate;
} Epilogue;

/* c[0..m)[0..n) (ldc) from packed panels a (kc x MR) and b (kc x NR); m <= MR, n <= NR. */
static inline void microkernel(float *restrict c, int64_t ldc, const float *restrict a, const float *restrict b,
                               int64_t kc, int64_t m, int64_t n, Epilogue epilogue) {
    vf acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = vf_set1(0.0f);
    for (int64_t i = 0; i < m; i++) /* C is far away: its lines come while the products are computed */
        for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * VF_LEN, 0);
    for (int64_t k = 0; k < kc; k++, a += MR, b += NR) {
        vf bk[NV];
        for (int j = 0; j < NV; j++) bk[j] = vf_load(b + j * VF_LEN);
        for (int i = 0; i < MR; i++) {
            vf ai = vf_set1(a[i]);
            for (int j = 0; j < NV; j++) acc[i][j] = vf_fma(ai, bk[j], acc[i][j]);
        }
    }
    if (m == MR && n == NR) {
        for (int j = 0; j < NV; j++) {
            vf add = epilogue.bias ? vf_load(epilogue.bias + j * VF_LEN) : vf_set1(0.0f);
            for (int i = 0; i < MR; i++) {
                float *to = c + i * ldc + j * VF_LEN;
                vf_store(to, vf_add(acc[i][j], epilogue.accumulate ? vf_load(to) : add));
            }
        }
    } else { /* an edge: by way of a full tile in memory, so that acc is never indexed by a variable */
        float tile[MR * NR];
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++) vf_store(tile + i * NR + j * VF_LEN, acc[i][j]);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                float add = epilogue.bias ? epilogue.bias[j] : 0.0f;
                c[i * ldc + j] = tile[i * NR + j] + (epilogue.accumulate ? c[i * ldc + j] : add);
            }
    }
}

/* c (m x n) from packed a and b: a panel of B stays while the panels of A pass. */
static void multiply_packed(float *c, int64_t ldc, const float *a, const float *b, int64_t m, int64_t n, int64_t kc,
                            Epilogue epilogue) {
    const float *bias = epilogue.bias;
    for (int64_t j = 0; j < n; j += NR) {
        if (bias) epilogue.bias = bias + j;
        for (int64_t i = 0; i < m; i += MR)
            microkernel(c + i * ldc + j, ldc, a + i * kc, b + j * kc, kc, min64(MR, m - i), min64(NR, n - j), epilogue);
    }
}

/* ---- the two products --------------------------------------------------------------------------------------- */

void gemm(float *c, int64_t ldc, Operand a, Operand b, const float *bias, int accumulate, int64_t M, int64_t N,
          int64_t K, float *scratch, int threads) {
    float *packed_a = scratch, *packed_b = scratch + (int64_t)MB * KC;
#pragma omp parallel num_threads(team(threads, M * N * K / 16))
    for (int64_t jc = 0; jc < N; jc += NC) {
        int64_t nc = min64(NC, N - jc);
        for (int64_t pc = 0; pc < K; pc += KC) {
            int64_t kc = min64(KC, K - pc);
            Epilogue epilogue = {pc == 0 && bias ? bias + jc : NULL, accumulate || pc > 0};
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < nc; j += NR) pack_panel(packed_b + j * kc, shifted(b, jc + j, pc), nc - j, kc, NR);
            for (int64_t ic = 0; ic < M; ic += MB) {
                int64_t mb = min64(MB, M - ic);
#pragma omp for schedule(static)
                for (int64_t i = 0; i < mb; i += MR)
                    pack_panel(packed_a + i * kc, shifted(a, ic + i, pc), mb - i, kc, MR);
                int64_t rows = ceil_div(mb, MC), columns = ceil_div(nc, NT);
#pragma omp for schedule(dynamic)
                for (int64_t tile = 0; tile < rows * columns; tile++) {
                    int64_t i = tile / columns * MC, j = tile % columns * NT;
                    Epilogue here = epilogue;
                    if (here.bias) here.bias += j;
                    multiply_packed(c + (ic + i) * ldc + jc + j, ldc, packed_a + i * kc, packed_b + j * kc,
                                    min64(MC, mb - i), min64(NT, nc - j), kc, here);
                }
            }
        }
    }
}

int64_t gemm_tile_scratch_size(int64_t M, int64_t N, int64_t K) { return (round_up(M, MR) + round_up(N, NR)) * K; }

void gemm_tile(float *c, int64_t ldc, Operand a, Operand b, int accumulate, int64_t M, int64_t N, int64_t K,
               float *scratch) {
    float *packed_a = scratch, *packed_b = scratch + round_up(M, MR) * K;
    for (int64_t i = 0; i < M; i += MR) pack_panel(packed_a + i * K, shifted(a, i, 0), M - i, K, MR);
    for (int64_t j = 0; j < N; j += NR) pack_panel(packed_b + j * K, shifted(b, j, 0), N - j, K, NR);
    multiply_packed(c, ldc, packed_a, packed_b, M, N, K, (Epilogue){NULL, accumulate});
}
