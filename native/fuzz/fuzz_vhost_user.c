/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front end of vhost-user against a back end that replies anything. Its socket and eventfds are simulated here, so
 * that an execution is a few microseconds: a reply is made when a request is sent, right or damaged, late, short or
 * with bytes behind it, as the input says. What must hold: requests are well formed and in the protocol's order, the
 * machine and the device outlive every reply, what is not a right reply loses the back end once, and nothing is said to
 * one that was lost.
 */
#include "driven.h"
#include "virtio/vhost_user.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

enum { QUEUES = 2, SOCKET = 1000, CALLS = 1001, BYTES = 4096 };
enum {
    WIRE_HEADER = 12,
    REGIONS = 2,
    SET_PROTOCOL = 16,
    MEM_TABLE = 5,
    RING_BASE = 11,
    CALL = 13,
    KICK = 12
};

struct wire_message {
    uint32_t request, flags, size;
    uint64_t value;
} __attribute__((packed));

/* What is simulated is not what is to be explored. */
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

static struct back_end {
    struct input in;
    struct vmm_virtio *device;
    uint8_t bytes[BYTES]; /* sent and not yet received */
    size_t sent, received;
    bool closed, shut, silent;
    unsigned abandoned, calls, watched;
    uint8_t step[QUEUES]; /* the ring's last request: the order is the protocol's */
} w;

static void back_end_writes(const void *bytes, size_t n)
{
    if (n > BYTES - w.sent)
        n = BYTES - w.sent;
    memcpy(w.bytes + w.sent, bytes, n);
    w.sent += n;
}

static struct wire_message right_reply(const struct wire_message *request)
{
    struct wire_message right = {request->request, 5, 8, 0}; /* version 1, and a reply */
    if (request->request == 1)
        right.value = VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC | 1ull << 30;
    if (request->request == 15)
        right.value = 1ull << 3;
    if (request->request == RING_BASE)
        right.value = (uint32_t)request->value | take(&w.in, 2) << 32; /* the queue's number, then an index */
    return right;
}

static void reply(const struct wire_message *request)
{
    const uint8_t how = (uint8_t)take(&w.in, 1);
    struct wire_message answer = right_reply(request);
    size_t size = sizeof answer;
    if (how >= 232 && how < 248)
        for (unsigned n = 1 + (how & 3); n--;) {
            const uint64_t at = take(&w.in, 1) % sizeof answer;
            ((uint8_t *)&answer)[at] = (uint8_t)take(&w.in, 1);
        }
    if (how == 248 || how == 249)
        size = take(&w.in, 1) % sizeof answer;
    w.closed |= how == 249 || how == 250;
    w.silent |= how == 251;
    if (how != 252)
        back_end_writes(&answer, size);
    if (how == 253)
        back_end_writes(&answer, 1 + take(&w.in, 1) % sizeof answer);
}

/* NUM, BASE, ADDR, CALL, KICK, ENABLE; and RING_BASE, which takes a ring back that was started. */
static void check_order(uint32_t request, uint64_t payload)
{
    static const uint8_t order[] = {8, 10, 9, CALL, KICK, 18};
    const unsigned queue = (uint32_t)payload & 0xff;
    for (unsigned i = 0; i < sizeof order; i++)
        if (request == order[i]) {
            CHECK(queue < QUEUES);
            CHECK_EQUAL(w.step[queue], i);
            w.step[queue] = (uint8_t)(i + 1);
        }
    if (request == RING_BASE) {
        CHECK(queue < QUEUES && w.step[queue] >= 5);
        w.step[queue] = 0;
    }
}

static void check_descriptors(const struct wire_message *m, const struct msghdr *header)
{
    const struct cmsghdr *control = header->msg_control;
    int fds[8];
    const unsigned n = control ? (unsigned)((control->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    CHECK_EQUAL(n, m->request == MEM_TABLE ? REGIONS : m->request == CALL || m->request == KICK);
    if (n)
        memcpy(fds, CMSG_DATA(control), n * sizeof(int));
    if (m->request == CALL)
        CHECK_EQUAL(fds[0], CALLS + (int)m->value);
    if (m->request == KICK)
        CHECK_EQUAL(fds[0], w.device->queues[m->value].doorbell);
    for (unsigned i = 0; i < n && m->request == MEM_TABLE; i++)
        CHECK_EQUAL(fds[i], w.device->vm->regions[i].fd);
}

static ssize_t world_sendmsg(int fd, const struct msghdr *header, int flags)
{
    struct wire_message m = {0};
    CHECK(fd == SOCKET && flags == (MSG_NOSIGNAL | MSG_DONTWAIT) && header->msg_iovlen == 1);
    CHECK(!w.shut);
    const uint8_t how = (uint8_t)take(&w.in, 1);
    if (how >= 250) {
        static const int errors[] = {EINTR, EAGAIN, EPIPE, ECONNRESET};
        errno = errors[how & 3];
        return how >= 254 ? 3 : -1;
    }
    const size_t n = header->msg_iov[0].iov_len;
    memcpy(&m, header->msg_iov[0].iov_base, n < sizeof m ? n : sizeof m);
    CHECK(n == WIRE_HEADER + m.size && (m.flags & ~8u) == 1);
    check_descriptors(&m, header);
    check_order(m.request, m.value);
    if (m.request != SET_PROTOCOL)
        reply(&m);
    return (ssize_t)n;
}

static int world_poll(struct pollfd *fds, unsigned n, int timeout)
{
    CHECK(n == 1 && fds->fd == SOCKET && fds->events == POLLIN && timeout >= 0);
    if (w.sent > w.received || w.closed)
        return 1;
    const uint8_t how = (uint8_t)take(&w.in, 1);
    if (how == 1) { /* it is only late */
        const struct wire_message late = {.request = (uint32_t)take(&w.in, 1), .flags = 5, .size = 8};
        back_end_writes(&late, sizeof late);
        return 1;
    }
    errno = how == 2 ? ENOMEM : EINTR;
    return how == 2 ? -1 : 0;
}

static ssize_t world_recv(int fd, void *to, size_t n, int flags)
{
    CHECK(fd == SOCKET && flags == MSG_DONTWAIT && n && n <= BYTES);
    const size_t there = w.sent - w.received;
    const uint8_t how = (uint8_t)take(&w.in, 1);
    if (how >= 252 || (!there && !w.closed)) {
        errno = how == 255 ? EIO : how == 254 ? ECONNRESET : how == 253 ? EINTR : EAGAIN;
        return -1;
    }
    if (n > there)
        n = there;
    if (how >= 240 && n > 1)
        n = 1 + how % (n - 1);
    memcpy(to, w.bytes + w.received, n);
    w.received += n;
    return (ssize_t)n;
}

static int world_shutdown(int fd, int how)
{
    CHECK(fd == SOCKET && how == SHUT_RDWR);
    w.shut = true;
    return 0;
}

static int world_eventfd(unsigned count, int flags)
{
    (void)count;
    (void)flags;
    return CALLS + (int)w.calls++;
}

static int world_close(int fd)
{
    CHECK(fd == SOCKET || fd < CALLS + QUEUES);
    w.calls -= fd != SOCKET;
    return 0;
}

static ssize_t world_read(int fd, void *to, size_t n)
{
    CHECK(fd >= CALLS && fd < CALLS + QUEUES && n == sizeof(uint64_t));
    *(uint64_t *)to = 1;
    return take(&w.in, 1) & 1 ? (ssize_t)n : -1;
}

static int world_loop_add(vmm_loop *loop, struct vmm_source *source, uint32_t events)
{
    CHECK(loop && source->fd >= SOCKET && events && !source->live);
    if (take(&w.in, 1) == 255)
        return vmm_error_set(-ENOSPC, "no more watches");
    source->live = true;
    w.watched++;
    return 0;
}

static void world_loop_remove(vmm_loop *loop, struct vmm_source *source)
{
    CHECK(loop);
    w.watched -= source->live;
    source->live = false;
}

#pragma clang attribute pop

#define sendmsg world_sendmsg
#define poll world_poll
#define recv world_recv
#define shutdown world_shutdown
#define eventfd world_eventfd
#define close world_close
#define read world_read
#define vmm_loop_add world_loop_add
#define vmm_loop_remove world_loop_remove
#include "virtio/vhost_user.c"

static struct vmm_vhost_user front_end;
static struct vmm_virtio device;

static const char *abandon(void *opaque)
{
    (void)opaque;
    w.abandoned++;
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

static void forget(void *opaque, uint32_t queue)
{
    vmm_vhost_user_take_back(opaque, queue);
}

static void renew(void *opaque, uint32_t queue)
{
    vmm_vhost_user_hand_over(opaque, queue);
}

static void set_queue(unsigned i)
{
    struct vmm_virtqueue *q = vmm_virtio_queue(&device, i);
    vmm_virtqueue_size(q, 32);
    for (unsigned area = 0; area < 3; area++)
        vmm_virtqueue_area(q, (enum vmm_queue_area)area, false, 0x10000 * (i + 1) + 0x1000 * area);
    vmm_virtqueue_enable(q);
}

static void drive(unsigned queues)
{
    VMM_VIRTIO_LOCKED(&device);
    vmm_virtio_write_status(&device, 0);
    vmm_virtio_write_status(&device, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER);
    for (uint32_t word = 0; word < 2; word++)
        vmm_virtio_driver_features(&device, word, vmm_virtio_device_features(&device, word));
    vmm_virtio_write_status(&device, 11);
    for (unsigned i = 0; i < QUEUES; i++)
        if (queues & 1u << i)
            set_queue(i);
    vmm_virtio_write_status(&device, 15);
}

/* What the driver and the loop may do to a device that runs, or does not any more. */
static void step(void)
{
    const uint8_t op = (uint8_t)take(&w.in, 1);
    const unsigned queue = op >> 4 & 1;
    VMM_VIRTIO_LOCKED(&device);
    switch (op & 7) {
    case 0:
    case 1:
        drive(op >> 4 & 3);
        break;
    case 2:
        if (device.running) {
            vmm_virtqueue_reset(&device.queues[queue]);
            CHECK(front_end.lost || !front_end.queues[queue].started);
        }
        break;
    case 3:
        if (device.status & VMM_STATUS_FEATURES_OK && !device.queues[queue].enabled)
            set_queue(queue);
        break;
    case 4:
        if (front_end.queues[queue].source.live)
            front_end.queues[queue].source.ready(&front_end.queues[queue].source, EPOLLIN);
        break;
    case 5:
        if (front_end.source.live && w.closed)
            front_end.source.ready(&front_end.source, EPOLLRDHUP);
        break;
    case 6:
        vmm_virtio_reset(&device);
        break;
    default:
        w.closed |= op >> 4 == 15;
        if (op >> 4 == 14)
            back_end_writes(&op, 1); /* without being asked */
    }
}

static void check(void)
{
    CHECK(front_end.lost == (w.abandoned == 1) && w.abandoned <= 1);
    CHECK_EQUAL(w.shut, front_end.lost);
    if (front_end.lost)
        CHECK(!device.running && !front_end.source.live);
    for (unsigned i = 0; i < QUEUES; i++)
        CHECK(device.running || !front_end.queues[i].source.live);
}

static void prepare(void)
{
    static const vmm_virtio_ops ops = {.start = start, .stop = stop, .forget = forget, .renew = renew};
    static const struct vmm_virtio_transport transport = {driver_queue_interrupt, driver_config_interrupt,
                                                          driver_doorbells, driver_reset};
    static const uint16_t sizes[QUEUES] = {64, 64};
    static struct driver driver;
    static uint64_t offered;
    if (!device.queues) {
        vmm_vm *vm = machine_create();
        vmm_loop_pause(vmm_vm_loop(vm));
        CHECK_EQUAL(vmm_virtio_init(&device, vm, &ops, &front_end, 26, "device", 0, QUEUES, sizes, 0), 0);
        device.transport = &transport;
        device.transport_opaque = &driver;
        offered = device.offered;
    }
    device.offered = offered;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    prepare();
    memset(&w, 0, offsetof(struct back_end, bytes));
    memset((uint8_t *)&w + offsetof(struct back_end, sent), 0, sizeof w - offsetof(struct back_end, sent));
    w.in = (struct input){data, data + size};
    w.device = &device;
    int rc = vmm_vhost_user_open(&front_end, SOCKET, "the server", 1000);
    CHECK(rc == 0 || w.in.at > data || !size);
    if (rc == 0) {
        front_end.abandon = abandon;
        rc = vmm_vhost_user_attach(&front_end, &device);
        for (unsigned n = 0; rc == 0 && n < 64 && w.in.at < w.in.end; n++) {
            step();
            check();
        }
        vmm_virtio_reset(&device);
        world_loop_remove(device.loop, &front_end.source);
    }
    vmm_vhost_user_close(&front_end);
    CHECK_EQUAL(w.calls, 0);
    CHECK_EQUAL(w.watched, 0);
    return 0;
}
