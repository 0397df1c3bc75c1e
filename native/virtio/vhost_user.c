/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio/vhost_user.h"
#include "time/lazy.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* ---- messages (vhost-user.rst, "Message specification": the host's byte order, no padding) ---- */

enum request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    SET_VRING_ENABLE = 18,
};

enum message_flags { VERSION = 1, REPLY = 4, NEED_REPLY = 8 };

#define F_PROTOCOL_FEATURES (1ull << 30)
#define PROTOCOL_F_REPLY_ACK (1ull << 3)

/* As many as a back end without CONFIGURE_MEM_SLOTS takes, and as many descriptors as one message carries. */
#define MEMORY_REGIONS_MAX 8

struct vring_state {
    uint32_t index, num;
};

struct vring_addr {
    uint32_t index, flags;
    uint64_t desc, used, avail, log;
};

struct memory_region {
    uint64_t gpa, size, user_address, mmap_offset;
};

struct memory_table {
    uint32_t n, padding;
    struct memory_region regions[MEMORY_REGIONS_MAX];
};

struct message {
    uint32_t request, flags, size; /* size: of the payload */
    union {
        uint64_t u64;
        struct vring_state state;
        struct vring_addr addr;
        struct memory_table table;
    } __attribute__((packed));
};

#define HEADER_SIZE offsetof(struct message, u64)
_Static_assert(HEADER_SIZE == 12 && sizeof(struct vring_addr) == 40 && sizeof(struct memory_region) == 32,
               "as on the wire");

/* ---- one exchange: a request, its descriptors, an answer in time ---- */

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Until `events` or the deadline. */
static int await(int fd, short events, int64_t deadline)
{
    for (;;) {
        int64_t left = deadline - now_ms();
        struct pollfd poller = {.fd = fd, .events = events};
        int n = poll(&poller, 1, left > 0 ? (int)left : 0);
        if (n > 0)
            return 0;
        if (n == 0)
            return -ETIMEDOUT;
        if (errno != EINTR)
            return -errno;
    }
}

/* Requests are far smaller than a socket's buffer: either all of one fits, or the back end reads nothing any more. */
static int send_message(int fd, const struct message *m, const int *fds, unsigned n_fds)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(MEMORY_REGIONS_MAX * sizeof(int))];
    } control = {0};
    struct iovec bytes = {.iov_base = (void *)m, .iov_len = HEADER_SIZE + m->size};
    struct msghdr header = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (n_fds) {
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(&control.header), fds, n_fds * sizeof(int));
    }
    ssize_t n;
    do
        n = sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n == (ssize_t)bytes.iov_len)
        return 0;
    return n >= 0 || errno == EAGAIN ? -ETIMEDOUT : errno == ECONNRESET ? -EPIPE : -errno;
}

/* Exactly n bytes. Descriptors sent along are dropped by the kernel: there is no room for them. */
static int receive(int fd, void *to, size_t n, int64_t deadline)
{
    uint8_t *at = to;
    while (n) {
        int rc = await(fd, POLLIN, deadline);
        if (rc < 0)
            return rc;
        ssize_t got = recv(fd, at, n, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno == ECONNRESET))
            return -EPIPE;
        if (got < 0 && errno != EINTR && errno != EAGAIN)
            return -errno;
        if (got > 0) {
            at += got;
            n -= (size_t)got;
        }
    }
    return 0;
}

/* Ask, and replace *m by the answer, which must have a payload of `size` bytes. */
static int exchange(struct vmm_vhost_user *b, struct message *m, const int *fds, unsigned n_fds,
                    uint32_t size)
{
    const uint32_t request = m->request;
    const int64_t deadline = now_ms() + b->reply_ms;
    int rc = send_message(b->socket, m, fds, n_fds);
    if (rc == 0)
        rc = receive(b->socket, m, HEADER_SIZE, deadline);
    if (rc < 0)
        return rc;
    if (m->request != request || m->flags != (VERSION | REPLY) || m->size != size)
        return -EPROTO;
    return receive(b->socket, &m->u64, size, deadline);
}

static int get(struct vmm_vhost_user *b, enum request request, uint64_t *value)
{
    struct message m = {.request = request, .flags = VERSION};
    int rc = exchange(b, &m, NULL, 0, sizeof(m.u64));
    *value = m.u64;
    return rc;
}

/* A request that says no more than whether it was done (PROTOCOL_F_REPLY_ACK). */
static int tell(struct vmm_vhost_user *b, struct message *m, const int *fds, unsigned n_fds)
{
    m->flags = VERSION | NEED_REPLY;
    int rc = exchange(b, m, fds, n_fds, sizeof(m->u64));
    return rc < 0 ? rc : m->u64 ? -EPROTO : 0;
}

static int tell_u64(struct vmm_vhost_user *b, enum request request, uint64_t value)
{
    struct message m = {.request = request, .size = sizeof(m.u64), .u64 = value};
    return tell(b, &m, NULL, 0);
}

static int tell_state(struct vmm_vhost_user *b, enum request request, uint32_t index, uint32_t num)
{
    struct message m = {.request = request, .size = sizeof(m.state), .state = {index, num}};
    return tell(b, &m, NULL, 0);
}

static int tell_fd(struct vmm_vhost_user *b, enum request request, uint32_t index, int fd)
{
    struct message m = {.request = request, .size = sizeof(m.u64), .u64 = index};
    return tell(b, &m, &fd, 1);
}

/* ---- the end of a back end ---- */

static const char *what_happened(int rc)
{
    switch (rc) {
    case -EPIPE:
        return "has ended";
    case -ETIMEDOUT:
        return "does not answer";
    case -EPROTO:
        return "refused a request or broke the vhost-user protocol";
    case -ENOTSUP:
        return "cannot see this machine's memory, which is private or still to come";
    default:
        return "cannot be talked to";
    }
}

/* Once: no word to it from here on, nor does it touch guest memory. */
static void lose(struct vmm_vhost_user *b, int rc)
{
    if (b->lost)
        return;
    b->lost = true;
    vmm_loop_remove(b->device->loop, &b->source);
    shutdown(b->socket, SHUT_RDWR);
    const char *why = b->abandon ? b->abandon(b->opaque) : "";
    vmm_virtio_broken(b->device, "%s %s%s%s", b->name, what_happened(rc), *why ? ": " : "", why);
}

/* EPOLLRDHUP: bytes it sends without being asked are not worth waking for, and spoil its next answer. */
static void socket_ended(struct vmm_source *source, uint32_t events)
{
    (void)events;
    struct vmm_vhost_user *b = source->opaque;
    VMM_VIRTIO_LOCKED(b->device);
    lose(b, -EPIPE);
}

/* ---- queues ---- */

static void called(struct vmm_source *source, uint32_t events)
{
    (void)events;
    struct vmm_vhost_user_queue *q = source->opaque;
    struct vmm_virtio *dev = q->back_end->device;
    uint64_t count;
    if (read(q->call, &count, sizeof(count)) != sizeof(count))
        return;
    VMM_VIRTIO_LOCKED(dev);
    if (!q->started)
        return; /* of a driver that was reset since */
    dev->queues[q->index].ring.interrupts++;
    if (dev->transport)
        dev->transport->queue_interrupt(dev->transport_opaque, q->index);
}

/*
 * All memory the guest may write. Addresses in the back end's terms are guest-physical ones: it only compares them
 * with those of the rings, and need not learn where our memory is mapped.
 */
static int give_memory(struct vmm_vhost_user *b)
{
    const struct vmm_vm *vm = b->device->vm;
    struct message m = {.request = SET_MEM_TABLE};
    int fds[MEMORY_REGIONS_MAX];
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        const struct vmm_region *r = &vm->regions[i];
        if (r->flags & VMM_MEMORY_READONLY)
            continue;
        if (m.table.n == MEMORY_REGIONS_MAX)
            return -ENOSPC;
        if (r->flags & VMM_MEMORY_PRIVATE || (vm->lazy && vmm_lazy_state(vm->lazy) != VMM_LAZY_DONE))
            return -ENOTSUP; /* the server would see a file that the guest does not write, or that is not full yet */
        fds[m.table.n] = r->fd;
        m.table.regions[m.table.n++] =
            (struct memory_region){.gpa = r->gpa, .size = r->size, .user_address = r->gpa};
    }
    const unsigned n = m.table.n;
    m.size = (uint32_t)(offsetof(struct memory_table, regions) + n * sizeof(m.table.regions[0]));
    return tell(b, &m, fds, n);
}

/* The order is the protocol's: a ring starts with its kick descriptor, and is served once it is enabled. */
static int give_queue(struct vmm_vhost_user *b, unsigned index)
{
    struct vmm_vhost_user_queue *q = &b->queues[index];
    const struct vmm_virtqueue *vq = &b->device->queues[index];
    struct message addr = {
        .request = SET_VRING_ADDR,
        .size = sizeof(addr.addr),
        .addr = {.index = index, .desc = vq->ring.desc, .avail = vq->ring.driver, .used = vq->ring.device},
    };
    int rc = tell_state(b, SET_VRING_NUM, index, vq->ring.size);
    if (rc == 0)
        rc = tell_state(b, SET_VRING_BASE, index, 0);
    if (rc == 0)
        rc = tell(b, &addr, NULL, 0);
    if (rc == 0)
        rc = tell_fd(b, SET_VRING_CALL, index, q->call);
    if (rc == 0)
        rc = tell_fd(b, SET_VRING_KICK, index, vq->doorbell);
    q->started = rc == 0;
    return rc < 0 ? rc : tell_state(b, SET_VRING_ENABLE, index, 1);
}

static int hand_over(struct vmm_vhost_user *b, unsigned index)
{
    struct vmm_vhost_user_queue *q = &b->queues[index];
    uint64_t count;
    const ssize_t old = read(q->call, &count, sizeof(count)); /* of a ring that was taken back */
    (void)old;
    const int rc = vmm_loop_add(b->device->loop, &q->source, EPOLLIN);
    return rc < 0 ? rc : give_queue(b, index);
}

void vmm_vhost_user_start(struct vmm_vhost_user *b)
{
    if (b->lost) {
        vmm_virtio_broken(b->device, "%s has ended", b->name);
        return;
    }
    int rc = tell_u64(b, SET_FEATURES, b->device->agreed | F_PROTOCOL_FEATURES);
    if (rc == 0)
        rc = give_memory(b);
    for (unsigned i = 0; rc == 0 && i < b->n_queues; i++)
        if (b->device->queues[i].enabled)
            rc = hand_over(b, i);
    if (rc < 0)
        lose(b, rc);
}

void vmm_vhost_user_hand_over(struct vmm_vhost_user *b, unsigned queue)
{
    const int rc = b->lost ? 0 : hand_over(b, queue);
    if (rc < 0)
        lose(b, rc);
}

void vmm_vhost_user_take_back(struct vmm_vhost_user *b, unsigned queue)
{
    struct vmm_vhost_user_queue *q = &b->queues[queue];
    /* Before the wait below, so that the I/O thread does not come to wait for us, who hold the lock. */
    vmm_loop_remove(b->device->loop, &q->source);
    if (!q->started)
        return;
    q->started = false;
    if (b->lost)
        return;
    struct message m = {
        .request = GET_VRING_BASE, .flags = VERSION, .size = sizeof(m.state), .state = {.index = queue}};
    int rc = exchange(b, &m, NULL, 0, sizeof(m.state));
    if (rc == 0 && m.state.index != queue)
        rc = -EPROTO;
    if (rc < 0)
        lose(b, rc);
}

void vmm_vhost_user_stop(struct vmm_vhost_user *b)
{
    for (unsigned i = 0; i < b->n_queues; i++)
        vmm_vhost_user_take_back(b, i);
}

/* ---- life ---- */

static int negotiate(struct vmm_vhost_user *b)
{
    uint64_t protocol;
    int rc = get(b, GET_FEATURES, &b->features);
    if (rc < 0)
        return rc;
    if (!(b->features & F_PROTOCOL_FEATURES) || !(b->features & VMM_F_VERSION_1))
        return -EPROTO;
    rc = get(b, GET_PROTOCOL_FEATURES, &protocol);
    if (rc < 0)
        return rc;
    if (!(protocol & PROTOCOL_F_REPLY_ACK))
        return -EPROTO;
    /* The one request without an answer: it is what makes the others be answered. */
    struct message m = {.request = SET_PROTOCOL_FEATURES,
                        .flags = VERSION,
                        .size = sizeof(m.u64),
                        .u64 = PROTOCOL_F_REPLY_ACK};
    rc = send_message(b->socket, &m, NULL, 0);
    struct message owner = {.request = SET_OWNER};
    return rc < 0 ? rc : tell(b, &owner, NULL, 0);
}

int vmm_vhost_user_open(struct vmm_vhost_user *b, int socket, const char *name, int reply_ms)
{
    memset(b, 0, sizeof(*b));
    b->socket = socket;
    b->reply_ms = reply_ms;
    snprintf(b->name, sizeof(b->name), "%s", name);
    int rc = negotiate(b);
    return rc < 0 ? vmm_error_host(rc, "%s %s", b->name, what_happened(rc)) : 0;
}

int vmm_vhost_user_attach(struct vmm_vhost_user *b, struct vmm_virtio *dev)
{
    if (dev->n_queues > VMM_VHOST_USER_QUEUES_MAX)
        return vmm_error_set(-EINVAL, "%s: %u queues", dev->name, dev->n_queues);
    b->device = dev;
    /* Split rings alone: no back end at hand has packed ones to try this with. */
    dev->offered &= b->features & ~VMM_F_RING_PACKED;
    for (; b->n_queues < dev->n_queues; b->n_queues++) {
        struct vmm_vhost_user_queue *q = &b->queues[b->n_queues];
        q->index = b->n_queues;
        q->back_end = b;
        q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (q->call < 0)
            return vmm_error_errno("eventfd for a queue's interrupt");
        q->source = (struct vmm_source){.fd = q->call, .ready = called, .opaque = q};
        dev->queues[b->n_queues].external = true;
    }
    b->source = (struct vmm_source){.fd = b->socket, .ready = socket_ended, .opaque = b};
    return vmm_loop_add(dev->loop, &b->source, EPOLLRDHUP);
}

void vmm_vhost_user_close(struct vmm_vhost_user *b)
{
    for (unsigned i = 0; i < b->n_queues; i++)
        close(b->queues[i].call);
    if (b->socket > 0)
        close(b->socket);
    b->n_queues = 0;
    b->socket = -1;
}
