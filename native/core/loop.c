/* SPDX-License-Identifier: Apache-2.0 */
/* The I/O thread: epoll, and a lock that is taken only between batches of events. */
#include "core/loop.h"
#include "base/thread.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define BATCH 64 /* events taken at a time; more wait in epoll for the next turn */

struct vmm_loop {
    struct vmm_vm *vm;
    int epoll, wake;
    pthread_t thread;
    _Atomic bool started; /* set once, under lock */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t pauses;
    bool parked, ending;
    uint64_t turns; /* batches finished */
    void (*active)(struct vmm_vm *vm);
};

/* ---- the thread ---- */

static void drain(int fd)
{
    uint64_t count;
    ssize_t n = read(fd, &count, sizeof(count)); /* non-blocking: empty is as good */
    (void)n;
}

static void dispatch(struct vmm_loop *loop, const struct epoll_event *events, int n)
{
    for (int i = 0; i < n; i++) {
        struct vmm_source *source = events[i].data.ptr;
        if (!source)
            drain(loop->wake);
        else if (atomic_load(&source->live))
            source->ready(source, events[i].events);
    }
}

/* Between two batches: let waiters see that one has ended, park while asked to. false: the end. */
static bool turn(struct vmm_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    loop->turns++;
    loop->parked = true;
    pthread_cond_broadcast(&loop->changed);
    while (loop->pauses && !loop->ending)
        pthread_cond_wait(&loop->changed, &loop->lock);
    loop->parked = false;
    bool go_on = !loop->ending;
    pthread_mutex_unlock(&loop->lock);
    return go_on;
}

static void *loop_main(void *opaque)
{
    struct vmm_loop *loop = opaque;
    struct epoll_event events[BATCH];
    while (turn(loop)) {
        int n = epoll_wait(loop->epoll, events, BATCH, -1);
        const bool watched = atomic_load(&loop->vm->requests) & VMM_REQUEST_WATCH;
        dispatch(loop, events, n);
        if (unlikely(watched)) /* its watcher set `active` before */
            loop->active(loop->vm);
    }
    return NULL;
}

static int start_locked(struct vmm_loop *loop)
{
    const int rc = vmm_thread_start(&loop->thread, "vmm-io", loop_main, loop);
    if (rc == 0)
        atomic_store(&loop->started, true);
    return rc;
}

static void wake(struct vmm_loop *loop)
{
    uint64_t one = 1;
    ssize_t n = write(loop->wake, &one, sizeof(one)); /* full: it is readable anyway */
    (void)n;
}

/* ---- life ---- */

static struct vmm_loop *loop_create(struct vmm_vm *vm)
{
    struct vmm_loop *loop = calloc(1, sizeof(*loop));
    if (!loop) {
        vmm_error_set(-ENOMEM, "no memory for the I/O thread");
        return NULL;
    }
    loop->vm = vm;
    pthread_mutex_init(&loop->lock, NULL);
    vmm_cond_init(&loop->changed);
    loop->epoll = epoll_create1(EPOLL_CLOEXEC);
    loop->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (loop->epoll < 0 || loop->wake < 0 || epoll_ctl(loop->epoll, EPOLL_CTL_ADD, loop->wake, &event) < 0) {
        vmm_error_errno("epoll for the I/O thread");
        vmm_loop_destroy(loop);
        return NULL;
    }
    return loop;
}

vmm_loop *vmm_vm_loop(struct vmm_vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    if (!vm->loop)
        vm->loop = loop_create(vm);
    struct vmm_loop *loop = vm->loop;
    pthread_mutex_unlock(&vm->lock);
    return loop;
}

void vmm_loop_destroy(vmm_loop *loop)
{
    if (!loop)
        return;
    pthread_mutex_lock(&loop->lock);
    bool started = loop->started;
    loop->ending = true;
    pthread_cond_broadcast(&loop->changed);
    pthread_mutex_unlock(&loop->lock);
    if (started) {
        wake(loop);
        pthread_join(loop->thread, NULL);
    }
    if (loop->epoll >= 0)
        close(loop->epoll);
    if (loop->wake >= 0)
        close(loop->wake);
    pthread_cond_destroy(&loop->changed);
    pthread_mutex_destroy(&loop->lock);
    free(loop);
}

/* ---- sources ---- */

int vmm_loop_add(vmm_loop *loop, struct vmm_source *source, uint32_t events)
{
    pthread_mutex_lock(&loop->lock);
    int rc = loop->started ? 0 : start_locked(loop);
    pthread_mutex_unlock(&loop->lock);
    if (rc < 0)
        return rc;
    struct epoll_event event = {.events = events, .data.ptr = source};
    atomic_store(&source->live, true);
    if (epoll_ctl(loop->epoll, EPOLL_CTL_ADD, source->fd, &event) < 0) {
        atomic_store(&source->live, false);
        return vmm_error_errno("EPOLL_CTL_ADD");
    }
    return 0;
}

int vmm_loop_modify(vmm_loop *loop, struct vmm_source *source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    return epoll_ctl(loop->epoll, EPOLL_CTL_MOD, source->fd, &event) < 0 ? vmm_error_errno("EPOLL_CTL_MOD")
                                                                         : 0;
}

void vmm_loop_remove(vmm_loop *loop, struct vmm_source *source)
{
    if (atomic_exchange(&source->live, false))
        epoll_ctl(loop->epoll, EPOLL_CTL_DEL, source->fd, NULL);
}

bool vmm_loop_current(const vmm_loop *loop)
{
    return loop->started && pthread_equal(loop->thread, pthread_self());
}

void vmm_loop_on_activity(vmm_loop *loop, void (*active)(struct vmm_vm *vm))
{
    loop->active = active;
}

/* ---- from other threads ---- */

void vmm_loop_sync(vmm_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    uint64_t seen = loop->turns;
    if (loop->started && !loop->parked) {
        wake(loop);
        while (loop->turns == seen && !loop->ending)
            pthread_cond_wait(&loop->changed, &loop->lock);
    }
    pthread_mutex_unlock(&loop->lock);
}

void vmm_loop_request_pause(vmm_loop *loop)
{
    if (vmm_loop_current(loop))
        return;
    pthread_mutex_lock(&loop->lock);
    loop->pauses++;
    if (loop->started)
        wake(loop);
    pthread_mutex_unlock(&loop->lock);
}

bool vmm_loop_await_pause(vmm_loop *loop, const struct timespec *until)
{
    if (vmm_loop_current(loop))
        return true;
    int late = 0;
    pthread_mutex_lock(&loop->lock);
    while (loop->started && !loop->parked && !loop->ending && !late)
        late = vmm_cond_wait_until(&loop->changed, &loop->lock, until);
    const bool parked = !loop->started || loop->parked || loop->ending;
    pthread_mutex_unlock(&loop->lock);
    return parked;
}

void vmm_loop_pause(vmm_loop *loop)
{
    vmm_loop_request_pause(loop);
    (void)vmm_loop_await_pause(loop, NULL);
}

void vmm_loop_resume(vmm_loop *loop)
{
    if (vmm_loop_current(loop))
        return;
    pthread_mutex_lock(&loop->lock);
    if (loop->pauses)
        loop->pauses--;
    pthread_cond_broadcast(&loop->changed);
    pthread_mutex_unlock(&loop->lock);
}
