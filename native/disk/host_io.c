/* SPDX-License-Identifier: Apache-2.0 */
#include "disk/host_io.h"

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

static int enter(const struct vmm_host_io *host, uint32_t submit, uint32_t complete, uint32_t flags)
{
    return (int)syscall(__NR_io_uring_enter, host->ring, submit, complete, flags, NULL, 0);
}

static bool map_ring(struct vmm_host_io *host, const struct io_uring_params *p)
{
    const size_t sq = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    const size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    host->rings_size = sq > cq ? sq : cq;
    host->sqes_size = p->sq_entries * sizeof(struct io_uring_sqe);
    const int prot = PROT_READ | PROT_WRITE;
    host->rings = mmap(NULL, host->rings_size, prot, MAP_SHARED, host->ring, IORING_OFF_SQ_RING);
    host->sqes_map = mmap(NULL, host->sqes_size, prot, MAP_SHARED, host->ring, IORING_OFF_SQES);
    if (host->rings == MAP_FAILED || host->sqes_map == MAP_FAILED)
        return false;
    uint8_t *rings = host->rings;
    host->sqes = host->sqes_map;
    host->cqes = (void *)(rings + p->cq_off.cqes);
    host->sq_head = (void *)(rings + p->sq_off.head);
    host->sq_tail = (void *)(rings + p->sq_off.tail);
    host->cq_head = (void *)(rings + p->cq_off.head);
    host->cq_tail = (void *)(rings + p->cq_off.tail);
    host->sq_array = (void *)(rings + p->sq_off.array);
    host->sq_entries = p->sq_entries;
    host->sq_mask = p->sq_entries - 1;
    host->cq_mask = p->cq_entries - 1;
    return true;
}

void vmm_host_io_init(struct vmm_host_io *host, bool blocking)
{
    *host = (struct vmm_host_io){.ring = -1, .rings = MAP_FAILED, .sqes_map = MAP_FAILED};
    if (blocking)
        return;
    /* Completions need not interrupt the thread: it looks when it next enters the kernel (Linux 5.19). */
    struct io_uring_params p = {.flags = IORING_SETUP_COOP_TASKRUN};
    host->ring = (int)syscall(__NR_io_uring_setup, VMM_HOST_IO_DEPTH, &p);
    if (host->ring < 0 && errno == EINVAL) {
        p = (struct io_uring_params){0};
        host->ring = (int)syscall(__NR_io_uring_setup, VMM_HOST_IO_DEPTH, &p);
    }
    /* One mapping for both rings: Linux 5.4; no loss of completions, stable iovecs: 5.5. Older: as if there was none. */
    const uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
    if (host->ring >= 0 && ((p.features & needed) != needed || !map_ring(host, &p)))
        vmm_host_io_deinit(host);
}

void vmm_host_io_deinit(struct vmm_host_io *host)
{
    if (host->ring < 0)
        return;
    if (host->rings != MAP_FAILED)
        munmap(host->rings, host->rings_size);
    if (host->sqes_map != MAP_FAILED)
        munmap(host->sqes_map, host->sqes_size);
    close(host->ring);
    host->ring = -1;
}

void vmm_host_io_submit(struct vmm_host_io *host)
{
    while (host->gathered) {
        const int n = enter(host, host->gathered, 0, 0);
        if (n >= 0)
            host->gathered -= (uint32_t)n;
        else if (errno != EINTR)
            sched_yield(); /* EAGAIN, EBUSY: the kernel is out of memory for requests; it frees some as they end */
    }
}

static int64_t gather(struct vmm_host_io *host, struct vmm_host_io_op *op, struct io_uring_sqe sqe)
{
    if (host->gathered == host->sq_entries)
        vmm_host_io_submit(host);
    const uint32_t tail = atomic_load_explicit(host->sq_tail, memory_order_relaxed); /* ours alone */
    const uint32_t slot = tail & host->sq_mask;
    sqe.user_data = (uintptr_t)op;
    host->sqes[slot] = sqe;
    host->sq_array[slot] = slot;
    atomic_store_explicit(host->sq_tail, tail + 1, memory_order_release); /* after the entry */
    host->gathered++;
    host->under_way++;
    return VMM_HOST_IO_PENDING;
}

bool vmm_host_io_reap(struct vmm_host_io *host)
{
    if (!host->under_way)
        return false;
    bool any = false;
    uint32_t head = atomic_load_explicit(host->cq_head, memory_order_relaxed); /* ours alone */
    while (head != atomic_load_explicit(host->cq_tail, memory_order_acquire)) {
        const struct io_uring_cqe cqe = host->cqes[head & host->cq_mask];
        atomic_store_explicit(host->cq_head, ++head, memory_order_release); /* after it was copied */
        host->under_way--;
        struct vmm_host_io_op *op = (void *)(uintptr_t)cqe.user_data;
        op->done(op, cqe.res);
        any = true;
    }
    return any;
}

void vmm_host_io_wait(struct vmm_host_io *host)
{
    if (!host->under_way)
        return;
    vmm_host_io_submit(host);
    enter(host, 0, 1, IORING_ENTER_GETEVENTS); /* interrupted: the caller asks again */
}

/* ---- operations ---- */

static int64_t result_of(int64_t n)
{
    return n < 0 ? -errno : n;
}

/* The page cache, if it answers at once. VMM_HOST_IO_PENDING: it does not. */
static int64_t try_page_cache(struct vmm_host_io *host, bool write, int fd, const struct iovec *iov,
                              unsigned n_iov, uint64_t at)
{
    if (!write) {
        if (host->nowait_refused)
            return VMM_HOST_IO_PENDING;
        const int64_t n = result_of(preadv2(fd, iov, (int)n_iov, (off_t)at, RWF_NOWAIT));
        host->nowait_refused = n == -EOPNOTSUPP;
        return n == -EAGAIN || n == -EOPNOTSUPP ? VMM_HOST_IO_PENDING : n;
    }
    const uint64_t began = now_ns();
    if (began < host->slow_until)
        return VMM_HOST_IO_PENDING;
    const int64_t n = result_of(pwritev(fd, iov, (int)n_iov, (off_t)at));
    const uint64_t ended = now_ns();
    if (ended - began > WRITE_SLOW_NS)
        host->slow_until = ended + WRITE_SLOW_FOR_NS;
    return n;
}

int64_t vmm_host_io_transfer(struct vmm_host_io *host, struct vmm_host_io_op *op, bool write, bool direct,
                             int fd, const struct iovec *iov, unsigned n_iov, uint64_t size, uint64_t at)
{
    if (host->ring < 0)
        return result_of(write ? pwritev(fd, iov, (int)n_iov, (off_t)at)
                               : preadv(fd, iov, (int)n_iov, (off_t)at));
    if (!direct && size <= INLINE_MAX) {
        const int64_t n = try_page_cache(host, write, fd, iov, n_iov, at);
        if (n != VMM_HOST_IO_PENDING)
            return n;
    }
    /* What is not tried here is not to be copied by the submission either. */
    return gather(host, op,
                  (struct io_uring_sqe){.opcode = write ? IORING_OP_WRITEV : IORING_OP_READV,
                                        .flags = !direct && size > INLINE_MAX ? IOSQE_ASYNC : 0,
                                        .fd = fd,
                                        .addr = (uintptr_t)iov,
                                        .len = n_iov,
                                        .off = at});
}

int64_t vmm_host_io_sync(struct vmm_host_io *host, struct vmm_host_io_op *op, int fd)
{
    if (host->ring < 0)
        return result_of(fdatasync(fd));
    return gather(
        host, op,
        (struct io_uring_sqe){.opcode = IORING_OP_FSYNC, .fd = fd, .fsync_flags = IORING_FSYNC_DATASYNC});
}

int64_t vmm_host_io_allocate(struct vmm_host_io *host, struct vmm_host_io_op *op, int fd, int mode,
                             uint64_t at, uint64_t size)
{
    if (host->ring < 0)
        return result_of(fallocate(fd, mode, (off_t)at, (off_t)size));
    return gather(
        host, op,
        (struct io_uring_sqe){
            .opcode = IORING_OP_FALLOCATE, .fd = fd, .off = at, .addr = size, .len = (uint32_t)mode});
}
