/* SPDX-License-Identifier: Apache-2.0 */
#include "core/bucket.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define NS 1000000000ull
#define TICK_NS 1000000ull /* the timer rings at most a thousand times a second, whatever the rate */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

uint64_t vmm_bucket_opens(const struct vmm_bucket *bucket, uint64_t now)
{
    return !bucket->rate || bucket->full_at < now + VMM_BUCKET_DEPTH_NS
               ? now
               : bucket->full_at - VMM_BUCKET_DEPTH_NS + 1;
}

void vmm_bucket_take(struct vmm_bucket *bucket, uint64_t n, uint64_t now)
{
    if (!bucket->rate)
        return;
    /* A byte a second and a request of 4 GiB: a century in nanoseconds still fits. */
    const __uint128_t cost = ((__uint128_t)n * NS + bucket->rate - 1) / bucket->rate;
    const uint64_t from = bucket->full_at > now ? bucket->full_at : now;
    bucket->full_at = cost < UINT64_MAX / 4 - from ? from + (uint64_t)cost : UINT64_MAX / 4;
}

static void timer_rang(struct vmm_source *source, uint32_t events)
{
    struct vmm_limiter *limiter = source->opaque;
    uint64_t times;
    (void)events;
    if (read(source->fd, &times, sizeof(times)) != sizeof(times))
        return; /* set anew in between */
    limiter->waiting = false;
    limiter->again(limiter->opaque);
}

int vmm_limiter_init(struct vmm_limiter *limiter, vmm_loop *loop, uint64_t bytes, uint64_t operations,
                     void (*again)(void *opaque), void *opaque)
{
    *limiter = (struct vmm_limiter){
        .bytes.rate = bytes, .operations.rate = operations, .loop = loop, .again = again, .opaque = opaque};
    if (!vmm_limiter_limits(limiter))
        return 0;
    const int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (fd < 0)
        return vmm_error_errno("timerfd for a rate limit");
    limiter->timer.fd = fd;
    limiter->timer.ready = timer_rang;
    limiter->timer.opaque = limiter;
    const int rc = vmm_loop_add(loop, &limiter->timer, EPOLLIN);
    if (rc < 0) {
        close(fd);
        *limiter = (struct vmm_limiter){0};
    }
    return rc;
}

void vmm_limiter_stop(struct vmm_limiter *limiter)
{
    if (vmm_limiter_limits(limiter))
        vmm_loop_remove(limiter->loop, &limiter->timer);
}

void vmm_limiter_deinit(struct vmm_limiter *limiter)
{
    if (vmm_limiter_limits(limiter))
        close(limiter->timer.fd);
    *limiter = (struct vmm_limiter){0};
}

bool vmm_limiter_open(struct vmm_limiter *limiter)
{
    if (!vmm_limiter_limits(limiter))
        return true;
    const uint64_t now = now_ns();
    const uint64_t bytes = vmm_bucket_opens(&limiter->bytes, now);
    const uint64_t operations = vmm_bucket_opens(&limiter->operations, now);
    uint64_t opens = bytes > operations ? bytes : operations;
    if (opens <= now) {
        limiter->waiting = false;
        return true;
    }
    if (!limiter->waiting) {
        limiter->throttled++;
        opens = opens < now + TICK_NS ? now + TICK_NS : opens;
        const struct itimerspec at = {
            .it_value = {.tv_sec = (time_t)(opens / NS), .tv_nsec = (long)(opens % NS)}};
        timerfd_settime(limiter->timer.fd, TFD_TIMER_ABSTIME, &at, NULL);
        limiter->waiting = true;
    }
    return false;
}

void vmm_limiter_charge(struct vmm_limiter *limiter, uint64_t bytes)
{
    if (!vmm_limiter_limits(limiter))
        return;
    const uint64_t now = now_ns();
    vmm_bucket_take(&limiter->bytes, bytes, now);
    vmm_bucket_take(&limiter->operations, 1, now);
}
