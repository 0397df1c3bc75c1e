/* SPDX-License-Identifier: Apache-2.0 */
/* What another thread of the test does, without asking it. */
#ifndef VMM_TESTS_THREADS_H
#define VMM_TESTS_THREADS_H

#include "check.h"

#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static inline pid_t this_thread(void)
{
    return (pid_t)syscall(SYS_gettid);
}

/* Sleeping, in the kernel's words (proc(5), /proc/pid/stat): waiting for what this thread is about to do, if there is
 * nothing else that the other could wait for. */
static inline bool is_asleep(pid_t thread)
{
    char path[64], text[256] = {0};
    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)thread);
    FILE *stat = fopen(path, "r");
    CHECK(stat && fgets(text, sizeof(text), stat));
    fclose(stat);
    const char *end = strrchr(text, ')'); /* of the name, which may have parentheses in it */
    return end && end[1] == ' ' && end[2] == 'S';
}

static inline void await_asleep(pid_t thread)
{
    while (!is_asleep(thread))
        poll(NULL, 0, 1);
}

#endif
