/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front end's side of vhost-user (QEMU, docs/interop/vhost-user.rst): a device whose queues another process
 * serves. It gets guest memory and, for each queue, the rings' addresses, the doorbell and an eventfd to call us
 * with; after that its work meets us only in interrupts. Works for any device type; the device keeps its own
 * configuration space.
 *
 * The back end is trusted with guest memory, and with nothing else: it may write all of that at any moment, as any
 * device may by DMA, but whatever it says on the socket is checked, every answer has a deadline, and it cannot hold
 * or break anything but its own device.
 *
 * Call order
 *   vmm_vhost_user_open -> vmm_virtio_init -> vmm_vhost_user_attach -> start and stop from the device's ops of those
 *   names -> (the I/O thread is over) -> vmm_vhost_user_close
 * Threads: the device's lock is held around start and stop.
 */
#ifndef VMM_VIRTIO_VHOST_USER_H
#define VMM_VIRTIO_VHOST_USER_H

#include "virtio/virtio.h"

#define VMM_VHOST_USER_QUEUES_MAX 8

struct vmm_vhost_user_queue {
    int call; /* eventfd: the back end used buffers */
    struct vmm_source source;
    struct vmm_vhost_user *back_end;
    unsigned index;
    bool started;
};

struct vmm_vhost_user {
    int socket; /* -1: not open */
    bool lost;  /* gone, or not to be talked to any more */
    int reply_ms;
    char name[64];     /* what messages call the back end */
    uint64_t features; /* what the back end can do */
    struct vmm_virtio *device;
    struct vmm_source source; /* the socket's end */
    struct vmm_vhost_user_queue queues[VMM_VHOST_USER_QUEUES_MAX];
    unsigned n_queues;
    /*
     * May be NULL. The back end is lost: make sure that it touches guest memory no more, and answer what is known of
     * its reasons ("": nothing).
     */
    const char *(*abandon)(void *opaque);
    void *opaque;
};

/*
 * Take over `socket` and ask what the back end can do. `name` is what messages call it; reply_ms: from a request to
 * the end of its answer (a back end finishes the requests in flight before it answers a stop).
 * -EPIPE: it is gone; -ETIMEDOUT: it is silent; -EPROTO: it breaks the protocol or cannot do what is needed.
 */
int vmm_vhost_user_open(struct vmm_vhost_user *back_end, int socket, const char *name, int reply_ms);

/* After vmm_virtio_init: offer only what the back end can do as well; watch for its end. */
int vmm_vhost_user_attach(struct vmm_vhost_user *back_end, struct vmm_virtio *device);

/* Hand over the enabled queues. A back end that cannot take them breaks the device. */
void vmm_vhost_user_start(struct vmm_vhost_user *back_end);

/* Take the queues back: the back end has finished what was in flight, or is dead. */
void vmm_vhost_user_stop(struct vmm_vhost_user *back_end);

/* The same for one queue, while the others go on. */
void vmm_vhost_user_hand_over(struct vmm_vhost_user *back_end, unsigned queue);
void vmm_vhost_user_take_back(struct vmm_vhost_user *back_end, unsigned queue);

/* A zeroed or failed one is fine. */
void vmm_vhost_user_close(struct vmm_vhost_user *back_end);

#endif
