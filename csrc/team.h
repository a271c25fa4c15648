/* Threads that run a kernel together.
 *
 * Every thread of a team runs the whole kernel, from its first line to its last, with the same arguments. A loop that
 * is shared is cut into tasks, and each task is run by one of them:
 *
 *     for_shared(i, N, worth(C), team) layernorm_row(out + i * C, ...);
 *
 * i goes through [0, N); a task is at least worth(C) of its rows. What follows the loop begins when all its tasks are
 * done. So what lies between shared loops runs on every thread: it may compute on local variables, and must write no
 * memory that others see. No break, return or further for_shared within one.
 *
 * Each thread begins with tasks of its own, the same rows from kernel to kernel, which its cache may still hold; a
 * thread that has no more takes those of others. So a thread that the system keeps from running delays one task, not
 * the kernel. A sum must lie within one task, or be gathered in an array by tasks: its order then depends on sizes
 * alone, and the bits do not depend on who ran what.
 *
 * The first thread, the caller, begins alone. It calls the others at the first loop with more than one task, so that a
 * small kernel costs nothing; who comes late passes over the loops that are done. */

#ifndef TEAM_H
#define TEAM_H

#include <stdint.h>

typedef struct Pool Pool; /* the threads, and what they share: team.c */

/* A thread's view of the kernel that it runs. */
typedef struct Team {
    Pool *pool;
    int member;     /* 0 is the caller; scratch memory is divided by it */
    int threads;    /* how many members there may be */
    int together;   /* whether the others were called */
    uint32_t stage; /* shared loops that this thread has behind it */
} Team;

typedef struct {
    Team *team;
    int64_t n, tasks, from, to;
    int64_t done;  /* tasks of this loop that this thread has run */
    int from_whom; /* whose tasks it takes next, counted from its own */
} Loop;

Loop begin_loop(Team *team, int64_t n, int64_t grain);
int next_task(Loop *loop); /* 1, and [from, to) is to be done; or 0, and all of the loop is done */

#define for_shared(i, n, grain, team)                                       \
    for (Loop loop_##i = begin_loop(team, n, grain); next_task(&loop_##i);) \
        for (int64_t i = loop_##i.from, end_##i = loop_##i.to; i < end_##i; i++)

/* Rows of `size` elements that are worth a task: below this, handing it over costs more than it saves. */
static inline int64_t worth(int64_t size) { return size < 1 ? 8192 : size < 8192 ? 8192 / size : 1; }

/* Runs a kernel on the pool's threads; the callers are generated from gpt2c.h (build.py). */
void run_together(Pool *pool, void (*kernel)(void *arguments, Team *team), void *arguments);

#endif
