/* What this machine has and what it can reach: CPU features, threads, and the peak of its fused multiply-add units. */

#include "internal.h"
#ifdef _OPENMP
#include <pthread.h>
#endif

int cpu_supports(const char *feature) {
#if defined(__x86_64__) || defined(__i386__)
    /* The builtin wants literals; it also asks whether the operating system saves the wide registers. */
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
#else
    (void)feature;
#endif
    return 0;
}

/* ---- threads --------------------------------------------------------------------------------------------------- */

#ifdef _OPENMP
static void *wait_for(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

int start_threads(int threads, int64_t stack_size) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 1;
    if (stack_size > 0) (void)pthread_attr_setstacksize(&attributes, (size_t)stack_size); /* OpenMP, too, passes over */
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER; /* closed until all are there, so that they are there together */
    pthread_t others[threads];
    int count = 1;
    pthread_mutex_lock(&gate);
    while (count < threads && pthread_create(&others[count], &attributes, wait_for, &gate) == 0) count++;
    pthread_mutex_unlock(&gate);
    for (int i = 1; i < count; i++) pthread_join(others[i], NULL);
    pthread_attr_destroy(&attributes);
    if (count < threads) return count;
    int started = 0; /* an empty region would be compiled away; fewer are OMP_THREAD_LIMIT's or OMP_DYNAMIC's wish */
#pragma omp parallel num_threads(threads) reduction(+ : started)
    started++;
    return started > 0 ? threads : 0;
}

int release_threads(void) { return omp_pause_resource_all(omp_pause_hard); }
#else
int start_threads(int threads, int64_t stack_size) {
    (void)stack_size;
    return threads;
}
int release_threads(void) { return 0; }
#endif

/* ---- peaks ----------------------------------------------------------------------------------------------------- */

/* Independent sums in flight: latency (4 or 5 cycles) times units (2) must be covered, and SSE2 has 16 registers. */
enum { CHAINS = 12 };

double fma_burn(int64_t iterations, int threads) {
    double total = 0.0, done = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : total, done)
    {
        const vf factor = vf_set1(0.999f), term = vf_set1(0.001f); /* converges to 1: no overflow, no denormals */
        vf acc[CHAINS];
        for (int j = 0; j < CHAINS; j++) acc[j] = vf_set1((float)j);
        for (int64_t i = 0; i < iterations; i++)
            for (int j = 0; j < CHAINS; j++) acc[j] = vf_fma(acc[j], factor, term);
        for (int j = 0; j < CHAINS; j++) total += (double)vf_sum(acc[j]);
        done += (double)iterations * CHAINS * VF_LEN * 2; /* by as many threads as there were */
    }
    return isfinite(total) ? done : 0.0; /* the sums are finite; a result nobody reads would be compiled away */
}

/* Vectors a step; what is left of n at the end, less than a step, is not read. */
enum { STREAMS = 8 };

double memory_read(const float *data, int64_t n, int threads) {
    double total = 0.0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t i = 0; i < n / (STREAMS * VF_LEN); i++) {
        const float *from = data + i * STREAMS * VF_LEN;
        vf sum = vf_load(from);
        for (int j = 1; j < STREAMS; j++) sum = vf_add(sum, vf_load(from + j * VF_LEN));
        total += (double)vf_sum(sum);
    }
    return total;
}
