/* SPDX-License-Identifier: Apache-2.0 */
#include "core/thread.h"
#include "core/core.h"

#include <signal.h>

int vmm_thread_start(pthread_t *thread, const char *name, void *(*run)(void *opaque), void *opaque)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the new thread's from the start */
    const int rc = pthread_create(thread, NULL, run, opaque);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return vmm_error_set(-rc, "starting the thread %s", name);
    pthread_setname_np(*thread, name);
    return 0;
}
