/* Threads that run a kernel together.
 *
 * Every thread of a team runs the whole kernel with the same arguments. A shared loop is divided into tasks, and each
 * task runs on one thread:
 *
 *     for_shared(i, N, worth(C), team) layernorm_row(out + i * C, ...);
 *
 * i goes through [0, N); a task has about worth(C) iterations or more. A thread goes on after the loop when all tasks
 * are done. Code between shared loops runs on every thread: it may write local variables, but no memory that other
 * threads see. A shared loop contains no break, return or other for_shared.
 *
 * Each thread starts with its own tasks. They are the same rows in each kernel, so its cache may still hold them. Then
 * it steals tasks of others: a thread that the system does not run delays one task, not the kernel. A sum must lie
 * within one iteration, or each iteration stores a partial sum in an array. Its order then depends on sizes alone, and
 * so do the bits of the result.
 *
 * The calling thread starts alone. The others join at the first loop with more than one task, so a small kernel costs
 * nothing. A thread that joins late skips the loops that are done. */

#ifndef TEAM_H
#define TEAM_H

#include <stdint.h>

typedef struct Pool Pool; /* the threads and the state that they share: team.c */

/* A thread's view of the kernel that it runs. */
typedef struct Team {
    Pool *pool;
    int member;     /* index of the thread, 0 for the caller; each has its own part of scratch */
    int threads;    /* the number of members */
    int parallel;   /* whether the other threads take part */
    uint32_t stage; /* shared loops that this thread has passed */
} Team;

typedef struct {
    Team *team;
    int64_t n, tasks, from, to;
    int64_t done; /* tasks that this thread has run */
    int queue;    /* the member whose tasks it takes next, counted from itself */
} Loop;

Loop begin_loop(Team *team, int64_t n, int64_t grain);
int next_task(Loop *loop); /* returns 1 if [from, to) is next, 0 if the whole loop is done */

#define for_shared(i, n, grain, team)                                       \
    for (Loop loop_##i = begin_loop(team, n, grain); next_task(&loop_##i);) \
        for (int64_t i = loop_##i.from, end_##i = loop_##i.to; i < end_##i; i++)

/* Calls the other threads if so many tasks are worth it. A kernel of many loops, each too short to wake a sleeping
 * thread, says at its start how many tasks they have together. */
void expect_tasks(Team *team, int64_t tasks);

/* The time of a clock that only goes forward. */
int64_t nanoseconds(void);

/* The fewest iterations of `size` elements in a task: with fewer, sharing costs more than it saves. */
static inline int64_t worth(int64_t size) { return size < 1 ? 8192 : size < 8192 ? 8192 / size : 1; }

/* Runs a kernel on the pool's threads. build.py generates the calls from gpt2c.h. */
void run_together(Pool *pool, void (*kernel)(void *arguments, Team *team), void *arguments);

#endif
