/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio console (virtio 1.2, 5.3) without F_MULTIPORT: queue 0 carries input, queue 1 output.
 *
 * All of it happens on the I/O thread. The console's listeners come on the host's threads, and only ring a doorbell.
 * No request is kept between two calls: what cannot go on is given back to its ring, and `sent` says how much of the
 * oldest transmit buffer is through.
 */
#include "vmmvconsole.h"

#include "devices/console.h"
#include "virtio/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { RECEIVE = 0, TRANSMIT = 1, QUEUES = 2, QUEUE_SIZE = 64 };
enum { F_SIZE = 0, F_EMERG_WRITE = 2 };

/*
 * Bytes of one turn on the I/O thread: a chain may name 4 GiB, and the machine's other devices wait no longer than
 * this takes.
 */
#define TURN (256u << 10)

/* virtio 1.2, 5.3.4 */
struct config {
    uint16_t cols, rows;
    uint32_t max_nr_ports, emerg_wr;
};
_Static_assert(sizeof(struct config) == 12 && offsetof(struct config, rows) == 2, "virtio 1.2, 5.3.4");

struct vmm_vconsole {
    struct vmm_virtio virtio;
    vmm_console *console;
    uint64_t sent;
    uint32_t turn;    /* what is left of it */
    uint16_t size[2]; /* columns and rows of the host's terminal */
};

/* Have the queue looked at again, on the I/O thread; from any thread, under any lock. */
static void look_again(struct vmm_vconsole *device, unsigned queue)
{
    vmm_virtqueue_ring(&device->virtio.queues[queue]);
}

static uint32_t receive(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    (void)queue;
    struct vmm_vconsole *device = opaque;
    if (chain->in_size == 0) {
        vmm_virtio_broken(&device->virtio, "a receive buffer has no byte to write to");
        return VMM_SERVE_LATER;
    }
    uint32_t given = 0; /* at most what the console's input queue holds */
    for (unsigned i = 0; i < chain->n_in; i++) {
        const struct iovec *piece = &chain->iov[chain->n_out + i];
        const size_t n = vmm_console_take(device->console, piece->iov_base, piece->iov_len);
        given += (uint32_t)n;
        if (n < piece->iov_len)
            break;
    }
    return given > 0 ? given : VMM_SERVE_LATER; /* on_input */
}

static uint32_t transmit(void *opaque, unsigned queue, struct vmm_chain *chain)
{
    struct vmm_vconsole *device = opaque;
    struct iovec pieces[VMM_CHAIN_PIECES];
    const unsigned n = vmm_chain_slice(chain, false, device->sent, device->turn, pieces);
    for (unsigned i = 0; i < n; i++) {
        const size_t taken = vmm_console_write(device->console, pieces[i].iov_base, pieces[i].iov_len);
        device->sent += taken;
        device->turn -= (uint32_t)taken;
        if (taken < pieces[i].iov_len)
            return VMM_SERVE_LATER; /* on_room */
    }
    /* A buffer that came back shorter than it went (the guest rewrote it meanwhile) is through as well. */
    if (device->sent < chain->out_size) {
        look_again(device, queue);
        return VMM_SERVE_LATER;
    }
    device->sent = 0;
    return 0;
}

static void kick(void *opaque, uint32_t queue)
{
    struct vmm_vconsole *device = opaque;
    device->turn = TURN;
    vmm_virtio_serve(&device->virtio, queue, queue == RECEIVE ? receive : transmit);
}

/* Linux reads the size when it is told of a change, and at no other time. */
static void start(void *opaque)
{
    struct vmm_virtio *dev = &((struct vmm_vconsole *)opaque)->virtio;
    if (vmm_virtio_has(dev, F_SIZE))
        vmm_virtio_config_interrupt(dev);
}

static void stop(void *opaque)
{
    struct vmm_vconsole *device = opaque;
    device->sent = 0;
}

static void forget(void *opaque, uint32_t queue)
{
    if (queue == TRANSMIT)
        stop(opaque);
}

/*
 * Emergency write (virtio 1.2, 5.3.4), the only bytes a driver may write: one character without queues, also before
 * DRIVER_OK; lost if there is no room.
 */
static void configure(void *opaque, uint32_t offset, uint32_t size)
{
    (void)size;
    struct vmm_vconsole *device = opaque;
    if (offset == offsetof(struct config, emerg_wr))
        vmm_console_put(device->console, device->virtio.config[offset]);
}

static void save(void *opaque, uint64_t *own)
{
    own[0] = ((struct vmm_vconsole *)opaque)->sent;
}

static int load(void *opaque, const uint64_t *own)
{
    struct vmm_vconsole *device = opaque;
    if (own[0] > UINT32_MAX) /* a chain is shorter */
        return vmm_error_set(-EINVAL, "%s: %llu bytes into a buffer", device->virtio.name,
                             (unsigned long long)own[0]);
    device->sent = own[0];
    return 0;
}

/* The terminal is another one than when the state was saved. */
static void resumed(void *opaque)
{
    struct vmm_vconsole *device = opaque;
    vmm_virtio_set_config(&device->virtio, 0, device->size, sizeof device->size);
}

static const vmm_virtio_ops ops = {.start = start,
                                   .kick = kick,
                                   .stop = stop,
                                   .forget = forget,
                                   .config = configure,
                                   .save = save,
                                   .load = load,
                                   .resumed = resumed};

static void input_came(void *opaque)
{
    look_again(opaque, RECEIVE);
}

static void room_came(void *opaque)
{
    look_again(opaque, TRANSMIT);
}

int vmm_vconsole_create(vmm_vm *vm, const char *name, vmm_console *console, uint16_t cols, uint16_t rows,
                        vmm_vconsole **out)
{
    struct vmm_vconsole *device = calloc(1, sizeof *device);
    if (!device)
        return vmm_error_set(-ENOMEM, "%s", name);
    const uint16_t sizes[QUEUES] = {QUEUE_SIZE, QUEUE_SIZE};
    const bool sized = cols || rows;
    const int rc = vmm_virtio_init(&device->virtio, vm, &ops, device, 3, name,
                                   (uint64_t)sized << F_SIZE | 1u << F_EMERG_WRITE, QUEUES, sizes,
                                   sizeof(struct config));
    if (rc < 0) {
        free(device);
        return rc;
    }
    device->console = console;
    device->virtio.writable_at = offsetof(struct config, emerg_wr);
    device->virtio.writable_size = sizeof(uint32_t);
    device->size[0] = cols;
    device->size[1] = rows;
    memcpy(device->virtio.config, device->size, sizeof device->size);
    vmm_console_listen(console, input_came, room_came, device);
    *out = device;
    return 0;
}

void vmm_vconsole_destroy(vmm_vconsole *device)
{
    if (!device)
        return;
    vmm_console_listen(device->console, NULL, NULL,
                       NULL); /* no listener is inside any more: doorbells may go */
    vmm_virtio_deinit(&device->virtio);
    free(device);
}

vmm_virtio *vmm_vconsole_virtio(vmm_vconsole *device)
{
    return &device->virtio;
}

int vmm_vconsole_resize(vmm_vconsole *device, uint16_t cols, uint16_t rows)
{
    if (!(device->virtio.offered & 1u << F_SIZE))
        return vmm_error_set(-ENOTSUP, "%s: created without a terminal size", device->virtio.name);
    VMM_VIRTIO_LOCKED(&device->virtio);
    device->size[0] = cols;
    device->size[1] = rows;
    vmm_virtio_set_config(&device->virtio, 0, device->size, sizeof device->size);
    return 0;
}
