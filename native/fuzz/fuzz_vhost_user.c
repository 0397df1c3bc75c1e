/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front end of vhost-user against a back end that replies anything: an input is the bytes of its replies, made of
 * right ones and of others, up to where it closes. What must hold: the machine and the device outlive it, what is not a
 * right reply loses the back end once, and nothing is said to one that was lost.
 */
#include "driven.h"
#include "virtio/vhost_user.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { QUEUES = 2, GET_VRING_BASE = 11, REPLIES = 64 };
enum { REPLY = 5 }; /* version 1, and the flag */

/* The requests that are answered, in the order in which the front end makes them: it is started, and stopped. */
static const uint8_t requests[] = {1, 15, 3, 2, 5, 8, 10, 9, 13, 12, 18, 8, 10, 9, 13, 12, 18, 11, 11};

struct reply {
    uint32_t request, flags, size;
    uint64_t value;
} __attribute__((packed));

static struct vmm_vhost_user front_end;
static unsigned abandoned;

static const char *abandon(void *opaque)
{
    (void)opaque;
    abandoned++;
    return "";
}

static void start(void *opaque)
{
    vmm_vhost_user_start(opaque);
}

static void stop(void *opaque)
{
    vmm_vhost_user_stop(opaque);
}

static void reply(int socket, unsigned number, struct input *in)
{
    const uint8_t how = (uint8_t)take(in, 1), request = requests[number % sizeof requests];
    struct reply right = {request, REPLY, 8, 0};
    if (request == 1)
        right.value = VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC | 1ull << 30;
    if (request == 15)
        right.value = 1ull << 3;
    if (request == GET_VRING_BASE)
        right.value = number & 1 ? 0 : 1; /* the index of the queue comes first */
    if (how >= 240)
        for (unsigned n = 1 + (how & 3); n--;)
            ((uint8_t *)&right)[take(in, 1) % sizeof right] = (uint8_t)take(in, 1);
    size_t size = sizeof right;
    if (how == 239)
        size = take(in, 1) % sizeof right;
    const ssize_t sent = send(socket, &right, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)sent; /* a full buffer: the front end reads no more */
}

static void drive(struct vmm_virtio *device)
{
    VMM_VIRTIO_LOCKED(device);
    vmm_virtio_write_status(device, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER);
    for (uint32_t word = 0; word < 2; word++)
        vmm_virtio_driver_features(device, word, vmm_virtio_device_features(device, word));
    vmm_virtio_write_status(device, 11);
    for (unsigned i = 0; i < QUEUES; i++) {
        struct vmm_virtqueue *q = vmm_virtio_queue(device, i);
        vmm_virtqueue_size(q, 32);
        for (unsigned area = 0; area < 3; area++)
            vmm_virtqueue_area(q, (enum vmm_queue_area)area, false, 0x10000 * (i + 1) + 0x1000 * area);
        vmm_virtqueue_enable(q);
    }
    vmm_virtio_write_status(device, 15);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const vmm_virtio_ops ops = {.start = start, .stop = stop};
    static const struct vmm_virtio_transport transport = {driver_queue_interrupt, driver_config_interrupt,
                                                          driver_doorbells, driver_reset};
    static const uint16_t sizes[QUEUES] = {64, 64};
    static vmm_vm *vm;
    static struct driver driver;
    static struct vmm_virtio device;
    if (!vm) {
        vm = machine_create();
        vmm_loop_pause(vmm_vm_loop(vm));
    }
    struct input in = {data, data + size};
    int sockets[2];
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    for (unsigned n = 0; n < REPLIES && in.at < in.end; n++)
        reply(sockets[1], n, &in);
    shutdown(sockets[1], SHUT_WR);
    abandoned = 0;
    const int rc = vmm_vhost_user_open(&front_end, sockets[0], "the server", 1000);
    CHECK(rc == 0 || rc == -EPIPE || rc == -EPROTO);
    if (rc == 0) {
        memset(&device, 0, sizeof device);
        CHECK_EQUAL(vmm_virtio_init(&device, vm, &ops, &front_end, 26, "device", 0, QUEUES, sizes, 0), 0);
        device.transport = &transport;
        device.transport_opaque = &driver;
        front_end.abandon = abandon;
        CHECK_EQUAL(vmm_vhost_user_attach(&front_end, &device), 0);
        for (unsigned round = 0; round < 2; round++) {
            drive(&device);
            CHECK(front_end.lost == (abandoned == 1));
            CHECK(front_end.lost == (device.status & VMM_STATUS_NEEDS_RESET) / VMM_STATUS_NEEDS_RESET);
            vmm_virtio_reset(&device);
        }
        vmm_loop_remove(device.loop, &front_end.source);
    }
    vmm_vhost_user_close(&front_end);
    if (rc == 0)
        vmm_virtio_deinit(&device);
    close(sockets[1]);
    return 0;
}
