/* The threads behind team.h: how they wait, join a kernel, take tasks and meet at the end of a loop.
 *
 * Each member has a queue of a loop's tasks. A queue is one number: the loop's stage and how many of its tasks are
 * taken. Taking a task is one compare-and-swap, which fails for a member that is still in an earlier stage. The member
 * that reports the last task done opens the next stage.
 *
 * A waiting thread first spins, because most waits are short and waking a thread takes tens of microseconds. Then it
 * sleeps: if another program uses a core, the sleeper leaves its own core to the member that it waits for.
 *
 * The caller starts and stops the threads. The child of a fork has none of them and must start its own pool. */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "gpt2c.h"
#include "team.h"

enum {
    TASKS_EACH = 64,       /* the most for each member: enough to balance the load, too few to cost anything */
    WAKE_TASKS = 16,       /* the fewest tasks for which sleeping threads are woken */
    SPIN_NS = 50000,       /* how long a waiting thread spins */
    STACK_BYTES = 1 << 20, /* kernels use a few KB */
    OPEN = 1 << 30         /* flag in Pool.running: more members may enter */
};

/* Threads sleep here until something changes. */
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    _Atomic int sleepers;
} Condition;

typedef struct {
    _Alignas(64) _Atomic uint64_t taken; /* stage << 32 | tasks taken */
    Pool *pool;
    int index; /* 0 is the caller, for which no thread is started */
    pthread_t thread;
} Member;

struct Pool {
    int threads;
    void (*kernel)(void *arguments, Team *team);
    void *arguments;
    uint32_t first_stage;                     /* of the kernel's first loop */
    _Alignas(64) _Atomic uint32_t generation; /* counts the kernels, so that no member enters one twice */
    _Atomic int running;                      /* members in the kernel beside the caller, plus OPEN */
    _Atomic int stopping;
    _Alignas(64) _Atomic uint32_t stage; /* shared loops done so far */
    _Atomic int64_t done;                /* tasks done in the current loop */
    Condition idle, waiting;             /* threads without a kernel; threads that wait within one */
    Member members[];
};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------- */

typedef int (*Ready)(Pool *pool, uint32_t seen);

static int stage_is_over(Pool *pool, uint32_t stage) { return atomic_load(&pool->stage) != stage; }
static int all_have_finished(Pool *pool, uint32_t unused) { return (void)unused, atomic_load(&pool->running) == 0; }
static int idle_is_over(Pool *pool, uint32_t seen) {
    return atomic_load(&pool->stopping) ||
           ((atomic_load(&pool->running) & OPEN) && atomic_load(&pool->generation) != seen);
}

static void wait_until(Ready ready, Pool *pool, uint32_t seen, Condition *condition) {
    int64_t until = 0;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready(pool, seen)) return;
            pause_briefly();
        }
        if (until == 0) until = nanoseconds() + SPIN_NS;
    } while (nanoseconds() < until);
    pthread_mutex_lock(&condition->mutex);
    /* counted before the last check, because a thread that changes something looks for sleepers afterwards */
    atomic_fetch_add(&condition->sleepers, 1);
    while (!ready(pool, seen)) pthread_cond_wait(&condition->changed, &condition->mutex);
    atomic_fetch_sub(&condition->sleepers, 1);
    pthread_mutex_unlock(&condition->mutex);
}

static void wake(Condition *condition) {
    if (atomic_load(&condition->sleepers) == 0) return;
    pthread_mutex_lock(&condition->mutex);
    pthread_cond_broadcast(&condition->changed);
    pthread_mutex_unlock(&condition->mutex);
}

/* ---- loops ------------------------------------------------------------------------------------------------------ */

/* Opens a stage: none of its tasks is taken or done. */
static void open_stage(Pool *pool, uint32_t stage) {
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    for (int i = 0; i < pool->threads; i++)
        atomic_store_explicit(&pool->members[i].taken, (uint64_t)stage << 32, memory_order_relaxed);
    atomic_store(&pool->stage, stage);
}

/* Lets the other members into the caller's kernel if there are enough tasks for them. */
static void start_parallel(Team *team, int64_t tasks) {
    Pool *pool = team->pool;
    const int asleep = atomic_load(&pool->idle.sleepers);
    if (!team->parallel && (asleep < team->threads - 1 || tasks >= WAKE_TASKS)) {
        open_stage(pool, team->stage);
        atomic_fetch_add(&pool->generation, 1);
        atomic_store(&pool->running, OPEN);
        team->parallel = 1;
    }
    if (asleep > 0 && tasks >= WAKE_TASKS) wake(&pool->idle);
}

void expect_tasks(Team *team, int64_t tasks) {
    if (team->member == 0 && team->threads > 1 && tasks > 1) start_parallel(team, tasks);
}

Loop begin_loop(Team *team, int64_t n, int64_t grain) {
    const int64_t most = (int64_t)team->threads * TASKS_EACH, worthwhile = (n + grain - 1) / grain;
    expect_tasks(team, worthwhile);
    return (Loop){team, n, worthwhile < most ? worthwhile : most, 0, 0, 0, 0};
}

/* Takes a task from a member's queue; returns 0 if there is none. */
static int take_task(Loop *loop, int member) {
    const Team *team = loop->team;
    const int64_t first = loop->tasks * member / team->threads, end = loop->tasks * (member + 1) / team->threads;
    _Atomic uint64_t *queue = &team->pool->members[member].taken;
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
    if (!team->parallel) {
        loop->from = loop->to; /* the whole loop the first time, then nothing */
        loop->to = loop->n;
        return loop->from < loop->to ? 1 : (team->stage++, 0);
    }
    if (loop->to > 0) loop->done++;
    for (; loop->queue < team->threads; loop->queue++)
        if (take_task(loop, (team->member + loop->queue) % team->threads)) return 1;
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
    if (!team.parallel) return;
    atomic_fetch_and(&pool->running, ~OPEN);
    wait_until(all_have_finished, pool, 0, &pool->waiting); /* they read the arguments until then */
}

/* Enters the kernel; returns 0 if it is closed. */
static int enter(Pool *pool) {
    int running = atomic_load(&pool->running);
    while (running & OPEN)
        if (atomic_compare_exchange_weak(&pool->running, &running, running + 1)) return 1;
    return 0;
}

static void *member_main(void *given) {
    const Member *self = given;
    Pool *pool = self->pool;
    uint32_t seen = 0;
    for (;;) {
        wait_until(idle_is_over, pool, seen, &pool->idle);
        if (atomic_load(&pool->stopping)) return NULL;
        if (!enter(pool)) continue;
        seen = atomic_load(&pool->generation);
        Team team = {pool, self->index, pool->threads, 1, pool->first_stage};
        pool->kernel(pool->arguments, &team);
        if (atomic_fetch_sub(&pool->running, 1) == 1) wake(&pool->waiting);
    }
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

int64_t pool_size(int threads) { return (int64_t)sizeof(Pool) + threads * (int64_t)sizeof(Member); }

static void init_condition(Condition *condition) {
    pthread_mutex_init(&condition->mutex, NULL);
    pthread_cond_init(&condition->changed, NULL);
}

int pool_start(Pool *pool, int threads) {
    memset(pool, 0, (size_t)pool_size(threads));
    init_condition(&pool->idle);
    init_condition(&pool->waiting);
    pool->threads = 1; /* until the others are started */
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 1;
    pool->threads = threads;                                   /* before the first of them reads it */
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES); /* if refused, the system's default */
    sigset_t all, before; /* signals go to the program's own threads, except faults of a thread itself */
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    sigfillset(&all);
    for (int i = 0; i < 4; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 1;
    for (; started < threads; started++) {
        Member *member = &pool->members[started];
        member->pool = pool;
        member->index = started;
        if (pthread_create(&member->thread, &attributes, member_main, member) != 0) break;
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
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->members[i].thread, NULL);
}
