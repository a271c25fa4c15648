/* This machine: its CPU features, and loops that measure the peak of its multiply-add units and of reading memory. */

#include "internal.h"

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
#else
    (void)feature;
#endif
    return 0;
}

/* ---- peaks ----------------------------------------------------------------------------------------------------- */

/* Independent sums: more than latency (4 or 5 cycles) times units (2), and few enough for SSE2's 16 registers. */
enum { CHAINS = 12 };

double fma_burn(double *sums, int64_t iterations, int precision, Team *team) {
    for_shared (i, team->threads, 1, team) {
        const vf factor = vf_set1(0.999f), term = vf_set1(0.001f); /* converges to 1: no overflow, no denormals */
        const vf opposite = vf_bf16_pair(factor, vf_set1(-0.999f)), same = vf_bf16_pair(term, term); /* adds 0 */
        vf acc[CHAINS];
        for (int j = 0; j < CHAINS; j++) acc[j] = vf_set1((float)j);
        for (int64_t k = 0; precision == BF16 && k < iterations; k++)
            for (int j = 0; j < CHAINS; j++) acc[j] = vf_bf16_dot(acc[j], opposite, same);
        for (int64_t k = 0; precision == FP32 && k < iterations; k++)
            for (int j = 0; j < CHAINS; j++) acc[j] = vf_fma(acc[j], factor, term);
        sums[i] = 0.0;
        for (int j = 0; j < CHAINS; j++) sums[i] += (double)vf_sum(acc[j]);
    }
    double total = 0.0;
    for (int i = 0; i < team->threads; i++) total += sums[i];
    /* the sums are finite; the compiler would remove the loop if nothing read them */
    const double each = precision == BF16 ? 4 : 2;
    return isfinite(total) ? (double)team->threads * (double)iterations * CHAINS * VF_LEN * each : 0.0;
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
