/* Many kernels on pools of 1 to 5 threads: shared loops of all sizes, each of which reads what the one before wrote.
 * tests/sanitize.sh runs it under ThreadSanitizer. Ends with 1 and a line where a result is wrong. */

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "gpt2c.h"
#include "team.h"

enum { MOST = 3000, LOOPS = 40 };

typedef struct {
    int64_t n[LOOPS], grain[LOOPS];
    int64_t *values; /* (MOST) */
} Work;

/* values[i] becomes the sum of the numbers of the loops that reached it. */
static void kernel(void *arguments, Team *team) {
    const Work *w = arguments;
    for (int k = 0; k < LOOPS; k++)
        for_shared (i, w->n[k], w->grain[k], team) w->values[i] += k + 1;
}

int main(void) {
    static int64_t values[MOST], expected[MOST];
    srand(1);
    for (int threads = 1; threads <= 5; threads++) {
        Pool *pool = aligned_alloc(64, (size_t)(pool_size(threads) + 63) / 64 * 64);
        if (pool_start(pool, threads) != threads) return puts("no threads"), 1;
        for (int round = 0; round < 300; round++) {
            Work work = {.values = values};
            const int64_t limit = 1 + rand() % MOST;
            for (int k = 0; k < LOOPS; k++) {
                work.n[k] = rand() % 4 ? rand() % limit : rand() % 3;
                work.grain[k] = 1 + rand() % 3 * (rand() % 100);
                for (int64_t i = 0; i < work.n[k]; i++) expected[i] += k + 1;
            }
            run_together(pool, kernel, &work);
            for (int64_t i = 0; i < MOST; i++)
                if (values[i] != expected[i]) return printf("%d threads: values[%ld] is wrong\n", threads, (long)i), 1;
            if (round % 50 == 0) { /* so that all fall asleep */
                const struct timespec pause = {0, 2000000};
                nanosleep(&pause, NULL);
            }
        }
        pool_stop(pool);
        free(pool);
    }
    return 0;
}
