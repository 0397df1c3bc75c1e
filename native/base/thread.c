/* SPDX-License-Identifier: Apache-2.0 */
#include "base/thread.h"
#include "base/error.h"

#include <signal.h>

int vmm_thread_start(pthread_t *thread, const char *name, void *(*run)(void *opaque), void *opaque)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the new thread's from the start */
    const int rc = pthread_create(thread, NULL, run, opaque);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return vmm_error_host(-rc, "starting the thread %s", name);
    pthread_setname_np(*thread, name);
    return 0;
}

void vmm_cond_init(pthread_cond_t *condition)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

struct timespec vmm_deadline(int timeout_ms)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    if (timeout_ms <= 0)
        return at;
    at.tv_sec += timeout_ms / 1000;
    at.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (at.tv_nsec >= 1000000000L) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000L;
    }
    return at;
}

int vmm_cond_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, const struct timespec *until)
{
    return until ? pthread_cond_timedwait(condition, lock, until) : pthread_cond_wait(condition, lock);
}
