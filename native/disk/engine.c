/* SPDX-License-Identifier: Apache-2.0 */
#include "disk/engine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The most that is copied on the I/O thread at a time: about 35 us. More goes to a worker of the io_uring. */
#define INLINE_MAX (1u << 20)

/*
 * A buffered write that takes longer than this found the host throttling its writers (or its journal committing):
 * for a while writes wait in the io_uring's workers and not on the I/O thread. So the thread loses one slow write
 * in WRITE_SLOW_FOR_NS at most.
 */
#define WRITE_SLOW_NS 1000000ull
#define WRITE_SLOW_FOR_NS 100000000ull

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* ---- the ring ---- */

static int enter(const struct vmm_engine *engine, uint32_t submit, uint32_t complete, uint32_t flags)
{
    return (int)syscall(__NR_io_uring_enter, engine->ring, submit, complete, flags, NULL, 0);
}

static bool map_ring(struct vmm_engine *engine, const struct io_uring_params *p)
{
    const size_t sq = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    const size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    engine->rings_size = sq > cq ? sq : cq;
    engine->sqes_size = p->sq_entries * sizeof(struct io_uring_sqe);
    const int prot = PROT_READ | PROT_WRITE;
    engine->rings = mmap(NULL, engine->rings_size, prot, MAP_SHARED, engine->ring, IORING_OFF_SQ_RING);
    engine->sqes_map = mmap(NULL, engine->sqes_size, prot, MAP_SHARED, engine->ring, IORING_OFF_SQES);
    if (engine->rings == MAP_FAILED || engine->sqes_map == MAP_FAILED)
        return false;
    uint8_t *rings = engine->rings;
    engine->sqes = engine->sqes_map;
    engine->cqes = (void *)(rings + p->cq_off.cqes);
    engine->sq_head = (void *)(rings + p->sq_off.head);
    engine->sq_tail = (void *)(rings + p->sq_off.tail);
    engine->cq_head = (void *)(rings + p->cq_off.head);
    engine->cq_tail = (void *)(rings + p->cq_off.tail);
    engine->sq_array = (void *)(rings + p->sq_off.array);
    engine->sq_entries = p->sq_entries;
    engine->sq_mask = p->sq_entries - 1;
    engine->cq_mask = p->cq_entries - 1;
    return true;
}

void vmm_engine_init(struct vmm_engine *engine, bool blocking)
{
    *engine = (struct vmm_engine){.ring = -1, .rings = MAP_FAILED, .sqes_map = MAP_FAILED};
    if (blocking)
        return;
    /* Completions need not interrupt the thread: it looks when it next enters the kernel (Linux 5.19). */
    struct io_uring_params p = {.flags = IORING_SETUP_COOP_TASKRUN};
    engine->ring = (int)syscall(__NR_io_uring_setup, VMM_ENGINE_DEPTH, &p);
    if (engine->ring < 0 && errno == EINVAL) {
        p = (struct io_uring_params){0};
        engine->ring = (int)syscall(__NR_io_uring_setup, VMM_ENGINE_DEPTH, &p);
    }
    /* One mapping for both rings: Linux 5.4; no loss of completions, stable iovecs: 5.5. Older: as if there was none. */
    const uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
    if (engine->ring >= 0 && ((p.features & needed) != needed || !map_ring(engine, &p)))
        vmm_engine_deinit(engine);
}

void vmm_engine_deinit(struct vmm_engine *engine)
{
    if (engine->ring < 0)
        return;
    if (engine->rings != MAP_FAILED)
        munmap(engine->rings, engine->rings_size);
    if (engine->sqes_map != MAP_FAILED)
        munmap(engine->sqes_map, engine->sqes_size);
    close(engine->ring);
    engine->ring = -1;
}

void vmm_engine_submit(struct vmm_engine *engine)
{
    while (engine->gathered) {
        const int n = enter(engine, engine->gathered, 0, 0);
        if (n >= 0)
            engine->gathered -= (uint32_t)n;
        else if (errno != EINTR)
            sched_yield(); /* EAGAIN, EBUSY: the kernel is out of memory for requests; it frees some as they end */
    }
}

static int64_t gather(struct vmm_engine *engine, struct vmm_engine_op *op, struct io_uring_sqe sqe)
{
    if (engine->gathered == engine->sq_entries)
        vmm_engine_submit(engine);
    const uint32_t tail = atomic_load_explicit(engine->sq_tail, memory_order_relaxed); /* ours alone */
    const uint32_t slot = tail & engine->sq_mask;
    sqe.user_data = (uintptr_t)op;
    engine->sqes[slot] = sqe;
    engine->sq_array[slot] = slot;
    atomic_store_explicit(engine->sq_tail, tail + 1, memory_order_release); /* after the entry */
    engine->gathered++;
    engine->under_way++;
    return VMM_ENGINE_PENDING;
}

bool vmm_engine_reap(struct vmm_engine *engine)
{
    if (!engine->under_way)
        return false;
    bool any = false;
    uint32_t head = atomic_load_explicit(engine->cq_head, memory_order_relaxed); /* ours alone */
    while (head != atomic_load_explicit(engine->cq_tail, memory_order_acquire)) {
        const struct io_uring_cqe cqe = engine->cqes[head & engine->cq_mask];
        atomic_store_explicit(engine->cq_head, ++head, memory_order_release); /* after it was copied */
        engine->under_way--;
        struct vmm_engine_op *op = (void *)(uintptr_t)cqe.user_data;
        op->done(op, cqe.res);
        any = true;
    }
    return any;
}

void vmm_engine_wait(struct vmm_engine *engine)
{
    if (!engine->under_way)
        return;
    vmm_engine_submit(engine);
    enter(engine, 0, 1, IORING_ENTER_GETEVENTS); /* interrupted: the caller asks again */
}

/* ---- operations ---- */

static int64_t result_of(int64_t n)
{
    return n < 0 ? -errno : n;
}

/* The page cache, if it answers at once. VMM_ENGINE_PENDING: it does not. */
static int64_t try_page_cache(struct vmm_engine *engine, bool write, int fd, const struct iovec *iov,
                              unsigned n_iov, uint64_t at)
{
    if (!write) {
        if (engine->nowait_refused)
            return VMM_ENGINE_PENDING;
        const int64_t n = result_of(preadv2(fd, iov, (int)n_iov, (off_t)at, RWF_NOWAIT));
        engine->nowait_refused = n == -EOPNOTSUPP;
        return n == -EAGAIN || n == -EOPNOTSUPP ? VMM_ENGINE_PENDING : n;
    }
    const uint64_t began = now_ns();
    if (began < engine->slow_until)
        return VMM_ENGINE_PENDING;
    const int64_t n = result_of(pwritev(fd, iov, (int)n_iov, (off_t)at));
    const uint64_t ended = now_ns();
    if (ended - began > WRITE_SLOW_NS)
        engine->slow_until = ended + WRITE_SLOW_FOR_NS;
    return n;
}

int64_t vmm_engine_transfer(struct vmm_engine *engine, struct vmm_engine_op *op, bool write, bool direct,
                            int fd, const struct iovec *iov, unsigned n_iov, uint64_t size, uint64_t at)
{
    if (engine->ring < 0)
        return result_of(write ? pwritev(fd, iov, (int)n_iov, (off_t)at)
                               : preadv(fd, iov, (int)n_iov, (off_t)at));
    if (!direct && size <= INLINE_MAX) {
        const int64_t n = try_page_cache(engine, write, fd, iov, n_iov, at);
        if (n != VMM_ENGINE_PENDING)
            return n;
    }
    /* What is not tried here is not to be copied by the submission either. */
    return gather(engine, op,
                  (struct io_uring_sqe){.opcode = write ? IORING_OP_WRITEV : IORING_OP_READV,
                                        .flags = !direct && size > INLINE_MAX ? IOSQE_ASYNC : 0,
                                        .fd = fd,
                                        .addr = (uintptr_t)iov,
                                        .len = n_iov,
                                        .off = at});
}

int64_t vmm_engine_sync(struct vmm_engine *engine, struct vmm_engine_op *op, int fd)
{
    if (engine->ring < 0)
        return result_of(fdatasync(fd));
    return gather(
        engine, op,
        (struct io_uring_sqe){.opcode = IORING_OP_FSYNC, .fd = fd, .fsync_flags = IORING_FSYNC_DATASYNC});
}

int64_t vmm_engine_allocate(struct vmm_engine *engine, struct vmm_engine_op *op, int fd, int mode,
                            uint64_t at, uint64_t size)
{
    if (engine->ring < 0)
        return result_of(fallocate(fd, mode, (off_t)at, (off_t)size));
    return gather(
        engine, op,
        (struct io_uring_sqe){
            .opcode = IORING_OP_FALLOCATE, .fd = fd, .off = at, .addr = size, .len = (uint32_t)mode});
}
