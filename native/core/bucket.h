/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rate limits: a token bucket for bytes and one for operations, and a timer that says when to go on.
 *
 * A bucket holds one second's worth and fills at its rate. A caller that finds it open takes what one request needs, more
 * than is left if need be: the debt is waited off by the next. So a request larger than the bucket passes, and
 * no caller has to know a request's size before taking it from its ring.
 *
 *     while (vmm_limiter_open(&limiter) && ... take one request ...)
 *         vmm_limiter_charge(&limiter, bytes);
 *
 * A closed limiter has set its timer: `again` is called on the I/O thread when it is open. No lock is taken here;
 * the caller's holds around open and charge, and `again` takes it itself.
 */
#ifndef VMM_CORE_BUCKET_H
#define VMM_CORE_BUCKET_H

#include "core/loop.h"

/*
 * A bucket is one moment: when it will be full again, if nothing more is taken. Taking n moves it n / rate seconds
 * on; the bucket is empty while it lies more than the bucket's depth, one second, ahead.
 */
struct vmm_bucket {
    uint64_t rate;    /* a second; 0: no limit */
    uint64_t full_at; /* ns of CLOCK_MONOTONIC */
};

#define VMM_BUCKET_DEPTH_NS 1000000000ull

/* When something may be taken: `now` or earlier, or the moment to wait for. */
uint64_t vmm_bucket_opens(const struct vmm_bucket *bucket, uint64_t now);
void vmm_bucket_take(struct vmm_bucket *bucket, uint64_t n, uint64_t now);

struct vmm_limiter {
    struct vmm_bucket bytes, operations;
    vmm_loop *loop;
    struct vmm_source timer;
    _Atomic bool waiting; /* the timer is set */
    void (*again)(void *opaque);
    void *opaque;
    uint64_t throttled; /* how often it was found closed */
};

/* Rates a second, 0 for no limit. -errno: no timer (vmm_error_text). A zeroed limiter has no limits. */
int vmm_limiter_init(struct vmm_limiter *limiter, vmm_loop *loop, uint64_t bytes, uint64_t operations,
                     void (*again)(void *opaque), void *opaque);
/* After the I/O thread has ended, or has been told to forget the timer by vmm_limiter_stop and vmm_loop_sync. */
void vmm_limiter_deinit(struct vmm_limiter *limiter);
void vmm_limiter_stop(struct vmm_limiter *limiter);

static inline bool vmm_limiter_limits(const struct vmm_limiter *limiter)
{
    return limiter->bytes.rate || limiter->operations.rate;
}

/* May a request go? If not, `again` will be called. */
bool vmm_limiter_open(struct vmm_limiter *limiter);
void vmm_limiter_charge(struct vmm_limiter *limiter, uint64_t bytes);

#endif
