/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_BASE_THREAD_H
#define VMM_BASE_THREAD_H

#include <pthread.h>
#include <time.h>

/* A thread of ours, on which no signal is delivered: they are for the caller's. `name` is of 15 characters at most.
 * -errno. */
int vmm_thread_start(pthread_t *thread, const char *name, void *(*run)(void *opaque), void *opaque);

/* A condition that is waited for by CLOCK_MONOTONIC, which no one sets. */
void vmm_cond_init(pthread_cond_t *condition);

/* The moment `timeout_ms` from now by that clock; less than 0 is now. */
struct timespec vmm_deadline(int timeout_ms);

/* pthread_cond_wait, until then at most: ETIMEDOUT when it is past. NULL: as long as it takes. */
int vmm_cond_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, const struct timespec *until);

#endif
