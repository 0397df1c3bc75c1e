/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's end of a disk: bytes [0, size) behind reads, writes, flushes, discards and zeroing. It knows no device,
 * no ring and no lock: its user holds one around every call.
 *
 *     vmm_disk_start(disk, &io)      over at once (page cache), or under way: io.done is called later
 *     vmm_disk_turn(disk)            after a batch of starts, and whenever vmm_disk_fd(disk) is readable
 *
 * Promises
 *   A write that is over is seen by every read started afterwards. A flush that is over without an error has put
 *   on stable storage every write that was over when it started. Once flushing has failed, the host may have
 *   dropped what it could not write, so every later flush fails too.
 *   A read that ends in an error may have filled a part of its buffers; a write may have changed a part of its range.
 */
#ifndef VMM_DISK_DISK_H
#define VMM_DISK_DISK_H

#include "disk/bounce.h"
#include "disk/host_io.h"
#include "vmmblk.h"

enum vmm_disk_op { VMM_DISK_READ, VMM_DISK_WRITE, VMM_DISK_FLUSH, VMM_DISK_DISCARD, VMM_DISK_ZERO };

/* One operation. It and its buffers stay the caller's, and stay put until it is over. */
struct vmm_disk_io {
    enum vmm_disk_op op;
    bool unmap;        /* ZERO: the range may be given back to the host's file system */
    bool through;      /* WRITE, ZERO, DISCARD: on stable storage when it is over */
    uint64_t at, size; /* inside the disk, in whole sectors; FLUSH: not used */
    struct iovec *iov; /* READ, WRITE: `size` bytes in all; consumed on the way */
    unsigned n_iov;
    void (*done)(struct vmm_disk_io *io);
    /* When it is over. */
    int error;         /* 0 or -errno; -ENODATA: the file ends before */
    uint64_t finished; /* bytes from `at` on that were read or written */
    bool unkept;       /* the error is an undo log's: it could not keep what the disk holds */
    /* The disk's own. */
    struct vmm_host_io_op op_under_way;
    struct vmm_disk *disk;
    bool over, later;  /* later: vmm_disk_start has returned false */
    bool stalled;      /* the last step wrote something, and none of it counts (vmm_disk_kind.written) */
    int allocate_mode; /* of the fallocate under way; 0: none is */
    struct vmm_disk_io *next; /* in one of the disk's lists */
    uint64_t piece;           /* bytes under way */
    unsigned cut;             /* pieces of iov under way; the last is shortened to end with the piece */
    size_t cut_size;          /* what it was before */
    uint8_t *bounce;          /* stands in for buffers that O_DIRECT cannot use */
    uint8_t *buffer;          /* of disk->bounce; NULL: none */
    struct iovec bounce_iov;  /* what is under way in place of iov; its base is NULL else */
    struct vmm_disk_io **allocating; /* in disk->allocating: the link that points here */
    struct vmm_disk_io *next_allocating;
};

/* true: over already, io->error says how, io->done is not called. */
bool vmm_disk_start(struct vmm_disk *disk, struct vmm_disk_io *io);
/* Hand the host what was gathered, in one system call; call io.done of what is over. Was anything? */
bool vmm_disk_turn(struct vmm_disk *disk);
int vmm_disk_fd(const struct vmm_disk *disk); /* -1: everything is over at once */

/* Wait until nothing is under way; io.done is called on the way. cancel: no operation takes another step. */
void vmm_disk_drain(struct vmm_disk *disk, bool cancel);

/* Another size. follow: the file has it already. -EBUSY: not while an undo log or a dirty log is open. */
int vmm_disk_resize(struct vmm_disk *disk, uint64_t size, bool follow);

/* ---- kinds of disks: raw.c, overlay.c ---- */

/* Where bytes of the disk lie. */
struct vmm_extent {
    int fd; /* -1: nowhere; they read as zeros */
    uint64_t at, size;
};

enum { VMM_DISK_WAIT = 1 };

/* What a kind adds. All but map and resize may be NULL: nothing is to be done. */
struct vmm_disk_kind {
    /* Where does the run that starts at `at` lie? Returns at least one byte of it and at most `size`. */
    struct vmm_extent (*map)(struct vmm_disk *disk, uint64_t at, uint64_t size);
    /* Before [at, at + size) is written, in disk->fd at data_at + at. VMM_DISK_WAIT: not yet, another operation first. */
    int (*prepare)(struct vmm_disk *disk, struct vmm_disk_io *io, uint64_t at, uint64_t size);
    /* n bytes of `size` have been written. Returns how many of them count; the others are written again. */
    uint64_t (*written)(struct vmm_disk *disk, uint64_t at, uint64_t n, uint64_t size);
    /* A flush: note what is to be recorded; once data are stable, record it (> 0: sync again); it is over. */
    int (*begin_flush)(struct vmm_disk *disk);
    int (*record)(struct vmm_disk *disk);
    void (*end_flush)(struct vmm_disk *disk);
    int (*resize)(struct vmm_disk *disk, uint64_t size, bool follow);
    void (*close)(struct vmm_disk *disk);
};

struct vmm_disk_list {
    struct vmm_disk_io *first, **last;
};

struct vmm_disk {
    const struct vmm_disk_kind *kind;
    struct vmm_host_io host_io;
    struct vmm_bounce bounce;
    int fd;                 /* what is written */
    uint64_t size, data_at; /* bytes of the disk; where they begin in fd */
    uint64_t end;           /* raw.c: of the file, within the last sector; zeros come after it */
    uint32_t alignment;     /* O_DIRECT: of offsets, sizes and addresses; else 1 */
    bool no_punch, no_zero; /* the host's file system cannot */
    bool cancelling;
    unsigned under_way; /* operations started and not over */

    struct vmm_disk_list waiting;   /* for others to be settled */
    struct vmm_disk_io *allocating; /* under way, and not settled */

    struct vmm_disk_list flush_next, flush_now;
    struct vmm_host_io_op flush_op;
    bool recorded;    /* this round's record was made */
    int flush_failed; /* the first error; every flush answers it from then on */

    struct vmm_overlay *overlay;
    struct vmm_undo *undo;        /* the logs that are open: undo.h */
    struct vmm_disk_dirty *dirty; /* likewise: dirty.h */
};

/* All of a file's [at, at + n), or as much as there is; -errno. */
int64_t vmm_disk_read_whole(int fd, uint8_t *to, uint64_t n, uint64_t at);
int vmm_disk_write_whole(int fd, const uint8_t *from, uint64_t n, uint64_t at);
/* What the disk's [at, at + size) holds, as its kind maps it. 0 or -errno; -ENODATA: a file ends before. */
int vmm_disk_read_now(struct vmm_disk *disk, uint64_t at, uint64_t size, uint8_t *to);

/* With its own descriptor of fd's open file. */
int vmm_disk_create(const struct vmm_disk_kind *kind, int fd, uint64_t size, uint64_t data_at,
                    uint32_t alignment, uint32_t flags, struct vmm_disk **out);

#endif
