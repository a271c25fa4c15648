/* This machine: its CPU features, and loops that measure the peak of its multiply-add units, the speed of reading
 * memory and the distance between its cores. */

#include "internal.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the CPU has tiles and their products of BF16 and INT8. A process must ask Linux (from 5.16 on) for the memory
 * in which their registers are saved; its threads may then use them. */
static int allows_tiles(void) {
    enum {
        REQUEST = 0x1023,
        TILE_DATA = 18,
        NEEDED = 1 << 22 | 1 << 24 | 1 << 25
    }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_... */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* AVX512-FP16, which compilers have known later than the other features. */
static int has_half_products(void) {
    enum { FEATURE = 1 << 23 };
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & FEATURE);
}
#else
static int allows_tiles(void) { return 0; }
static int has_half_products(void) { return 0; }
#endif

int cpu_supports(const char *feature) {
#if defined(__x86_64__) || defined(__i386__)
    /* The builtin takes literals only. It also checks whether the operating system saves the wide registers. */
    __builtin_cpu_init();
    if (!strcmp(feature, "sse2")) return __builtin_cpu_supports("sse2") != 0;
    if (!strcmp(feature, "avx2")) return __builtin_cpu_supports("avx2") != 0;
    if (!strcmp(feature, "fma")) return __builtin_cpu_supports("fma") != 0;
    if (!strcmp(feature, "f16c")) return __builtin_cpu_supports("f16c") != 0;
    if (!strcmp(feature, "avx512f")) return __builtin_cpu_supports("avx512f") != 0;
    if (!strcmp(feature, "avx512bw")) return __builtin_cpu_supports("avx512bw") != 0;
    if (!strcmp(feature, "avx512dq")) return __builtin_cpu_supports("avx512dq") != 0;
    if (!strcmp(feature, "avx512vl")) return __builtin_cpu_supports("avx512vl") != 0;
    if (!strcmp(feature, "avx512vnni")) return __builtin_cpu_supports("avx512vnni") != 0;
    if (!strcmp(feature, "avx512bf16")) return __builtin_cpu_supports("avx512bf16") != 0;
    if (!strcmp(feature, "avx512fp16")) return has_half_products();
    if (!strcmp(feature, "amx-tile")) return allows_tiles();
    if (!strcmp(feature, "amx-bf16")) return allows_tiles();
    if (!strcmp(feature, "amx-int8")) return allows_tiles();
#else
    (void)feature;
#endif
    return 0;
}

/* ---- peaks ----------------------------------------------------------------------------------------------------- */

/* Independent sums: more than latency (4 or 5 cycles) times units (2), and few enough for SSE2's 16 registers. */
enum { CHAINS = 12 };

#ifdef HAS_TILES
/* A round of products of tiles, for fma_burn(); returns its operations. All numbers are 0. */
static double burn_tiles(int64_t iterations, int precision) {
    enum { PRODUCTS = 4 * 16 * 16 * 32 };
    tiles_begin(); /* tiles are 0 */
    for (int64_t k = 0; precision == BF16 && k < iterations; k++) {
        tile_dot_bf16(0, 4, 6);
        tile_dot_bf16(1, 4, 7);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(3, 5, 7);
    }
    for (int64_t k = 0; precision == INT8 && k < iterations; k++) {
        tile_dot_bytes(0, 4, 6);
        tile_dot_bytes(1, 4, 7);
        tile_dot_bytes(2, 5, 6);
        tile_dot_bytes(3, 5, 7);
    }
    tiles_end();
    return 2.0 * PRODUCTS * (precision == INT8 ? 2 : 1) * (double)iterations;
}
#endif

double fma_burn(double *sums, int64_t iterations, int precision, Team *team) {
    expect_tasks(team, iterations); /* they are long, few as they are */
#ifdef HAS_TILES
    if (precision == BF16 || precision == INT8) {
        for_shared (i, team->threads, 1, team) sums[i] = burn_tiles(iterations, precision);
        return (double)team->threads * sums[0];
    }
#endif
    for_shared (i, team->threads, 1, team) {
        const vf factor = vf_set1(0.999f), term = vf_set1(0.001f); /* converges to 1: no overflow, no denormals */
        const vf opposite = vf_bf16_pair(factor, vf_set1(-0.999f)), same = vf_bf16_pair(term, term); /* adds 0 */
        uint8_t ones[VB_LEN];
        int8_t signs[VB_LEN];
        for (int j = 0; j < VB_LEN; j++) {
            ones[j] = 1;
            signs[j] = j % 2 ? -1 : VB_LEN > 1; /* adds 0 */
        }
        const vb unsigned_ones = vb_load_unsigned(ones);
        vb plus_minus = vb_load_signed(signs);
        half numbers[2][VH_PARTS * VF_LEN];
        for (int part = 0; part < VH_PARTS; part++) {
            vh_store_n(numbers[0] + part * VF_LEN, factor, VF_LEN);
            vh_store_n(numbers[1] + part * VF_LEN, term, VF_LEN);
        }
        const vh half_factor = vh_load(numbers[0]), half_term = vh_load(numbers[1]);
        vh halves[CHAINS];
        vf acc[CHAINS];
        vi whole[CHAINS];
        for (int j = 0; j < CHAINS; j++) {
            acc[j] = vf_set1((float)j);
            whole[j] = vi_first(j);
            halves[j] = half_term;
        }
        for (int64_t k = 0; precision == INT8 && k < iterations; k++)
            for (int j = 0; j < CHAINS; j++) {
                plus_minus = vb_forget(plus_minus);
                whole[j] = vi_dot(whole[j], unsigned_ones, plus_minus);
            }
        for (int64_t k = 0; precision == BF16 && k < iterations; k++)
            for (int j = 0; j < CHAINS; j++) {
                acc[j] = vf_bf16_dot(acc[j], opposite, same);
#ifndef __AVX512BF16__
                __asm__("" : "+m"(acc[j])); /* else the compiler sees that several operations add 0 */
#endif
            }
        for (int64_t k = 0; precision == FP16 && k < iterations; k++) {
            for (int j = 0; j < CHAINS; j++) halves[j] = vh_fma(halves[j], half_factor, half_term);
            for (int j = 0; k % HALF_BLOCK == 0 && j < CHAINS; j++)
                for (int part = 0; part < VH_PARTS; part++) acc[j] = vf_add(acc[j], vh_part(halves[j], part));
        }
        for (int64_t k = 0; precision == FP32 && k < iterations; k++)
            for (int j = 0; j < CHAINS; j++) acc[j] = vf_fma(acc[j], factor, term);
        sums[i] = 0.0;
        for (int j = 0; j < CHAINS; j++) sums[i] += (double)vf_sum(vf_add(acc[j], vi_to_vf(whole[j])));
    }
    double total = 0.0;
    for (int i = 0; i < team->threads; i++) total += sums[i];
    /* the sums are finite; the compiler would remove the loop if nothing read them */
    const double products = precision == INT8   ? VB_LEN
                            : precision == BF16 ? 2 * VF_LEN
                            : precision == FP16 ? VH_PARTS * VF_LEN
                                                : VF_LEN;
    return isfinite(total) ? (double)team->threads * (double)iterations * CHAINS * products * 2 : 0.0;
}

/* Vectors in a step. A remainder of less than a step is not read. */
enum { STEP_VECTORS = 8 };

double memory_read(const float *data, double *sums, int64_t n, Team *team) {
    const int64_t steps = n / (STEP_VECTORS * VF_LEN);
    for_shared (slice, SLICES, 1, team) {
        sums[slice] = 0.0;
        for (int64_t i = steps * slice / SLICES; i < steps * (slice + 1) / SLICES; i++) {
            const float *from = data + i * STEP_VECTORS * VF_LEN;
            vf sum = vf_load(from);
            for (int j = 1; j < STEP_VECTORS; j++) sum = vf_add(sum, vf_load(from + j * VF_LEN));
            sums[slice] += (double)vf_sum(sum);
        }
    }
    double total = 0.0;
    for (int slice = 0; slice < SLICES; slice++) total += sums[slice];
    return total;
}

/* ---- distance -------------------------------------------------------------------------------------------------- */

enum { PATIENCE_NS = 3000000 }; /* of a thread that waits for the other */

/* Waits until the line holds `value`; returns 0 if that is not so at the time `until`. It does not pause, because that
 * would be measured too. */
static int comes_to_hold(const int32_t *line, int32_t value, int64_t until) {
    do {
        for (int i = 0; i < 1000; i++)
            if (__atomic_load_n(line, __ATOMIC_ACQUIRE) == value) return 1;
    } while (nanoseconds() < until);
    return 0;
}

/* Sends 2, 4, 6 ... when 1, 3, 5 ... comes; returns the mean nanoseconds of one way, 0 without an answer. */
static double send_line(int32_t *line, int32_t rounds, int64_t until) {
    if (!comes_to_hold(line, 1, until)) return 0.0;
    const int64_t start = nanoseconds();
    for (int32_t i = 1; i <= rounds; i++) {
        __atomic_store_n(line, 2 * i, __ATOMIC_RELEASE);
        if (!comes_to_hold(line, 2 * i + 1, until)) return 0.0;
    }
    return (double)(nanoseconds() - start) / (2.0 * rounds);
}

static void answer_line(int32_t *line, int32_t rounds, int64_t until) {
    for (int32_t i = 0;; i++) {
        __atomic_store_n(line, 2 * i + 1, __ATOMIC_RELEASE);
        if (i == rounds || !comes_to_hold(line, 2 * i + 2, until)) return;
    }
}

double line_travel(int32_t *line, double *way, int64_t rounds, Team *team) {
    if (team->threads < 2) return 0.0;
    expect_tasks(team, 2 * rounds);
    for_shared (side, 2, 1, team) {
        const int64_t until = nanoseconds() + PATIENCE_NS; /* one thread may get both sides: then nothing answers */
        if (side == 0)
            *way = send_line(line, (int32_t)rounds, until);
        else
            answer_line(line, (int32_t)rounds, until);
    }
    return *way;
}
