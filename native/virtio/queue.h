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
 * A chain has at most as many descriptors as the largest queue has (virtio 1.2, 2.7.5.3.1 and 2.8.21.3), in the ring
 * and in an indirect table together. A descriptor that crosses from one region of memory into the next becomes two
 * pieces; there are two regions of RAM, and no driver has more than a few such descriptors in one chain.
 */
#define VMM_QUEUE_SIZE_MAX 256
#define VMM_CHAIN_PIECES (VMM_QUEUE_SIZE_MAX + 8)

/* One request: pieces of guest memory, first those the device reads, then those it writes. None is empty. */
struct vmm_chain {
    uint16_t id;    /* what push gives back: head index (split), buffer id (packed) */
    uint16_t slots; /* of the ring it holds until it is pushed; 1 in a split ring */
    uint32_t era;   /* of the queue, when it was popped: an answer that comes after a reset goes nowhere */
    uint16_t n_out, n_in;       /* pieces */
    uint64_t out_size, in_size; /* bytes; together below 4 GiB */
    struct vmm_vm *vm;          /* whose memory it is: a log of dirty pages hears of what is written */
    struct iovec iov[VMM_CHAIN_PIECES];
};

enum vmm_queue_features {
    VMM_QUEUE_INDIRECT = 1,  /* VIRTIO_F_INDIRECT_DESC was agreed */
    VMM_QUEUE_EVENT_IDX = 2, /* VIRTIO_F_EVENT_IDX was agreed */
    VMM_QUEUE_PACKED = 4,    /* VIRTIO_F_RING_PACKED was agreed */
    /*
     * VIRTIO_F_IN_ORDER was agreed: push is called in the order of pop. Every buffer still gets a used entry of its
     * own: one entry for a batch would say that those it skips were written completely (2.7.9, 2.8.8).
     */
    VMM_QUEUE_IN_ORDER = 8,
};

struct vmm_queue {
    /* What the driver configured; plain values, checked by start. */
    uint16_t size;                 /* split: a power of two; packed: any; 1..VMM_QUEUE_SIZE_MAX */
    uint64_t desc, driver, device; /* guest-physical: descriptor table, driver area, device area */
    /* While started. */
    struct vmm_vm *vm;
    uint32_t features; /* enum vmm_queue_features */
    bool started;      /* rings are in use; false again once broken */
    const char *fault; /* not NULL: broken, and why (a sentence without its subject); points at fault_text */
    uint8_t *host_desc, *host_driver, *host_device;
    uint16_t avail, used; /* next to take, next to fill; split: free-running; packed: slot, wrap bit in 15 */
    uint16_t seen;        /* split: the driver's index when last read; [avail, seen) is there to take */
    uint16_t held;        /* slots popped, not yet pushed: never more than size, so neither are chains */
    uint16_t in_flight;   /* chains popped, not yet pushed */
    uint32_t era;         /* counts starts */
    uint16_t pushed;      /* split: entries, packed: slots; pushed, not yet published */
    uint16_t first_slot;  /* packed: of the first pushed, not yet published; its flags are written last */
    uint16_t first_flags;
    char fault_text[112];
    /* Statistics. requests counts pops; bytes are counted by push, interrupts by publish, doorbells by who hears them. */
    uint64_t requests, bytes_out, bytes_in, doorbells, interrupts;
};

/*
 * Check what the driver configured and begin at the start of the rings: areas aligned (2.7, 2.8.10.1), each inside one
 * region of memory. -EINVAL: q->fault says what is wrong.
 */
int vmm_queue_start(struct vmm_queue *q, struct vmm_vm *vm, uint32_t features);

/*
 * Where both sides of a ring stand with nothing in flight, and how to go on there, after start; -EINVAL: q->fault says
 * what is wrong.
 */
uint16_t vmm_queue_position(const struct vmm_queue *q);
int vmm_queue_seek(struct vmm_queue *q, uint16_t position);

/* Forget rings, configuration and fault. Statistics stay. On a queue not started or broken, what follows does nothing. */
void vmm_queue_reset(struct vmm_queue *q);

/* Take the next request. 1: *chain holds it; 0: there is none (*chain is left alone); -EPROTO: the queue is broken. */
int vmm_queue_pop(struct vmm_queue *q, struct vmm_chain *chain);

/* Is there a request to take? Reads one field of the ring. */
bool vmm_queue_waiting(struct vmm_queue *q);

/* Undo every pop since the mark; none of those chains may have been pushed. */
struct vmm_queue_mark {
    uint16_t avail;
    uint64_t requests;
};
struct vmm_queue_mark vmm_queue_mark(const struct vmm_queue *q);
void vmm_queue_rewind(struct vmm_queue *q, struct vmm_queue_mark mark);

/*
 * Answer a request: `written` bytes, from the first device-writable one, were filled, and dirty logs hear of them: of
 * what a device filled beyond, or long before, it tells them itself (vmm_vm_wrote). Seen after publish.
 */
void vmm_queue_push(struct vmm_queue *q, const struct vmm_chain *chain, uint32_t written);

/* Let the driver see what was pushed. true: it wants an interrupt for it. */
bool vmm_queue_publish(struct vmm_queue *q);

/* Doorbells: ask for none; ask for one with the next request. arm answers true when requests wait already. */
void vmm_queue_suppress(struct vmm_queue *q);
bool vmm_queue_arm(struct vmm_queue *q);

/* ---- bytes of a chain ---- */

/* Copy out of the device-readable part from byte `at`; returns how many there were (less than n at the end). */
size_t vmm_chain_read(const struct vmm_chain *chain, uint64_t at, void *to, size_t n);
/* Copy into the device-writable part from byte `at`, for dirty logs as well; returns how many fitted. */
size_t vmm_chain_write(const struct vmm_chain *chain, uint64_t at, const void *from, size_t n);
/*
 * The pieces of [at, at + n) of one part (in: the device-writable one) in iov: for readv, writev and their like.
 * Returns how many pieces; stops early at the end of the part. `iov` has room for VMM_CHAIN_PIECES.
 */
unsigned vmm_chain_slice(const struct vmm_chain *chain, bool in, uint64_t at, uint64_t n, struct iovec *iov);

#endif
