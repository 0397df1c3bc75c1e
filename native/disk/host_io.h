/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a disk's operations reach the host: at once where that costs a copy from the page cache, else through an
 * io_uring, else (no io_uring on this host) by system calls that block.
 *
 * Measured with 4 KiB on a file in the page cache: preadv2(RWF_NOWAIT) 0.75 us, io_uring 1.1 us alone and 0.87 us in
 * batches of 32. A buffered write to ext4, which io_uring gives to a worker: pwritev 1 us, io_uring 50 us. So the page
 * cache is asked first. A write to it blocks only when the host is short of clean pages: see WRITE_SLOW_NS.
 */
#ifndef VMM_DISK_HOST_IO_H
#define VMM_DISK_HOST_IO_H

#include "base/error.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <limits.h>
#include <sys/uio.h>

#define VMM_HOST_IO_DEPTH 256         /* operations under way at a time, as its users see to */
#define VMM_HOST_IO_PENDING INT64_MIN /* the result comes later, to op->done */

/* Embedded in what waits for the result. */
struct vmm_host_io_op {
    void (*done)(struct vmm_host_io_op *op, int64_t result);
};

struct io_uring_sqe;
struct io_uring_cqe;

struct vmm_host_io {
    int ring; /* -1: none */
    void *rings, *sqes_map;
    size_t rings_size, sqes_size;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    _Atomic uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t *sq_array, sq_mask, cq_mask, sq_entries;
    uint32_t gathered; /* in the submission ring, not yet handed over */
    uint32_t under_way;
    bool nowait_refused; /* the host's file system has no RWF_NOWAIT */
    uint64_t slow_until; /* ns: the page cache pushes back, writes do not go to it from here */
};

/* Never fails: without io_uring (or with `blocking`) operations block. */
void vmm_host_io_init(struct vmm_host_io *host, bool blocking);
void vmm_host_io_deinit(struct vmm_host_io *host); /* nothing under way */

/*
 * Each returns the result as the system call has it, -errno included, or VMM_HOST_IO_PENDING. `iov` stays put until
 * then. direct: the file is open with O_DIRECT.
 */
int64_t vmm_host_io_transfer(struct vmm_host_io *host, struct vmm_host_io_op *op, bool write, bool direct,
                             int fd, const struct iovec *iov, unsigned n_iov, uint64_t size, uint64_t at);
int64_t vmm_host_io_sync(struct vmm_host_io *host, struct vmm_host_io_op *op, int fd);
int64_t vmm_host_io_allocate(struct vmm_host_io *host, struct vmm_host_io_op *op, int fd, int mode,
                             uint64_t at, uint64_t size);

void vmm_host_io_submit(struct vmm_host_io *host);
bool vmm_host_io_reap(struct vmm_host_io *host); /* calls op->done of what is there; was there any? */
void vmm_host_io_wait(struct vmm_host_io *host); /* submit, and wait until there is something to reap */

#endif
