/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Virtqueues, the device's side (virtio 1.2, 2.7 split and 2.8 packed). Rings only: no device, no transport.
 *
 * The guest is the adversary. Every field of its memory is copied once, checked, then used; a chain is a copy
 * of its own, so what the guest writes afterwards changes nothing. Whatever breaks the rules makes the queue
 * broken: pop answers -errno from then on, and `fault` says in words what the guest did.
 *
 * A queue has no lock: its device's lock is held around every call (see virtio.h).
 *
 * The life of a device's queue handler
 *
 *     do {
 *         vmm_queue_suppress(q);
 *         while (vmm_queue_pop(q, &chain) == 1) {
 *             ... read chain.iov[0 .. n_out), write chain.iov[n_out .. n_out + n_in) ...
 *             vmm_queue_push(q, &chain, written);      now or later, in any order
 *         }
 *         if (vmm_queue_publish(q))
 *             ... interrupt ...
 *     } while (vmm_queue_arm(q));                       true: buffers came in between, no doorbell will ring
 */
#ifndef VMM_VIRTIO_QUEUE_H
#define VMM_VIRTIO_QUEUE_H

#include "core/core.h"

#include <sys/uio.h>

/*
 * As many pieces as a chain may have: a chain is at most as long as its queue (virtio 1.2, 2.7.5.3.1), and a
 * descriptor that crosses from one memory region into the next becomes two pieces. There are two regions of RAM.
 */
#define VMM_QUEUE_SIZE_MAX 256
#define VMM_CHAIN_PIECES (VMM_QUEUE_SIZE_MAX + 8)

/* One request: pieces of guest memory, first those the device reads, then those it writes. None is empty. */
struct vmm_chain {
    uint16_t id;                /* what push gives back: head index (split), buffer id (packed) */
    uint16_t slots;             /* packed: descriptors it took in the ring */
    uint16_t n_out, n_in;       /* pieces */
    uint64_t out_size, in_size; /* bytes; together below 4 GiB */
    struct iovec iov[VMM_CHAIN_PIECES];
};

enum vmm_queue_features {
    VMM_QUEUE_INDIRECT = 1,  /* VIRTIO_F_INDIRECT_DESC was agreed */
    VMM_QUEUE_EVENT_IDX = 2, /* VIRTIO_F_EVENT_IDX was agreed */
    VMM_QUEUE_PACKED = 4,    /* VIRTIO_F_RING_PACKED was agreed */
    VMM_QUEUE_IN_ORDER = 8,  /* VIRTIO_F_IN_ORDER was agreed: push is called in the order of pop */
};

struct vmm_queue {
    /* What the driver configured; plain values, checked by start. */
    uint16_t size;                 /* split: a power of two; packed: any; 1..VMM_QUEUE_SIZE_MAX */
    uint64_t desc, driver, device; /* guest-physical: descriptor table, driver area, device area */
    /* While started. */
    struct vmm_vm *vm;
    uint32_t features; /* enum vmm_queue_features */
    bool started;
    const char *fault; /* not NULL: broken, and why (a sentence without its subject) */
    uint8_t *host_desc, *host_driver, *host_device;
    uint16_t avail, used; /* split: next to take, next to fill; packed: with the wrap bit in 15 */
    uint16_t published;   /* `used` when interrupts were last decided */
    uint16_t pushed;      /* pushed, not yet published */
    uint16_t batch_start; /* packed: slot of the first pushed, not yet published */
    uint16_t batch_flags;
    uint16_t in_flight; /* popped, not yet pushed */
    bool decided;       /* published holds a value */
    /* Statistics, for whoever wants them. */
    uint64_t requests, bytes_out, bytes_in, doorbells, interrupts;
};

/* Check what the driver configured and begin at the start of the rings. -EINVAL: q->fault says what is wrong. */
int vmm_queue_start(struct vmm_queue *q, struct vmm_vm *vm, uint32_t features);

/* Forget rings and configuration. Statistics stay. */
void vmm_queue_reset(struct vmm_queue *q);

/* Take the next request. 1: *chain holds it; 0: there is none; -EPROTO: the queue is broken. */
int vmm_queue_pop(struct vmm_queue *q, struct vmm_chain *chain);

/* Is there a request to take? Reads one field of the ring. */
bool vmm_queue_waiting(struct vmm_queue *q);

/* Undo every pop since the mark; none of the chains may have been pushed. */
struct vmm_queue_mark {
    uint16_t avail, in_flight;
    uint64_t requests;
};
struct vmm_queue_mark vmm_queue_mark(const struct vmm_queue *q);
void vmm_queue_rewind(struct vmm_queue *q, struct vmm_queue_mark mark);

/* Answer a request: `written` bytes, from the first device-writable one, were filled. Seen after publish. */
void vmm_queue_push(struct vmm_queue *q, const struct vmm_chain *chain, uint32_t written);

/* Let the driver see what was pushed. true: it wants an interrupt for it. */
bool vmm_queue_publish(struct vmm_queue *q);

/* Doorbells: ask for none; ask for one with the next request. arm answers true when requests wait already. */
void vmm_queue_suppress(struct vmm_queue *q);
bool vmm_queue_arm(struct vmm_queue *q);

/* ---- bytes of a chain ---- */

/* Copy out of the device-readable part from byte `at`; answers how many there were (less than n at the end). */
size_t vmm_chain_read(const struct vmm_chain *chain, uint64_t at, void *to, size_t n);
/* Copy into the device-writable part from byte `at`; answers how many fitted. */
size_t vmm_chain_write(const struct vmm_chain *chain, uint64_t at, const void *from, size_t n);
/*
 * The pieces of [at, at + n) of one part (in: the device-writable one) in iov: for readv, writev and their like.
 * Answers how many pieces; stops early at the end of the part. `iov` has room for VMM_CHAIN_PIECES.
 */
unsigned vmm_chain_slice(const struct vmm_chain *chain, bool in, uint64_t at, uint64_t n, struct iovec *iov);

#endif
