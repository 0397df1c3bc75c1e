/* SPDX-License-Identifier: Apache-2.0 */
/* The vhost-user front end against back ends that do as they should, and against every way not to. */
#include "machine.h"
#include "virtio/vhost_user.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

/* vhost-user.rst, "Front-end message types": written down again, to notice when one of the two is wrong. */
enum {
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
    REQUESTS,
};
static const int opening[] = {GET_FEATURES, GET_PROTOCOL_FEATURES, SET_OWNER};
static const int starting[] = {SET_FEATURES,   SET_MEM_TABLE,  SET_VRING_NUM,  SET_VRING_BASE,
                               SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ENABLE};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define PROTOCOL_FEATURES (1ull << 30)
#define REPLY_ACK (1ull << 3)
#define FEATURES (VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC | VMM_F_RING_PACKED | PROTOCOL_FEATURES)
#define QUEUES 3
#define RING(i) (0x10000ull * ((i) + 1))
#define DATA 0x100000ull
#define REPLY_MS 100

enum manner {
    AS_IT_SHOULD,
    SILENT,     /* no answer, socket open */
    CLOSES,     /* instead of answering */
    CLOSES_MID, /* in the middle of the answer's header */
    TRUNCATES,  /* a header, and no payload */
    REFUSES,    /* answers: not done */
    OTHER_REQUEST,
    NO_REPLY_FLAG,
    HUGE_SIZE,
    EMPTY,
    EARLY, /* an answer that nobody asked for comes before the right one */
    MANNERS,
};

/* ---- the back end: a thread at the other end of the socket ---- */

struct back_end {
    int socket;
    pthread_t thread;
    int at; /* the request at which it stops being good */
    enum manner manner;
    uint64_t features, protocol;
    /* What it was told. Read by the test after the device has had its answer. */
    unsigned asked[REQUESTS];
    uint64_t agreed, agreed_protocol;
    uint32_t regions;
    uint64_t region[8][4]; /* gpa, size, user address, offset */
    int memory[8];
    struct {
        uint32_t size, base, enabled;
        uint64_t desc, used, avail;
        int kick, call;
    } ring[QUEUES];
};

struct header {
    uint32_t request, flags, size;
};

static bool receive(struct back_end *b, struct header *h, uint8_t *payload, int *fds)
{
    char control[CMSG_SPACE(8 * sizeof(int))];
    struct iovec bytes = {h, sizeof(*h)};
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    for (int i = 0; i < 8; i++)
        fds[i] = -1;
    ssize_t n = recvmsg(b->socket, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC);
    if (n <= 0)
        return false;
    CHECK_EQUAL(n, sizeof(*h));
    CHECK(h->request < REQUESTS && h->size <= 300);
    CHECK_EQUAL(h->flags & 3, 1);
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    if (c)
        memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
    return !h->size || recv(b->socket, payload, h->size, MSG_WAITALL) == (ssize_t)h->size;
}

static void take(struct back_end *b, const struct header *h, const uint8_t *payload, const int *fds)
{
    uint32_t word[2] = {0};
    uint64_t u64 = 0;
    memcpy(word, payload, 8);
    memcpy(&u64, payload, 8);
    CHECK(h->request < SET_VRING_NUM || h->request > SET_VRING_CALL || word[0] < QUEUES);
    switch (h->request) {
    case SET_FEATURES:
        b->agreed = u64;
        break;
    case SET_PROTOCOL_FEATURES:
        b->agreed_protocol = u64;
        break;
    case SET_MEM_TABLE:
        b->regions = word[0];
        CHECK_EQUAL(h->size, 8 + b->regions * 32);
        memcpy(b->region, payload + 8, b->regions * 32ul);
        for (int i = 0; i < 8; i++) {
            if (b->memory[i] >= 0)
                close(b->memory[i]);
            b->memory[i] = fds[i];
        }
        break;
    case SET_VRING_NUM:
        b->ring[word[0]].size = word[1];
        break;
    case SET_VRING_BASE:
        b->ring[word[0]].base = word[1];
        break;
    case SET_VRING_ENABLE:
        b->ring[word[0]].enabled = word[1];
        break;
    case SET_VRING_ADDR:
        memcpy(&b->ring[word[0]].desc, payload + 8, 24);
        break;
    case SET_VRING_KICK:
        b->ring[word[0]].kick = fds[0];
        break;
    case SET_VRING_CALL:
        b->ring[word[0]].call = fds[0];
        break;
    case GET_VRING_BASE:
        close(b->ring[word[0]].kick);
        close(b->ring[word[0]].call);
        break;
    }
}

static void answer(struct back_end *b, const struct header *h, const uint8_t *payload, enum manner manner)
{
    struct {
        struct header h;
        uint64_t u64;
    } __attribute__((packed)) a = {.h = {h->request, 5, 8}};
    size_t n = sizeof(a);
    a.u64 = h->request == GET_FEATURES ? b->features : h->request == GET_PROTOCOL_FEATURES ? b->protocol : 0;
    if (h->request == GET_VRING_BASE)
        memcpy(&a.u64, payload, 4);
    switch (manner) {
    case SILENT:
        return;
    case CLOSES_MID:
        n = 5;
        break;
    case TRUNCATES:
        n = sizeof(a.h);
        break;
    case REFUSES:
        a.u64 = h->request == GET_FEATURES || h->request == GET_PROTOCOL_FEATURES ? 0 : 7;
        break;
    case OTHER_REQUEST:
        a.h.request++;
        break;
    case NO_REPLY_FLAG:
        a.h.flags = 1;
        break;
    case HUGE_SIZE:
        a.h.size = UINT32_MAX;
        break;
    case EMPTY:
        a.h.size = 0;
        break;
    case EARLY:
        CHECK_EQUAL(send(b->socket, &(struct header){2, 5, 0}, sizeof(struct header), MSG_NOSIGNAL),
                    sizeof(struct header));
        break;
    default:
        break;
    }
    if (manner == CLOSES || send(b->socket, &a, n, MSG_NOSIGNAL) != (ssize_t)n || manner == CLOSES_MID)
        shutdown(b->socket, SHUT_RDWR);
}

static void *back_end_main(void *opaque)
{
    struct back_end *b = opaque;
    struct header h;
    uint8_t payload[300] = {0};
    int fds[8];
    while (receive(b, &h, payload, fds)) {
        b->asked[h.request]++;
        take(b, &h, payload, fds);
        bool wants = (h.flags & 8) || h.request == GET_FEATURES || h.request == GET_PROTOCOL_FEATURES ||
                     h.request == GET_VRING_BASE;
        if (wants)
            answer(b, &h, payload, (int)h.request == b->at ? b->manner : AS_IT_SHOULD);
    }
    return NULL;
}

/* ---- the machine: a device with three queues, of which the driver uses some ---- */

struct rig {
    vmm_vm *vm;
    struct vmm_virtio device;
    struct vmm_vhost_user front_end;
    struct back_end back_end;
    int interrupts[QUEUES], config_interrupts, messages, abandoned;
    char message[300];
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static void queue_interrupt(void *opaque, unsigned queue)
{
    struct rig *rig = opaque;
    pthread_mutex_lock(&rig->lock);
    rig->interrupts[queue]++;
    pthread_cond_broadcast(&rig->changed);
    pthread_mutex_unlock(&rig->lock);
}

static void config_interrupt(void *opaque)
{
    struct rig *rig = opaque;
    pthread_mutex_lock(&rig->lock);
    rig->config_interrupts++;
    pthread_cond_broadcast(&rig->changed);
    pthread_mutex_unlock(&rig->lock);
}

static void doorbells(void *opaque, bool on)
{
    (void)opaque;
    (void)on;
}

static void transport_reset(void *opaque)
{
    (void)opaque;
}

static void say(void *opaque, const char *text)
{
    struct rig *rig = opaque;
    pthread_mutex_lock(&rig->lock);
    rig->messages++;
    snprintf(rig->message, sizeof(rig->message), "%s", text);
    pthread_cond_broadcast(&rig->changed);
    pthread_mutex_unlock(&rig->lock);
}

static const char *abandon(void *opaque)
{
    ((struct rig *)opaque)->abandoned++;
    return "its last words";
}

static void start(void *opaque)
{
    vmm_vhost_user_start(&((struct rig *)opaque)->front_end);
}

static void stop(void *opaque)
{
    vmm_vhost_user_stop(&((struct rig *)opaque)->front_end);
}

static void forget(void *opaque, uint32_t queue)
{
    vmm_vhost_user_take_back(&((struct rig *)opaque)->front_end, queue);
}

static void renew(void *opaque, uint32_t queue)
{
    vmm_vhost_user_hand_over(&((struct rig *)opaque)->front_end, queue);
}

static const vmm_virtio_ops ops = {.start = start, .stop = stop, .forget = forget, .renew = renew};
static const struct vmm_virtio_transport transport = {queue_interrupt, config_interrupt, doorbells,
                                                      transport_reset};

static int create(struct rig *rig, int at, enum manner manner)
{
    static const uint16_t sizes[QUEUES] = {64, 64, 64};
    int sockets[2];
    memset(rig, 0, sizeof(*rig));
    pthread_mutex_init(&rig->lock, NULL);
    pthread_cond_init(&rig->changed, NULL);
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    rig->back_end = (struct back_end){.socket = sockets[1],
                                      .at = at,
                                      .manner = manner,
                                      .features = FEATURES,
                                      .protocol = REPLY_ACK | 1,
                                      .memory = {-1, -1, -1, -1, -1, -1, -1, -1}};
    CHECK_EQUAL(pthread_create(&rig->back_end.thread, NULL, back_end_main, &rig->back_end), 0);
    rig->vm = machine_create();
    vmm_vm_on_message(rig->vm, say, rig);
    int rc = vmm_vhost_user_open(&rig->front_end, sockets[0], "the tested server", REPLY_MS);
    if (rc < 0)
        return rc;
    CHECK_EQUAL(vmm_virtio_init(&rig->device, rig->vm, &ops, rig, 26, "device", 1 << 5, QUEUES, sizes, 0), 0);
    rig->device.transport = &transport;
    rig->device.transport_opaque = rig;
    rig->front_end.abandon = abandon;
    rig->front_end.opaque = rig;
    CHECK_EQUAL(vmm_vhost_user_attach(&rig->front_end, &rig->device), 0);
    return 0;
}

static void destroy(struct rig *rig)
{
    if (rig->device.queues)
        vmm_virtio_reset(&rig->device);
    vmm_vm_destroy(rig->vm);
    vmm_vhost_user_close(&rig->front_end);
    pthread_join(rig->back_end.thread, NULL);
    close(rig->back_end.socket);
    for (int i = 0; i < 8; i++)
        if (rig->back_end.memory[i] >= 0)
            close(rig->back_end.memory[i]);
    vmm_virtio_deinit(&rig->device);
}

/* What a driver does up to DRIVER_OK (virtio 1.2, 3.1.1), with the queues whose bits are set. */
static void drive(struct rig *rig, unsigned queues)
{
    VMM_VIRTIO_LOCKED(&rig->device);
    vmm_virtio_write_status(&rig->device, VMM_STATUS_ACKNOWLEDGE | VMM_STATUS_DRIVER);
    for (uint32_t word = 0; word < 2; word++)
        vmm_virtio_driver_features(&rig->device, word, vmm_virtio_device_features(&rig->device, word));
    vmm_virtio_write_status(&rig->device, 11);
    for (unsigned i = 0; i < QUEUES; i++) {
        if (!(queues >> i & 1))
            continue;
        struct vmm_virtqueue *q = vmm_virtio_queue(&rig->device, i);
        vmm_virtqueue_size(q, 32);
        vmm_virtqueue_area(q, VMM_AREA_DESC, false, (uint32_t)RING(i));
        vmm_virtqueue_area(q, VMM_AREA_DRIVER, false, (uint32_t)RING(i) + 0x1000);
        vmm_virtqueue_area(q, VMM_AREA_DEVICE, false, (uint32_t)RING(i) + 0x2000);
        vmm_virtqueue_enable(q);
    }
    vmm_virtio_write_status(&rig->device, 15);
}

static void reset(struct rig *rig)
{
    VMM_VIRTIO_LOCKED(&rig->device);
    vmm_virtio_write_status(&rig->device, 0);
}

/* Until *count is `want`; a test that waits in vain fails. */
static void wait_for(struct rig *rig, const int *count, int want)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 10;
    pthread_mutex_lock(&rig->lock);
    while (*count != want)
        CHECK_EQUAL(pthread_cond_timedwait(&rig->changed, &rig->lock, &end), 0);
    pthread_mutex_unlock(&rig->lock);
}

static void ring_fd(int fd)
{
    uint64_t one = 1;
    CHECK_EQUAL(write(fd, &one, sizeof(one)), sizeof(one));
}

static int readable(int fd, int timeout_ms)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    return poll(&poller, 1, timeout_ms);
}

/* ---- as it should be ---- */

static void offered_is_what_both_can_do_without_packed_rings(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    CHECK_EQUAL(rig.device.offered, VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC);
    CHECK_EQUAL(rig.back_end.agreed_protocol, REPLY_ACK);
    drive(&rig, 1);
    CHECK_EQUAL(rig.back_end.agreed, VMM_F_VERSION_1 | VMM_F_INDIRECT_DESC | PROTOCOL_FEATURES);
    destroy(&rig);
}

static void the_back_end_gets_guest_memory_and_the_rings_of_enabled_queues(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    machine_add(rig.vm, 0x200000000, 0x1000,
                VMM_MEMORY_READONLY); /* not the guest's to write, so not its device's */
    drive(&rig, 1 << 0 | 1 << 2);
    const struct back_end *b = &rig.back_end;
    CHECK_EQUAL(b->regions, 2);
    for (unsigned i = 0; i < 2; i++) {
        CHECK_EQUAL(b->region[i][0], i ? MACHINE_HIGH : 0);
        CHECK_EQUAL(b->region[i][1], MACHINE_RAM);
        CHECK_EQUAL(b->region[i][2], b->region[i][0]); /* our own addresses stay ours */
        CHECK_EQUAL(b->region[i][3], 0);
        uint8_t byte = (uint8_t)(0x5a + i);
        CHECK_EQUAL(pwrite(b->memory[i], &byte, 1, DATA), 1);
        CHECK_EQUAL(*(uint8_t *)machine_at(rig.vm, b->region[i][0] + DATA, 1), byte);
    }
    CHECK_EQUAL(b->asked[SET_VRING_KICK], 2);
    for (unsigned i = 0; i < QUEUES; i += 2) {
        CHECK_EQUAL(b->ring[i].size, 32);
        CHECK_EQUAL(b->ring[i].base, 0);
        CHECK_EQUAL(b->ring[i].desc, RING(i));
        CHECK_EQUAL(b->ring[i].avail, RING(i) + 0x1000);
        CHECK_EQUAL(b->ring[i].used, RING(i) + 0x2000);
        CHECK_EQUAL(b->ring[i].enabled, 1);
    }
    CHECK_EQUAL(b->ring[1].enabled, 0);
    destroy(&rig);
}

static void doorbells_reach_the_back_end_and_its_calls_become_interrupts(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    drive(&rig, 7);
    uint64_t count;
    for (unsigned i = 0; i < QUEUES; i++) {
        CHECK_EQUAL(readable(rig.back_end.ring[i].kick, 0), 1); /* what was offered before DRIVER_OK */
        CHECK_EQUAL(read(rig.back_end.ring[i].kick, &count, sizeof(count)), sizeof(count));
    }
    vmm_virtqueue_ring(&rig.device.queues[1]);
    CHECK_EQUAL(readable(rig.back_end.ring[1].kick, 0), 1);
    CHECK_EQUAL(readable(rig.back_end.ring[0].kick, 50), 0); /* nor does the I/O thread eat the other */
    CHECK_EQUAL(readable(rig.back_end.ring[1].kick, 0), 1);
    ring_fd(rig.back_end.ring[2].call);
    wait_for(&rig, &rig.interrupts[2], 1);
    ring_fd(rig.back_end.ring[0].call);
    wait_for(&rig, &rig.interrupts[0], 1);
    CHECK_EQUAL(rig.interrupts[1], 0);
    CHECK_EQUAL(rig.device.queues[2].ring.interrupts, 1);
    destroy(&rig);
}

static void a_reset_takes_every_queue_back_and_a_new_driver_gets_them_again(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    for (unsigned round = 1; round < 4; round++) {
        drive(&rig, 3);
        CHECK_EQUAL(rig.back_end.asked[SET_VRING_KICK], 2 * round);
        reset(&rig);
        CHECK_EQUAL(rig.back_end.asked[GET_VRING_BASE], 2 * round);
    }
    CHECK_EQUAL(rig.messages, 0);
    CHECK_EQUAL(rig.abandoned, 0);
    destroy(&rig);
}

/* QueueReady = 0 on mmio, or RING_RESET (virtio 1.2, 2.6.1 and 4.2.2.2): the driver frees the ring's memory then. */
static void one_queue_is_taken_back_and_handed_over_again_while_others_go_on(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    drive(&rig, 3);
    const int call = dup(rig.back_end.ring[1].call);
    struct vmm_virtqueue *q = vmm_virtio_queue(&rig.device, 1);
    {
        VMM_VIRTIO_LOCKED(&rig.device);
        vmm_virtqueue_reset(q);
    }
    CHECK_EQUAL(rig.back_end.asked[GET_VRING_BASE], 1);
    ring_fd(call);
    ring_fd(rig.back_end.ring[0].call);
    wait_for(&rig, &rig.interrupts[0], 1);
    CHECK_EQUAL(rig.interrupts[1], 0);
    {
        VMM_VIRTIO_LOCKED(&rig.device);
        vmm_virtqueue_size(q, 16);
        vmm_virtqueue_area(q, VMM_AREA_DESC, false, (uint32_t)RING(5));
        vmm_virtqueue_area(q, VMM_AREA_DRIVER, false, (uint32_t)RING(5) + 0x1000);
        vmm_virtqueue_area(q, VMM_AREA_DEVICE, false, (uint32_t)RING(5) + 0x2000);
        vmm_virtqueue_enable(q);
    }
    CHECK_EQUAL(rig.back_end.asked[SET_VRING_ADDR], 3);
    CHECK_EQUAL(rig.back_end.ring[1].size, 16);
    CHECK_EQUAL(rig.back_end.ring[1].desc, RING(5));
    CHECK_EQUAL(rig.back_end.asked[SET_MEM_TABLE], 1);
    ring_fd(rig.back_end.ring[1].call);
    wait_for(&rig, &rig.interrupts[1], 1);
    reset(&rig);
    CHECK_EQUAL(rig.back_end.asked[GET_VRING_BASE], 3);
    CHECK_EQUAL(rig.messages, 0);
    close(call);
    destroy(&rig);
}

static void a_call_after_the_reset_interrupts_nobody(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    drive(&rig, 1);
    int call = dup(rig.back_end.ring[0].call);
    reset(&rig);
    ring_fd(call);
    CHECK_EQUAL(readable(call, 50), 1); /* nobody looks at it */
    CHECK_EQUAL(rig.interrupts[0], 0);
    close(call);
    destroy(&rig);
}

static void more_memory_regions_than_a_back_end_can_take_break_the_device(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    for (uint64_t i = 0; i < 7; i++)
        machine_add(rig.vm, 0x200000000 + i * 0x1000, 0x1000, 0);
    drive(&rig, 1);
    CHECK(rig.device.status & VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(rig.back_end.asked[SET_MEM_TABLE], 0);
    destroy(&rig);
}

/* ---- as it should not be ---- */

static void lacks(uint64_t features, uint64_t protocol)
{
    struct rig rig = {0};
    int sockets[2];
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), 0);
    rig.back_end = (struct back_end){.socket = sockets[1], .features = features, .protocol = protocol};
    CHECK_EQUAL(pthread_create(&rig.back_end.thread, NULL, back_end_main, &rig.back_end), 0);
    CHECK_EQUAL(vmm_vhost_user_open(&rig.front_end, sockets[0], "the tested server", REPLY_MS), -EPROTO);
    vmm_vhost_user_close(&rig.front_end);
    pthread_join(rig.back_end.thread, NULL);
    close(sockets[1]);
}

static void a_back_end_without_what_is_needed_is_refused(void)
{
    lacks(FEATURES & ~VMM_F_VERSION_1, REPLY_ACK);
    lacks(FEATURES & ~PROTOCOL_FEATURES, REPLY_ACK);
    lacks(FEATURES, ~REPLY_ACK);
}

static int expected(enum manner manner)
{
    if (manner == SILENT || manner == TRUNCATES)
        return -ETIMEDOUT;
    if (manner == CLOSES || manner == CLOSES_MID)
        return -EPIPE;
    return -EPROTO;
}

static void whatever_it_does_while_it_is_opened_is_an_error_in_time(void)
{
    for (unsigned i = 0; i < COUNT(opening); i++) {
        for (enum manner manner = SILENT; manner < MANNERS; manner++) {
            struct rig rig;
            CHECK_EQUAL(create(&rig, opening[i], manner), expected(manner));
            CHECK(strstr(vmm_error_text(), "the tested server"));
            destroy(&rig);
        }
    }
}

static void check_lost(struct rig *rig)
{
    CHECK(rig->device.status & VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(rig->messages, 1);
    CHECK_EQUAL(rig->abandoned, 1);
    CHECK(strstr(rig->message, "the tested server "));
    CHECK(strstr(rig->message, ": its last words"));
    /* A driver that tries again is told again, and nothing is sent any more. */
    unsigned asked = rig->back_end.asked[SET_FEATURES];
    reset(rig);
    CHECK_EQUAL(rig->device.status, 0);
    drive(rig, 7);
    CHECK(rig->device.status & VMM_STATUS_NEEDS_RESET);
    CHECK_EQUAL(rig->abandoned, 1);
    CHECK_EQUAL(rig->back_end.asked[SET_FEATURES], asked);
}

static void whatever_it_does_at_the_start_breaks_this_device_alone_and_in_time(void)
{
    for (unsigned i = 0; i < COUNT(starting); i++) {
        for (enum manner manner = SILENT; manner < MANNERS; manner++) {
            struct rig rig;
            CHECK_EQUAL(create(&rig, starting[i], manner), 0);
            drive(&rig, 7);
            check_lost(&rig);
            CHECK_EQUAL(rig.config_interrupts, 2); /* one for each driver */
            destroy(&rig);
        }
    }
}

static void whatever_it_does_at_a_reset_the_reset_succeeds_and_it_is_abandoned(void)
{
    for (enum manner manner = SILENT; manner < MANNERS; manner++) {
        struct rig rig;
        CHECK_EQUAL(create(&rig, GET_VRING_BASE, manner), 0);
        drive(&rig, 7);
        reset(&rig);
        CHECK_EQUAL(rig.device.status, 0);
        CHECK_EQUAL(rig.messages, 1);
        CHECK_EQUAL(rig.abandoned, 1);
        CHECK_EQUAL(rig.back_end.asked[GET_VRING_BASE],
                    1); /* the deadline is paid once, not for every queue */
        destroy(&rig);
    }
}

static void its_end_while_the_guest_runs_is_noticed_at_once(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    drive(&rig, 7);
    shutdown(rig.back_end.socket, SHUT_RDWR);
    wait_for(&rig, &rig.config_interrupts, 1);
    check_lost(&rig);
    CHECK(strstr(rig.message, "has ended"));
    destroy(&rig);
}

static void its_end_before_a_driver_came_is_said_too(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    shutdown(rig.back_end.socket, SHUT_RDWR);
    wait_for(&rig, &rig.messages, 1);
    drive(&rig, 7);
    CHECK(rig.device.status & VMM_STATUS_NEEDS_RESET);
    destroy(&rig);
}

static void words_nobody_asked_for_wake_nobody_and_spoil_the_next_answer(void)
{
    struct rig rig;
    CHECK_EQUAL(create(&rig, 0, AS_IT_SHOULD), 0);
    drive(&rig, 1);
    CHECK_EQUAL(send(rig.back_end.socket, "unasked", 7, 0), 7);
    CHECK_EQUAL(readable(rig.front_end.socket, 50), 1); /* still unread */
    CHECK_EQUAL(rig.messages, 0);
    reset(&rig);
    CHECK_EQUAL(rig.messages, 1);
    destroy(&rig);
}

int main(void)
{
    offered_is_what_both_can_do_without_packed_rings();
    the_back_end_gets_guest_memory_and_the_rings_of_enabled_queues();
    doorbells_reach_the_back_end_and_its_calls_become_interrupts();
    a_reset_takes_every_queue_back_and_a_new_driver_gets_them_again();
    one_queue_is_taken_back_and_handed_over_again_while_others_go_on();
    a_call_after_the_reset_interrupts_nobody();
    more_memory_regions_than_a_back_end_can_take_break_the_device();
    a_back_end_without_what_is_needed_is_refused();
    whatever_it_does_while_it_is_opened_is_an_error_in_time();
    whatever_it_does_at_the_start_breaks_this_device_alone_and_in_time();
    whatever_it_does_at_a_reset_the_reset_succeeds_and_it_is_abandoned();
    its_end_while_the_guest_runs_is_noticed_at_once();
    its_end_before_a_driver_came_is_said_too();
    words_nobody_asked_for_wake_nobody_and_spoil_the_next_answer();
    return 0;
}
