/* SPDX-License-Identifier: Apache-2.0 */
#include "driver.h"
#include "virtio/vsock.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { RECEIVE = 0, TRANSMIT = 1, EVENT = 2 };
enum { CID = 42, HEADER = sizeof(struct vsock_header) };
#define SENT 0x400000ull     /* guest-physical: packets of the guest, 4 KiB each, then one of 256 KiB */
#define RECEIVED 0x600000ull /* guest-physical: buffers for packets to it, 4 KiB each */
#define PACKET 4096u

struct fixture {
    vmm_vm *vm;
    vmm_vsock *device;
    struct driver driver;
    char folder[32], path[64];
    uint64_t where[VMM_QUEUE_SIZE_MAX]; /* of each receive buffer, by its id */
    uint32_t fwd_cnt, buf_alloc;        /* what the guest's packets say of itself */
};

static void fill_receive_queue(struct fixture *f, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        const uint64_t at = RECEIVED + i * PACKET;
        f->where[driver_offer(&f->driver, RECEIVE, (struct piece[]){IN(at, 100), IN(at + 100, PACKET - 100)},
                              2)] = at;
    }
}

static int unix_socket(const char *path, bool listening)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK(fd >= 0);
    if (listening) {
        CHECK_EQUAL(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
        CHECK_EQUAL(listen(fd, 400), 0);
    } else {
        CHECK_EQUAL(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    }
    return fd;
}

static void set_up(struct fixture *f, uint32_t flavour)
{
    *f = (struct fixture){.vm = machine_create(), .buf_alloc = 1 << 20};
    snprintf(f->folder, sizeof f->folder, "/tmp/test-vsock-XXXXXX");
    CHECK(mkdtemp(f->folder));
    snprintf(f->path, sizeof f->path, "%s/v", f->folder);
    const int listener = unix_socket(f->path, true);
    CHECK_EQUAL(vmm_vsock_create(f->vm, "virtio-vsock 0", CID, f->path, listener, &f->device), 0);
    driver_start(&f->driver, f->vm, vmm_vsock_virtio(f->device), 1, flavour);
}

static void tear_down(struct fixture *f)
{
    vmm_virtio_reset(vmm_vsock_virtio(f->device));
    vmm_vm_destroy(f->vm);
    vmm_vsock_destroy(f->device);
    unlink(f->path);
    char port[80];
    snprintf(port, sizeof port, "%s_7", f->path);
    unlink(port);
    CHECK_EQUAL(rmdir(f->folder), 0);
}

/* What the I/O thread would do until nothing more is to be done. */
static void turn(struct fixture *f)
{
    for (bool more = true; more;) {
        driver_turn(&f->driver);
        more = f->device->listening && driver_source(&f->device->listener, EPOLLIN);
        for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++) {
            struct vsock_connection *c = &f->device->connections[i];
            if (c->watched >= 0)
                more |= driver_source(&c->source, (uint32_t)c->watched);
        }
    }
}

static struct vsock_header header(struct fixture *f, uint32_t guest, uint32_t host, enum vsock_op op)
{
    return (struct vsock_header){.src_cid = CID,
                                 .dst_cid = 2,
                                 .src_port = guest,
                                 .dst_port = host,
                                 .type = 1,
                                 .op = op,
                                 .buf_alloc = f->buf_alloc,
                                 .fwd_cnt = f->fwd_cnt};
}

/* A packet from the guest, taken at once. */
static void transmit(struct fixture *f, struct vsock_header h, const void *bytes, uint32_t n)
{
    h.len = n;
    memcpy(machine_at(f->vm, SENT, HEADER), &h, HEADER);
    if (n)
        memcpy(machine_at(f->vm, SENT + HEADER, n), bytes, n);
    driver_offer(&f->driver, TRANSMIT, (struct piece[]){OUT(SENT, HEADER), OUT(SENT + HEADER, n)}, n ? 2 : 1);
    turn(f);
    uint32_t written;
    CHECK(driver_collect(&f->driver, TRANSMIT, &written));
    CHECK_EQUAL(written, 0);
}

static void say(struct fixture *f, uint32_t guest, uint32_t host, enum vsock_op op, uint32_t flags)
{
    struct vsock_header h = header(f, guest, host, op);
    h.flags = flags;
    transmit(f, h, NULL, 0);
}

/* The next packet to the guest; its buffer goes back. false: there is none. */
static bool receive(struct fixture *f, struct vsock_header *h, uint8_t *bytes)
{
    int id;
    uint32_t written;
    if (!ring_collect(&f->driver.ring[RECEIVE], &id, &written))
        return false;
    const uint64_t at = f->where[id];
    CHECK(written >= HEADER);
    memcpy(h, machine_at(f->vm, at, HEADER), HEADER);
    CHECK_EQUAL(written, HEADER + h->len);
    CHECK_EQUAL(h->dst_cid, CID);
    CHECK_EQUAL(h->buf_alloc, h->op == VSOCK_RST ? h->buf_alloc : VSOCK_BUFFER);
    if (bytes)
        memcpy(bytes, machine_at(f->vm, at + HEADER, h->len), h->len);
    f->where[driver_offer(&f->driver, RECEIVE, (struct piece[]){IN(at, 100), IN(at + 100, PACKET - 100)},
                          2)] = at;
    return true;
}

static struct vsock_header expect(struct fixture *f, enum vsock_op op)
{
    struct vsock_header h = {0};
    CHECK(receive(f, &h, NULL));
    CHECK_EQUAL(h.op, op);
    return h;
}

static void expect_nothing(struct fixture *f)
{
    struct vsock_header h = {0};
    CHECK(!receive(f, &h, NULL));
}

static void expect_bytes(int fd, const char *bytes)
{
    char got[256] = {0};
    CHECK_EQUAL(read(fd, got, sizeof got), strlen(bytes));
    CHECK(strcmp(got, bytes) == 0);
}

static bool at_end(int fd)
{
    char byte;
    return read(fd, &byte, 1) == 0;
}

static unsigned open_now(struct fixture *f)
{
    vmm_vsock_info info;
    vmm_vsock_get_info(f->device, &info);
    unsigned n = 0;
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++)
        n += f->device->connections[i].state != VSOCK_FREE;
    CHECK_EQUAL(info.connections, n);
    return n;
}

/* A host's connection to the guest's port 80, taken; *host_port is what the host was given. */
static int open_from_host(struct fixture *f, uint32_t *host_port)
{
    const int fd = unix_socket(f->path, false);
    CHECK_EQUAL(write(fd, "CONNECT 80\n", 11), 11);
    turn(f);
    const struct vsock_header request = expect(f, VSOCK_REQUEST);
    CHECK_EQUAL(request.src_cid, 2);
    CHECK_EQUAL(request.dst_port, 80);
    CHECK_EQUAL(request.type, 1);
    *host_port = request.src_port;
    say(f, 80, *host_port, VSOCK_RESPONSE, 0);
    char line[32];
    snprintf(line, sizeof line, "OK %u\n", *host_port);
    expect_bytes(fd, line);
    return fd;
}

/* A guest's connection to the host's port 7; *listener is closed by the caller. */
static int open_from_guest(struct fixture *f, int *listener)
{
    char path[80];
    snprintf(path, sizeof path, "%s_7", f->path);
    *listener = unix_socket(path, true);
    say(f, 1000, 7, VSOCK_REQUEST, 0);
    const struct vsock_header response = expect(f, VSOCK_RESPONSE);
    CHECK_EQUAL(response.src_port, 7);
    CHECK_EQUAL(response.dst_port, 1000);
    const int fd = accept4(*listener, NULL, NULL, SOCK_NONBLOCK);
    CHECK(fd >= 0);
    return fd;
}

/* ---- opening and closing ---- */

static void the_host_connects_and_bytes_go_both_ways(void)
{
    const uint32_t flavours[] = {0, VMM_QUEUE_EVENT_IDX, VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX};
    for (unsigned i = 0; i < 3; i++) {
        struct fixture f;
        set_up(&f, flavours[i]);
        fill_receive_queue(&f, 32);
        uint32_t port;
        const int fd = open_from_host(&f, &port);
        uint8_t bytes[PACKET];
        struct vsock_header h;
        for (unsigned round = 0; round < 300; round++) {
            CHECK_EQUAL(write(fd, "ping", 4), 4);
            turn(&f);
            CHECK(receive(&f, &h, bytes));
            CHECK_EQUAL(h.op, VSOCK_RW);
            CHECK(h.len == 4 && memcmp(bytes, "ping", 4) == 0);
            CHECK_EQUAL(h.fwd_cnt, round * 6);
            f.fwd_cnt += 4;
            transmit(&f, header(&f, 80, port, VSOCK_RW), "pong!\n", 6);
            expect_bytes(fd, "pong!\n");
        }
        say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NEITHER);
        expect(&f, VSOCK_RST);
        CHECK(at_end(fd));
        CHECK_EQUAL(open_now(&f), 0);
        close(fd);
        tear_down(&f);
    }
}

static void the_guest_connects_to_whoever_listens_on_its_port(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    say(&f, 999, 7, VSOCK_REQUEST, 0); /* nobody does */
    const struct vsock_header refused = expect(&f, VSOCK_RST);
    CHECK_EQUAL(refused.src_port, 7);
    CHECK_EQUAL(refused.dst_port, 999);
    int listener;
    const int fd = open_from_guest(&f, &listener);
    transmit(&f, header(&f, 1000, 7, VSOCK_RW), "hello", 5);
    expect_bytes(fd, "hello");
    close(fd); /* both directions end */
    turn(&f);
    CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags, VSOCK_NEITHER);
    CHECK_EQUAL(open_now(&f), 1);
    say(&f, 1000, 7, VSOCK_RST, 0);
    CHECK_EQUAL(open_now(&f), 0);
    close(listener);
    tear_down(&f);
}

static void what_follows_the_greeting_belongs_to_the_stream(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    const int fd = unix_socket(f.path, false);
    CHECK_EQUAL(write(fd, "CONN", 4), 4);
    turn(&f);
    expect_nothing(&f);
    CHECK_EQUAL(write(fd, "ECT 80\nearly", 12), 12);
    shutdown(fd, SHUT_WR);
    turn(&f);
    const struct vsock_header request = expect(&f, VSOCK_REQUEST);
    say(&f, 80, request.src_port, VSOCK_RESPONSE, 0);
    struct vsock_header h;
    uint8_t bytes[PACKET];
    CHECK(receive(&f, &h, bytes));
    CHECK(h.op == VSOCK_RW && h.len == 5 && memcmp(bytes, "early", 5) == 0);
    CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags, VSOCK_NO_SEND);
    close(fd);
    tear_down(&f);
}

static void greetings_that_are_none_are_hung_up_on(void)
{
    static const char *const lines[] = {"\n",
                                        "CONNECT\n",
                                        "CONNECT \n",
                                        "CONNECT 8x\n",
                                        "CONNECT -1\n",
                                        "connect 80\n",
                                        "CONNECT 4294967295\n",
                                        "CONNECT 99999999999999",
                                        "GET / HTTP/1.1 and so on",
                                        ""};
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    for (unsigned i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        const int fd = unix_socket(f.path, false);
        if (lines[i][0])
            CHECK_EQUAL(write(fd, lines[i], strlen(lines[i])), strlen(lines[i]));
        else
            shutdown(fd, SHUT_WR);
        turn(&f);
        CHECK(lines[i][0] == 0 || recv(fd, &(char){0}, 1, 0) <= 0);
        close(fd);
        turn(&f);
        CHECK_EQUAL(open_now(&f), 0);
    }
    expect_nothing(&f);
    tear_down(&f);
}

static void a_guest_that_refuses_hangs_up_on_the_host(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    const int fd = unix_socket(f.path, false);
    CHECK_EQUAL(write(fd, "CONNECT 80\n", 11), 11);
    turn(&f);
    const struct vsock_header request = expect(&f, VSOCK_REQUEST);
    say(&f, 80, request.src_port, VSOCK_RST, 0);
    CHECK(at_end(fd));
    CHECK_EQUAL(open_now(&f), 0);
    close(fd);

    const int impatient = unix_socket(f.path, false);
    CHECK_EQUAL(write(impatient, "CONNECT 80\n", 11), 11);
    turn(&f);
    expect(&f, VSOCK_REQUEST);
    close(impatient);
    turn(&f);
    expect(&f, VSOCK_RST);
    CHECK_EQUAL(open_now(&f), 0);
    tear_down(&f);
}

static void half_a_stream_may_end_before_the_other(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    int fd = open_from_host(&f, &port);
    say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NO_SEND);
    CHECK(at_end(fd));
    CHECK_EQUAL(write(fd, "more", 4), 4);
    turn(&f);
    CHECK_EQUAL(expect(&f, VSOCK_RW).len, 4);
    shutdown(fd, SHUT_WR);
    turn(&f);
    CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags & VSOCK_NO_SEND, VSOCK_NO_SEND);
    say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NEITHER);
    expect(&f, VSOCK_RST);
    CHECK_EQUAL(open_now(&f), 0);
    close(fd);

    fd = open_from_host(&f, &port);
    shutdown(fd, SHUT_WR); /* the other way round */
    turn(&f);
    CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags, VSOCK_NO_SEND);
    transmit(&f, header(&f, 80, port, VSOCK_RW), "still", 5);
    expect_bytes(fd, "still");
    expect_nothing(&f);

    say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NO_RECEIVE);
    transmit(&f, header(&f, 80, port, VSOCK_RW), "and on", 6);
    expect_bytes(fd, "and on");
    close(fd);
    turn(&f);
    CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags, VSOCK_NEITHER);
    say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NEITHER);
    expect(&f, VSOCK_RST);
    CHECK_EQUAL(open_now(&f), 0);
    tear_down(&f);
}

static void what_the_guest_sent_before_it_closed_still_arrives(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    const int small = 4096;
    struct vsock_connection *c = &f.device->connections[0];
    CHECK_EQUAL(setsockopt(c->source.fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small), 0);
    static uint8_t sent[60000], got[60000];
    for (unsigned i = 0; i < sizeof sent; i++)
        sent[i] = (uint8_t)(i * 13 + (i >> 8));
    transmit(&f, header(&f, 80, port, VSOCK_RW), sent, sizeof sent);
    say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NEITHER);
    expect(&f, VSOCK_RST);
    CHECK_EQUAL(c->state, VSOCK_LINGERING);
    transmit(&f, header(&f, 80, port, VSOCK_RW), "late", 4); /* those ports are nobody's now */
    expect(&f, VSOCK_RST);
    for (size_t n = 0; n < sizeof sent;) {
        const ssize_t part = read(fd, got + n, sizeof got - n);
        CHECK(part > 0);
        n += (size_t)part;
        turn(&f);
    }
    CHECK(memcmp(got, sent, sizeof sent) == 0);
    CHECK(at_end(fd));
    CHECK_EQUAL(open_now(&f), 0);
    close(fd);
    tear_down(&f);
}

/* The guest gets `bytes` and hears that no more come; then both are done with the connection. */
static void expect_the_rest(struct fixture *f, uint32_t port, const char *bytes)
{
    struct vsock_header h = {0};
    uint8_t got[64] = {0};
    CHECK(receive(f, &h, got));
    CHECK_EQUAL(h.op, VSOCK_RW);
    CHECK_EQUAL(h.len, strlen(bytes));
    CHECK(memcmp(got, bytes, strlen(bytes)) == 0);
    CHECK_EQUAL(expect(f, VSOCK_SHUTDOWN).flags, VSOCK_NEITHER);
    say(f, 80, port, VSOCK_SHUTDOWN, VSOCK_NEITHER);
    expect(f, VSOCK_RST);
    CHECK_EQUAL(open_now(f), 0);
}

static void what_the_host_sent_before_it_closed_still_arrives(void)
{
    enum { BEFORE_IT_IS_SEEN, BEFORE_THE_ANSWER, AFTER_IT_UNREAD, MOMENTS };
    for (unsigned moment = 0; moment < MOMENTS; moment++) {
        struct fixture f;
        set_up(&f, 0);
        fill_receive_queue(&f, 32);
        const int fd = unix_socket(f.path, false);
        CHECK_EQUAL(write(fd, "CONNECT 80\nlast words", 21), 21);
        if (moment == BEFORE_IT_IS_SEEN)
            close(fd);
        turn(&f);
        const struct vsock_header request = expect(&f, VSOCK_REQUEST);
        if (moment == BEFORE_THE_ANSWER)
            close(fd);
        turn(&f);
        if (moment == AFTER_IT_UNREAD)
            f.buf_alloc = 0; /* so that the bytes wait for credit */
        say(&f, 80, request.src_port, VSOCK_RESPONSE, 0);
        if (moment == AFTER_IT_UNREAD) {
            expect_nothing(&f);
            close(fd); /* the "OK" is unread */
            f.buf_alloc = 1 << 20;
            say(&f, 80, request.src_port, VSOCK_CREDIT_UPDATE, 0);
        }
        turn(&f);
        if (moment != AFTER_IT_UNREAD)
            CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags, VSOCK_NO_RECEIVE); /* it reads no "OK" any more */
        expect_the_rest(&f, request.src_port, "last words");
        tear_down(&f);
    }
}

/* ---- credit ---- */

static void the_host_sends_no_more_than_the_guest_has_room_for(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    f.buf_alloc = 10;
    f.fwd_cnt = 0;
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    CHECK_EQUAL(write(fd, "0123456789abcdefghij", 20), 20);
    turn(&f);
    struct vsock_header h;
    uint8_t bytes[PACKET];
    CHECK(receive(&f, &h, bytes));
    CHECK(h.op == VSOCK_RW && h.len == 10 && memcmp(bytes, "0123456789", 10) == 0);
    expect(&f, VSOCK_CREDIT_REQUEST);
    expect_nothing(&f);
    f.fwd_cnt = 4;
    say(&f, 80, port, VSOCK_CREDIT_UPDATE, 0);
    CHECK(receive(&f, &h, bytes));
    CHECK(h.len == 4 && memcmp(bytes, "abcd", 4) == 0);
    expect(&f, VSOCK_CREDIT_REQUEST);
    f.fwd_cnt = 1000; /* more than it was ever sent: its own business */
    say(&f, 80, port, VSOCK_CREDIT_UPDATE, 0);
    turn(&f);
    CHECK_EQUAL(open_now(&f), 1);
    close(fd);
    tear_down(&f);
}

static void the_guest_is_told_of_room_as_the_host_reads(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    static uint8_t sent[16384], got[16384];
    uint32_t acknowledged = 0;
    struct vsock_header h;
    for (unsigned round = 0; round < 40; round++) { /* more than the buffer, by five times */
        memset(sent, (int)round, sizeof sent);
        transmit(&f, header(&f, 80, port, VSOCK_RW), sent, sizeof sent);
        CHECK_EQUAL(read(fd, got, sizeof got), sizeof got);
        CHECK(memcmp(sent, got, sizeof got) == 0);
        while (receive(&f, &h, NULL)) {
            CHECK_EQUAL(h.op, VSOCK_CREDIT_UPDATE);
            acknowledged = h.fwd_cnt;
        }
        CHECK((round + 1) * sizeof sent - acknowledged < VSOCK_BUFFER);
    }
    CHECK(acknowledged > 0);
    say(&f, 80, port, VSOCK_CREDIT_REQUEST, 0);
    CHECK_EQUAL(expect(&f, VSOCK_CREDIT_UPDATE).fwd_cnt, 40 * sizeof sent);
    close(fd);
    tear_down(&f);
}

/* Sends until the host's end is full and so is the buffer; answers how much went. */
static uint32_t stuff(struct fixture *f, uint32_t port)
{
    static uint8_t block[8192];
    struct vsock_connection *c = &f->device->connections[0];
    uint32_t sent = 0;
    while (c->received - c->forwarded + sizeof block <= VSOCK_BUFFER) {
        for (unsigned i = 0; i < sizeof block; i++)
            block[i] = (uint8_t)((sent + i) * 29 + (sent >> 8));
        transmit(f, header(f, 80, port, VSOCK_RW), block, sizeof block);
        sent += sizeof block;
        CHECK(sent < 8 << 20);
    }
    return sent;
}

static void a_slow_host_fills_the_buffer_and_gets_every_byte(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    uint32_t at = 0;
    for (unsigned round = 0; round < 3; round++) { /* so that the buffer wraps */
        const uint32_t sent = stuff(&f, port);
        CHECK_EQUAL(f.device->connections[0].received - f.device->connections[0].forwarded, VSOCK_BUFFER);
        for (uint32_t n = 0; n < sent;) {
            uint8_t got[5000];
            const ssize_t part = read(fd, got, sizeof got);
            CHECK(part > 0);
            for (ssize_t i = 0; i < part; i++, n++)
                CHECK_EQUAL(got[i], (uint8_t)(n * 29 + (n / 8192 * 8192 >> 8)));
            turn(&f);
        }
        at += sent;
        CHECK_EQUAL(f.device->connections[0].forwarded, at);
        struct vsock_header h;
        while (receive(&f, &h, NULL))
            ;
    }
    close(fd);
    tear_down(&f);
}

static void a_guest_that_sends_beyond_its_credit_is_reset(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    stuff(&f, port);
    struct vsock_header h = {0};
    while (receive(&f, &h, NULL))
        ;
    transmit(&f, header(&f, 80, port, VSOCK_RW), "x", 1);
    expect(&f, VSOCK_RST);
    CHECK_EQUAL(open_now(&f), 0);
    close(fd);
    tear_down(&f);
}

/* ---- a guest that is odd ---- */

static void packets_that_belong_to_nothing_are_answered_with_rst_and_rst_with_nothing(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    for (enum vsock_op op = 0; op < 12; op++) {
        say(&f, 5, 6, op, 0);
        if (op != VSOCK_RST)
            CHECK_EQUAL(expect(&f, VSOCK_RST).dst_port, 5);
        expect_nothing(&f);
    }
    struct vsock_header h = header(&f, 1000, 7, VSOCK_REQUEST);
    h.type = 2; /* SEQPACKET, which is not offered */
    transmit(&f, h, NULL, 0);
    CHECK_EQUAL(expect(&f, VSOCK_RST).type, 2);
    h = header(&f, 1000, 7, VSOCK_REQUEST);
    h.dst_cid = 3;
    transmit(&f, h, NULL, 0);
    CHECK_EQUAL(expect(&f, VSOCK_RST).src_cid, 3);
    h = header(&f, 1000, 7, VSOCK_REQUEST);
    h.src_cid = 1ull << 40;
    transmit(&f, h, NULL, 0);
    expect(&f, VSOCK_RST);
    tear_down(&f);
}

static void a_packet_out_of_turn_ends_its_connection(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    static const enum vsock_op odd[] = {0, VSOCK_REQUEST, VSOCK_RESPONSE, 8, 0xffff};
    for (unsigned i = 0; i < 5; i++) {
        uint32_t port;
        const int fd = open_from_host(&f, &port);
        say(&f, 80, port, odd[i], 0);
        expect(&f, VSOCK_RST);
        CHECK(at_end(fd));
        CHECK_EQUAL(open_now(&f), 0);
        close(fd);
    }
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    say(&f, 80, port, VSOCK_SHUTDOWN, VSOCK_NO_SEND);
    transmit(&f, header(&f, 80, port, VSOCK_RW), "x", 1); /* after its own end */
    expect(&f, VSOCK_RST);
    close(fd);

    const int asking = unix_socket(f.path, false);
    CHECK_EQUAL(write(asking, "CONNECT 80\n", 11), 11);
    turn(&f);
    const uint32_t asked = expect(&f, VSOCK_REQUEST).src_port;
    transmit(&f, header(&f, 80, asked, VSOCK_RW), "x", 1); /* before its answer */
    expect(&f, VSOCK_RST);
    CHECK(at_end(asking));
    CHECK_EQUAL(open_now(&f), 0);
    close(asking);
    tear_down(&f);
}

static void lengths_that_lie_break_the_device(void)
{
    const struct {
        uint32_t buffer, len;
    } cases[] = {{HEADER - 1, 0}, {HEADER, 1}, {HEADER + 10, 11}, {HEADER + 10, UINT32_MAX}};
    for (unsigned i = 0; i < 4; i++) {
        struct fixture f;
        set_up(&f, 0);
        struct vsock_header h = header(&f, 1, 2, VSOCK_RW);
        h.len = cases[i].len;
        memcpy(machine_at(f.vm, SENT, HEADER), &h, HEADER);
        driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(SENT, cases[i].buffer)}, 1);
        turn(&f);
        CHECK(f.driver.dev->status & VMM_STATUS_NEEDS_RESET);
        tear_down(&f);
    }
    struct fixture f;
    set_up(&f, 0);
    driver_offer(&f.driver, RECEIVE, (struct piece[]){IN(RECEIVED, HEADER - 1)}, 1);
    say(&f, 5, 6, VSOCK_RW, 0);
    CHECK(f.driver.dev->status & VMM_STATUS_NEEDS_RESET);
    tear_down(&f);
}

static void a_guest_without_receive_buffers_is_refused_a_bounded_number_of_times(void)
{
    struct fixture f;
    set_up(&f, VMM_QUEUE_EVENT_IDX);
    const struct vsock_header h = header(&f, 5, 6, VSOCK_RW);
    memcpy(machine_at(f.vm, SENT, HEADER), &h, HEADER);
    unsigned taken = 0;
    uint32_t written;
    for (unsigned i = 0; i < 100; i++)
        driver_offer(&f.driver, TRANSMIT, (struct piece[]){OUT(SENT, HEADER)}, 1);
    turn(&f);
    while (driver_collect(&f.driver, TRANSMIT, &written))
        taken++;
    CHECK_EQUAL(taken, VSOCK_REFUSALS);
    turn(&f); /* and it waits without a sound */

    fill_receive_queue(&f, 60);
    turn(&f);
    unsigned answered = 0;
    struct vsock_header got;
    while (receive(&f, &got, NULL)) {
        CHECK_EQUAL(got.op, VSOCK_RST);
        answered++;
        turn(&f);
    }
    while (driver_collect(&f.driver, TRANSMIT, &written))
        taken++;
    CHECK_EQUAL(taken, 100);
    CHECK_EQUAL(answered, 100);
    tear_down(&f);
}

static void data_waits_in_the_hosts_socket_for_receive_buffers(void)
{
    struct fixture f;
    set_up(&f, VMM_QUEUE_PACKED | VMM_QUEUE_EVENT_IDX);
    fill_receive_queue(&f, 2);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    static uint8_t sent[40000], got[PACKET];
    for (unsigned i = 0; i < sizeof sent; i++)
        sent[i] = (uint8_t)(i * 7 + (i >> 8));
    CHECK_EQUAL(write(fd, sent, sizeof sent), sizeof sent);
    turn(&f);
    CHECK_EQUAL(f.device->connections[0].watched, -1);
    struct vsock_header h;
    for (size_t n = 0; n < sizeof sent; n += h.len) {
        CHECK(receive(&f, &h, got));
        CHECK_EQUAL(h.op, VSOCK_RW);
        CHECK(memcmp(got, sent + n, h.len) == 0);
        turn(&f);
    }
    close(fd);
    turn(&f);
    CHECK_EQUAL(expect(&f, VSOCK_SHUTDOWN).flags, VSOCK_NEITHER);
    tear_down(&f);
}

static void a_full_table_refuses_the_guest_and_lets_the_host_wait(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 60);
    char path[80];
    snprintf(path, sizeof path, "%s_7", f.path);
    const int listener = unix_socket(path, true);
    struct vsock_header h;
    for (uint32_t i = 0; i < VSOCK_CONNECTIONS; i++) {
        say(&f, 1000 + i, 7, VSOCK_REQUEST, 0);
        CHECK(receive(&f, &h, NULL));
        CHECK_EQUAL(h.op, VSOCK_RESPONSE);
    }
    say(&f, 5000, 7, VSOCK_REQUEST, 0);
    expect(&f, VSOCK_RST);
    const int fd = unix_socket(f.path, false);
    CHECK_EQUAL(write(fd, "CONNECT 80\n", 11), 11);
    turn(&f);
    expect_nothing(&f);
    CHECK(!f.device->listening);
    say(&f, 1100, 7, VSOCK_RST, 0); /* one ends */
    turn(&f);
    expect(&f, VSOCK_REQUEST);
    CHECK_EQUAL(open_now(&f), VSOCK_CONNECTIONS);
    close(fd);
    close(listener);
    tear_down(&f);
}

/* ---- life ---- */

static void reset_ends_every_connection_and_the_host_may_connect_again(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    driver_start(&f.driver, f.vm, f.driver.dev, 1, 0);
    CHECK(at_end(fd));
    CHECK_EQUAL(open_now(&f), 0);
    close(fd);
    fill_receive_queue(&f, 32);
    close(open_from_host(&f, &port));
    tear_down(&f);
}

static void a_machine_that_was_copied_tells_its_guest(void)
{
    struct fixture f;
    set_up(&f, 0);
    fill_receive_queue(&f, 32);
    uint32_t port;
    const int fd = open_from_host(&f, &port);
    vmm_vsock_disconnect(f.device);
    turn(&f);
    CHECK(at_end(fd));
    close(fd);
    memset(machine_at(f.vm, SENT, 8), 0xff, 8);
    driver_offer(&f.driver, EVENT, (struct piece[]){IN(SENT, 8)}, 1);
    turn(&f);
    uint32_t written, event;
    CHECK(driver_collect(&f.driver, EVENT, &written));
    CHECK_EQUAL(written, 4);
    memcpy(&event, machine_at(f.vm, SENT, 4), 4);
    CHECK_EQUAL(event, 0);
    driver_offer(&f.driver, EVENT, (struct piece[]){IN(SENT, 8)}, 1);
    turn(&f);
    CHECK(!driver_collect(&f.driver, EVENT, &written));
    CHECK_EQUAL(vmm_virtio_config_read(f.driver.dev, 0, 8), CID);
    tear_down(&f);
}

static void arguments_that_make_no_sense_are_refused(void)
{
    vmm_vm *vm = machine_create();
    vmm_vsock *device;
    char path[VSOCK_PATH + 1] = {0};
    memset(path, 'p', VSOCK_PATH);
    CHECK_EQUAL(vmm_vsock_create(vm, "v", 2, "p", -1, &device), -EINVAL);
    CHECK_EQUAL(vmm_vsock_create(vm, "v", UINT32_MAX, "p", -1, &device), -EINVAL);
    CHECK_EQUAL(vmm_vsock_create(vm, "v", 3, path, -1, &device), -EINVAL);
    vmm_vm_destroy(vm);
}

int main(void)
{
    the_host_connects_and_bytes_go_both_ways();
    the_guest_connects_to_whoever_listens_on_its_port();
    what_follows_the_greeting_belongs_to_the_stream();
    greetings_that_are_none_are_hung_up_on();
    a_guest_that_refuses_hangs_up_on_the_host();
    half_a_stream_may_end_before_the_other();
    what_the_guest_sent_before_it_closed_still_arrives();
    what_the_host_sent_before_it_closed_still_arrives();
    the_host_sends_no_more_than_the_guest_has_room_for();
    the_guest_is_told_of_room_as_the_host_reads();
    a_slow_host_fills_the_buffer_and_gets_every_byte();
    a_guest_that_sends_beyond_its_credit_is_reset();
    packets_that_belong_to_nothing_are_answered_with_rst_and_rst_with_nothing();
    a_packet_out_of_turn_ends_its_connection();
    lengths_that_lie_break_the_device();
    a_guest_without_receive_buffers_is_refused_a_bounded_number_of_times();
    data_waits_in_the_hosts_socket_for_receive_buffers();
    a_full_table_refuses_the_guest_and_lets_the_host_wait();
    reset_ends_every_connection_and_the_host_may_connect_again();
    a_machine_that_was_copied_tells_its_guest();
    arguments_that_make_no_sense_are_refused();
    return 0;
}
