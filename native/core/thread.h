/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_CORE_THREAD_H
#define VMM_CORE_THREAD_H

#include <pthread.h>

/* A thread of ours, on which no signal is delivered: they are for the caller's. `name` is of 15 characters at most.
 * -errno. */
int vmm_thread_start(pthread_t *thread, const char *name, void *(*run)(void *opaque), void *opaque);

#endif
