/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sockets: packets well and badly made, host ends that come, write, read and go. What must hold: the table's counters
 * agree with the table, buffers are within their bound, nothing spins, and after a reset nothing is open.
 */
#include "driven.h"
#include "virtio/vsock.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { RECEIVE = 0, TRANSMIT = 1, EVENT = 2, HOSTS = 6, CID = 3 };

static char path[80], port_path[96];
static int hosts[HOSTS], guests_listener;

static int unix_socket(const char *at, bool listening)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", at);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK(fd >= 0);
    if (listening) {
        unlink(at);
        CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 64) == 0);
    } else if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void check_table(const struct vmm_vsock *device)
{
    unsigned open = 0, owing = 0;
    for (unsigned i = 0; i < VSOCK_CONNECTIONS; i++) {
        const struct vsock_connection *c = &device->connections[i];
        open += c->state != VSOCK_FREE;
        owing += c->owed != 0;
        CHECK(c->received - c->forwarded <= VSOCK_BUFFER);
        CHECK(c->buffer || c->received == c->forwarded);
        CHECK((c->source.fd >= 0) ==
              (c->state != VSOCK_FREE && c->state != VSOCK_CLOSING && c->state != VSOCK_RESETTING));
        CHECK((c->watched >= 0) == c->source.live);
    }
    CHECK(open == device->info.connections && owing == device->owing);
    CHECK(device->refused <= VSOCK_REFUSALS);
}

/* One pass of the I/O thread over everything that is watched. true: there was something. */
static bool pass(struct vmm_vsock *device, struct driver *driver)
{
    bool any = false;
    for (uint32_t i = 0; i < driver->dev->n_queues; i++)
        any |= driver_source(&driver->dev->queues[i].source, EPOLLIN);
    any |= device->listening && driver_source(&device->listener, EPOLLIN);
    for (unsigned i = 0; i < VSOCK_CONNECTIONS && device->info.connections; i++)
        if (device->connections[i].watched >= 0)
            any |= driver_source(&device->connections[i].source, (uint32_t)device->connections[i].watched);
    check_table(device);
    return any;
}

/* A packet of the guest: mostly of a connection there is, mostly with an operation there is. */
static void guest_sends(struct vmm_vsock *device, struct driver *driver, uint8_t how, struct input *in)
{
    const struct vsock_connection *c = &device->connections[take(in, 1) % 8];
    struct vsock_header h = {.src_cid = CID, .dst_cid = 2, .type = 1};
    h.src_port = how & 1 ? (uint32_t)take(in, 1) : c->guest_port;
    h.dst_port = how & 2 ? 7 : c->host_port;
    h.op = (uint16_t)(how & 4 ? take(in, 2) : take(in, 1) % 9);
    h.flags = (uint32_t)take(in, 1);
    h.buf_alloc = how & 8 ? (uint32_t)take(in, 4) : 1 << 16;
    h.fwd_cnt = how & 16 ? (uint32_t)take(in, 4) : c->sent;
    const uint32_t data = (uint32_t)take(in, how & 32 ? 3 : 1) & 0x3ffff;
    h.len = how & 64 ? (uint32_t)take(in, 4) : data;
    if (how == 0xff)
        h.dst_cid = h.type = (uint16_t)take(in, 2);
    memcpy(machine_at(driver->ring[0].vm, BUFFERS, sizeof h), &h, sizeof h);
    struct piece pieces[] = {OUT(BUFFERS, sizeof h), OUT(BUFFERS + sizeof h, data)};
    if (ring_offer(&driver->ring[TRANSMIT], pieces, data ? 2 : 1) >= 0)
        vmm_virtqueue_ring(&driver->dev->queues[TRANSMIT]);
    pass(device, driver); /* the buffer is used for the next packet */
}

static void host_acts(uint8_t how, struct input *in)
{
    static const char *const lines[] = {"CONNECT 80\n",     "CONNECT ",           "7\n",
                                        "CONNECT 1\nearly", "GET / HTTP/1.1\r\n", "\n"};
    int *fd = &hosts[how % HOSTS];
    const char *line;
    char block[4096];
    switch (how >> 4 & 7) {
    case 0:
    case 1:
        if (*fd >= 0)
            close(*fd);
        *fd = how & 0x80 ? accept4(guests_listener, NULL, NULL, SOCK_NONBLOCK) : unix_socket(path, false);
        break;
    case 2:
    case 3:
        line = lines[how & 3 ? 0 : take(in, 1) % 6];
        send(*fd, line, strlen(line), MSG_NOSIGNAL);
        break;
    case 4:
        memset(block, how, sizeof block);
        send(*fd, block, 1 + take(in, 2) % sizeof block, MSG_NOSIGNAL);
        break;
    case 5:
        (void)!read(*fd, block, 1 + take(in, 2) % sizeof block);
        break;
    case 6:
        shutdown(*fd, (int)(take(in, 1) % 3));
        break;
    case 7:
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static vmm_vm *vm;
    static vmm_vsock *device;
    static struct driver driver;
    if (!vm) {
        vm = machine_create();
        snprintf(path, sizeof path, "/tmp/fuzz-vsock-%d", (int)getpid());
        snprintf(port_path, sizeof port_path, "%s_7", path);
        CHECK(vmm_vsock_create(vm, "virtio-vsock0", CID, path, unix_socket(path, true), &device) == 0);
        guests_listener = unix_socket(port_path, true);
        memset(hosts, -1, sizeof hosts);
    }
    struct input in = {data, data + size};
    driver_start(&driver, vm, vmm_vsock_virtio(device), 1, take_flavour(&in));
    while (in.at < in.end) {
        const uint8_t op = (uint8_t)take(&in, 1);
        switch (op & 7) {
        case 0:
        case 1:
            guest_sends(device, &driver, (uint8_t)take(&in, 1), &in);
            break;
        case 2: /* receive buffers, of a size that makes sense */
            for (unsigned i = 0; i <= op >> 5; i++)
                ring_offer(&driver.ring[RECEIVE], &(struct piece)IN(0x300000, 64 + (op & 24) * 64), 1);
            vmm_virtqueue_ring(&driver.dev->queues[RECEIVE]);
            break;
        case 3:
            guest_offers(&driver, (op >> 4) % 3, (op >> 4) % 3 != TRANSMIT, 1 << 20, &in);
            break;
        case 4:
            guest_scribbles(&driver, (op >> 4) % 3, &in);
            break;
        case 5:
            if (op & 8)
                vmm_vsock_disconnect(device);
            else
                guest_fills(&driver, &in);
            break;
        case 6:
            host_acts((uint8_t)take(&in, 1), &in);
            break;
        case 7:
            pass(device, &driver);
            break;
        }
    }
    /* Everybody holds still: so must the device, soon. */
    unsigned passes = 0;
    while (pass(device, &driver))
        CHECK(++passes < 2000);
    vmm_virtio_reset(driver.dev);
    check_table(device);
    CHECK(device->info.connections == 0 && !device->listening);
    for (unsigned i = 0; i < HOSTS; i++) {
        if (hosts[i] >= 0)
            close(hosts[i]);
        hosts[i] = -1;
    }
    for (int fd; (fd = accept(guests_listener, NULL, NULL)) >= 0;)
        close(fd);
    for (int fd; (fd = accept(device->listener.fd, NULL, NULL)) >= 0;)
        close(fd);
    return 0;
}
