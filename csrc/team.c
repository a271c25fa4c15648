/* The threads behind team.h: they sleep, spin, take tasks and wait for each other.
 *
 * A loop's tasks lie in a queue for each member. A queue is one number, the loop's stage and how many tasks were taken,
 * so that taking a task is one compare-and-swap, which fails for a member that is behind. The member that reports the
 * last task done opens the next stage.
 *
 * Waiting is spinning for a moment, since most waits are short and waking takes tens of microseconds, then sleeping:
 * where another program uses a core, a sleeper leaves its own to the member that it waits for.
 *
 * Threads are the caller's to start and to stop. A child of a fork has none of them: it must start a pool of its own.
 */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "gpt2c.h"
#include "team.h"

enum {
    TASKS_EACH = 64,   /* at most, for each member: enough to even out, few enough to cost nothing */
    WORTH_WAKING = 16, /* tasks for which sleepers are woken */
    SPIN = 50000,      /* nanoseconds */
    STACK = 1 << 20,   /* bytes; kernels take a few KB */
    OPEN = 1 << 30     /* in Pool.members */
};

/* Where threads sleep until something changes. */
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    _Atomic int sleepers;
} Bed;

typedef struct {
    _Alignas(64) _Atomic uint64_t taken; /* stage << 32 | tasks taken */
    Pool *pool;
    int member;
    pthread_t thread;
} Seat;

struct Pool {
    int threads;
    void (*kernel)(void *arguments, Team *team);
    void *arguments;
    uint32_t first_stage;               /* of this kernel */
    _Alignas(64) _Atomic uint32_t call; /* counts the calls; who was in a kernel does not come twice */
    _Atomic int members; /* members beside the caller that are in the kernel, and OPEN while more may come */
    _Atomic int stopping;
    _Alignas(64) _Atomic uint32_t stage; /* shared loops that are done */
    _Atomic int64_t done;                /* tasks of this one that are */
    Bed idle, waiting;                   /* between kernels, within one */
    Seat seats[];
};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------- */

typedef int (*Ready)(Pool *pool, uint32_t seen);

static int stage_is_over(Pool *pool, uint32_t stage) { return atomic_load(&pool->stage) != stage; }
static int all_have_left(Pool *pool, uint32_t unused) { return (void)unused, atomic_load(&pool->members) == 0; }
static int is_called(Pool *pool, uint32_t seen) {
    return atomic_load(&pool->stopping) || ((atomic_load(&pool->members) & OPEN) && atomic_load(&pool->call) != seen);
}

static void wait_until(Ready ready, Pool *pool, uint32_t seen, Bed *bed) {
    int64_t until = 0;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready(pool, seen)) return;
            pause_briefly();
        }
        if (until == 0) until = nanoseconds() + SPIN;
    } while (nanoseconds() < until);
    pthread_mutex_lock(&bed->mutex);
    atomic_fetch_add(&bed->sleepers, 1); /* before looking once more: who changes something looks for sleepers after */
    while (!ready(pool, seen)) pthread_cond_wait(&bed->changed, &bed->mutex);
    atomic_fetch_sub(&bed->sleepers, 1);
    pthread_mutex_unlock(&bed->mutex);
}

static void wake(Bed *bed) {
    if (atomic_load(&bed->sleepers) == 0) return;
    pthread_mutex_lock(&bed->mutex);
    pthread_cond_broadcast(&bed->changed);
    pthread_mutex_unlock(&bed->mutex);
}

/* ---- loops ------------------------------------------------------------------------------------------------------ */

/* Opens a stage: nothing of its tasks is taken or done. */
static void open_stage(Pool *pool, uint32_t stage) {
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    for (int i = 0; i < pool->threads; i++)
        atomic_store_explicit(&pool->seats[i].taken, (uint64_t)stage << 32, memory_order_relaxed);
    atomic_store(&pool->stage, stage);
}

/* The caller calls the others, if there is enough for them to do. */
static void call(Team *team, int64_t tasks) {
    Pool *pool = team->pool;
    const int asleep = atomic_load(&pool->idle.sleepers);
    if (!team->together && (asleep < team->threads - 1 || tasks >= WORTH_WAKING)) {
        open_stage(pool, team->stage);
        atomic_fetch_add(&pool->call, 1);
        atomic_store(&pool->members, OPEN);
        team->together = 1;
    }
    if (asleep > 0 && tasks >= WORTH_WAKING) wake(&pool->idle);
}

Loop begin_loop(Team *team, int64_t n, int64_t grain) {
    const int64_t most = (int64_t)team->threads * TASKS_EACH, worthwhile = (n + grain - 1) / grain;
    if (team->member == 0 && team->threads > 1 && worthwhile > 1) call(team, worthwhile);
    return (Loop){team, n, worthwhile < most ? worthwhile : most, 0, 0, 0, 0};
}

/* Takes a task of a member's queue; 0 if there is none. */
static int take(Loop *loop, int member) {
    const Team *team = loop->team;
    const int64_t first = loop->tasks * member / team->threads, end = loop->tasks * (member + 1) / team->threads;
    _Atomic uint64_t *queue = &team->pool->seats[member].taken;
    uint64_t taken = atomic_load_explicit(queue, memory_order_relaxed);
    while (taken >> 32 == team->stage && first + (int64_t)(uint32_t)taken < end)
        if (atomic_compare_exchange_weak_explicit(queue, &taken, taken + 1, memory_order_relaxed,
                                                  memory_order_relaxed)) {
            const int64_t task = first + (int64_t)(uint32_t)taken;
            loop->from = loop->n * task / loop->tasks;
            loop->to = loop->n * (task + 1) / loop->tasks;
            return 1;
        }
    return 0;
}

int next_task(Loop *loop) {
    Team *team = loop->team;
    if (loop->tasks <= 0) return 0;
    if (!team->together) {
        loop->from = loop->to; /* all of it the first time, then nothing */
        loop->to = loop->n;
        return loop->from < loop->to ? 1 : (team->stage++, 0);
    }
    if (loop->to > 0) loop->done++;
    for (; loop->from_whom < team->threads; loop->from_whom++)
        if (take(loop, (team->member + loop->from_whom) % team->threads)) return 1;
    Pool *pool = team->pool;
    if (loop->done > 0 && atomic_fetch_add(&pool->done, loop->done) + loop->done == loop->tasks) {
        open_stage(pool, team->stage + 1);
        wake(&pool->waiting);
    } else {
        wait_until(stage_is_over, pool, team->stage, &pool->waiting);
    }
    team->stage++;
    return 0;
}

/* ---- kernels ---------------------------------------------------------------------------------------------------- */

void run_together(Pool *pool, void (*kernel)(void *arguments, Team *team), void *arguments) {
    Team team = {pool, 0, pool->threads, 0, atomic_load(&pool->stage)};
    pool->kernel = kernel;
    pool->arguments = arguments;
    pool->first_stage = team.stage;
    kernel(arguments, &team);
    if (!team.together) return;
    atomic_fetch_and(&pool->members, ~OPEN);
    wait_until(all_have_left, pool, 0, &pool->waiting); /* they read the arguments */
}

/* Whether a member is in the kernel, unless that is over. */
static int enter(Pool *pool) {
    int members = atomic_load(&pool->members);
    while (members & OPEN)
        if (atomic_compare_exchange_weak(&pool->members, &members, members + 1)) return 1;
    return 0;
}

static void *work(void *given) {
    const Seat *seat = given;
    Pool *pool = seat->pool;
    uint32_t seen = 0;
    for (;;) {
        wait_until(is_called, pool, seen, &pool->idle);
        if (atomic_load(&pool->stopping)) return NULL;
        if (!enter(pool)) continue;
        seen = atomic_load(&pool->call);
        Team team = {pool, seat->member, pool->threads, 1, pool->first_stage};
        pool->kernel(pool->arguments, &team);
        if (atomic_fetch_sub(&pool->members, 1) == 1) wake(&pool->waiting);
    }
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

int64_t pool_size(int threads) { return (int64_t)sizeof(Pool) + threads * (int64_t)sizeof(Seat); }

static void make_bed(Bed *bed) {
    pthread_mutex_init(&bed->mutex, NULL);
    pthread_cond_init(&bed->changed, NULL);
}

int pool_start(Pool *pool, int threads) {
    memset(pool, 0, (size_t)pool_size(threads));
    make_bed(&pool->idle);
    make_bed(&pool->waiting);
    pool->threads = 1; /* until the others are there */
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 1;
    pool->threads = threads;                             /* before the first of them looks */
    (void)pthread_attr_setstacksize(&attributes, STACK); /* else the system's default */
    sigset_t all, before; /* signals are for the program's own threads, but for a fault of the thread itself */
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    sigfillset(&all);
    for (int i = 0; i < 4; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 1;
    for (; started < threads; started++) {
        Seat *seat = &pool->seats[started];
        seat->pool = pool;
        seat->member = started;
        if (pthread_create(&seat->thread, &attributes, work, seat) != 0) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    pool->threads = started;
    if (started < threads) pool_stop(pool);
    return started;
}

void pool_stop(Pool *pool) {
    atomic_store(&pool->stopping, 1);
    wake(&pool->idle);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->seats[i].thread, NULL);
}
