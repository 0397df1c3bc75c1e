/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The files of the socket device, each above the one before: vsock_table.c has the connections, vsock_packets.c sends to
 * the guest, vsock_host.c speaks with the host through UNIX sockets, vsock.c takes the guest's packets and is the device.
 * The device's lock is held around every function here, but for the two that the I/O thread calls, which take it.
 *
 * Nothing is sent to the guest on the spot but data: a packet is owed (vsock_owe), and vsock_settle sends what is owed
 * as the guest provides buffers. So what a guest that provides none can make the device remember is one bit a packet
 * kind and connection, and a bounded list of refusals, which being full keeps its transmit queue waiting.
 */
#ifndef VMM_VIRTIO_VSOCK_H
#define VMM_VIRTIO_VSOCK_H

#include "virtio/virtio.h"
#include "vmmvsock.h"

enum { VSOCK_RECEIVE = 0, VSOCK_TRANSMIT = 1, VSOCK_EVENT = 2 }; /* queues: virtio 1.2, 5.10.2 */
enum { VSOCK_STREAM = 1 };                                       /* a packet's type */
#define VSOCK_HOST_CID 2
#define VSOCK_CONNECTIONS 256
#define VSOCK_BUFFER (128u << 10) /* buf_alloc: what the guest may send ahead of the host's end */
#define VSOCK_REFUSALS 64
#define VSOCK_PATH 96 /* sun_path has 108 bytes; "_4294967295" and the end need 12 */

enum vsock_op { /* virtio 1.2, 5.10.6 */
                VSOCK_REQUEST = 1,
                VSOCK_RESPONSE = 2,
                VSOCK_RST = 3,
                VSOCK_SHUTDOWN = 4,
                VSOCK_RW = 5,
                VSOCK_CREDIT_UPDATE = 6,
                VSOCK_CREDIT_REQUEST = 7,
};
enum vsock_shutdown { VSOCK_NO_RECEIVE = 1, VSOCK_NO_SEND = 2, VSOCK_NEITHER = 3 };

/* On the wire; little-endian, as every host of this library. */
struct vsock_header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct vsock_header) == 44, "virtio 1.2, 5.10.6");

enum vsock_state {
    VSOCK_FREE = 0,
    VSOCK_GREETING,  /* the host connected; its "CONNECT <port>" is not here yet */
    VSOCK_REQUESTED, /* REQUEST goes to the guest; no answer yet */
    VSOCK_OPEN,
    VSOCK_CLOSING,   /* the host's end is gone, and the guest is told: its RST frees the ports */
    VSOCK_RESETTING, /* the host's end is gone; RST goes to the guest, then it is over */
    VSOCK_LINGERING, /* the guest's end is gone; the host still gets what was sent */
};

struct vsock_connection {
    struct vmm_vsock *device;
    struct vmm_source source; /* the host's end; fd -1: gone */
    int watched;              /* events; -1: not watched */
    enum vsock_state state;
    uint32_t host_port, guest_port;
    uint16_t owed;                         /* 1 << enum vsock_op */
    uint8_t guest_shutdown, host_shutdown; /* enum vsock_shutdown: what each end said of itself */
    bool starved;                          /* the host has data, the guest had no buffer */
    bool asked;                            /* for credit, since it ran out */
    uint32_t peer_alloc, peer_fwd, sent; /* the guest's buffer, what it has taken from it; bytes sent to it */
    uint32_t received, forwarded, told;  /* bytes from the guest; on to the host; as the guest last heard */
    uint8_t *buffer; /* VSOCK_BUFFER; bytes [forwarded, received) at their number modulo it */
    char line[20];   /* the greeting: "CONNECT 4294967295\n" has 19 */
    uint8_t line_length;
};

/* A packet that belongs to no connection, and the RST it gets. */
struct vsock_refusal {
    uint64_t src_cid;
    uint32_t src_port, dst_port;
    uint16_t type;
};

struct vmm_vsock {
    struct vmm_virtio virtio;
    vmm_vsock_info info;
    char path[VSOCK_PATH];
    struct vmm_source listener;
    void (*end_ready)(struct vmm_source *source, uint32_t events); /* of every connection */
    bool listening;
    bool reset_owed;           /* the event, not a packet */
    bool transmit_waits;       /* for room among the refusals */
    uint32_t next_port;        /* host ports are given out in turn */
    uint32_t turn;             /* what is left of it, in bytes */
    uint32_t owing, next_owed; /* connections that owe packets; where to look first */
    uint32_t refused;
    struct vsock_refusal refusals[VSOCK_REFUSALS];
    struct vsock_connection connections[VSOCK_CONNECTIONS]; /* in place: their sources outlive any event */
};

/* ---- vsock_table.c ---- */

uint32_t vsock_credit(const struct vsock_connection *c); /* bytes that the guest has room for */
uint32_t vsock_kept(const struct vsock_connection *c); /* bytes from the guest that the host has not taken */
bool vsock_hung_up(const struct vsock_connection *c);  /* the host's end, now */
bool vsock_may_receive(const struct vsock_connection *c);
/* The connection between these ports that the guest may speak of. NULL: none; a lingering one is not its any more. */
struct vsock_connection *vsock_find(struct vmm_vsock *device, uint32_t guest_port, uint32_t host_port);

void vsock_owe(struct vsock_connection *c, enum vsock_op op);
void vsock_forget_owed(struct vsock_connection *c);

/* Watch the host's end for what can be acted upon now, and nothing else: a level-triggered event must not spin. */
void vsock_watch(struct vsock_connection *c);
void vsock_listen(struct vmm_vsock *device, bool on);

struct vsock_connection *vsock_allocate(struct vmm_vsock *device, int fd,
                                        enum vsock_state state); /* or NULL */
void vsock_close(struct vsock_connection *c);                    /* the host's end */
void vsock_free(struct vsock_connection *c);                     /* no word to the guest */
void vsock_reset(struct vsock_connection *c); /* RST to the guest; the host's end is closed */
uint32_t vsock_new_port(struct vmm_vsock *device);

/* ---- vsock_packets.c ---- */

/* Bytes of the host's end go to the guest, as long as there are bytes, credit and buffers. */
void vsock_receive(struct vsock_connection *c);
void vsock_send_event(struct vmm_vsock *device);
void vsock_settle(struct vmm_vsock *device); /* at the end of every handler */

/* ---- vsock_host.c ---- */

int vsock_connect(const struct vmm_vsock *device, uint32_t port); /* a socket, or -1 */
/* The guest took the host's connection. */
void vsock_greet_back(struct vsock_connection *c);
/* n bytes of a chain, within the guest's credit, go to the host's end or into the buffer. */
void vsock_forward(struct vsock_connection *c, const struct vmm_chain *chain, uint64_t at, uint32_t n);
/* The guest said that it will not send or receive any more. */
void vsock_guest_shut(struct vsock_connection *c);
/* A connection's end is ready; a client has connected. */
void vsock_end_ready(struct vmm_source *source, uint32_t events);
void vsock_listener_ready(struct vmm_source *source, uint32_t events);

#endif
