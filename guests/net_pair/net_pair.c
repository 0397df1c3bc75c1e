/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two guests on a link. "role=0" sends frames of every size, several at a time, and checks that each comes back as it
 * went; "role=1" sends back what it gets until it is told to end. Which of them starts first does not matter.
 *   mergeable=1   received frames are spread over small buffers
 *   packed=1      agree to packed rings
 */
#include "cpu.h"
#include "virtio.h"

enum { FRAME_MIN = 60, FRAME_MAX = 1514, WINDOW = 8, ROUNDS = 32, RECEIVE_BUFFERS = 32, SMALL = 256 };
enum { HELLO = 0, END = 0xffff, RETRY_TICKS = 5000000 };

/* Ethernet, an experimental type (IEEE 802), what number it has and how much follows. */
struct frame {
    uint8_t to[6], from[6], type[2];
    uint16_t number, length;
    uint8_t bytes[FRAME_MAX - 18];
} __attribute__((packed));
_Static_assert(sizeof(struct frame) == FRAME_MAX, "");

struct packet {
    struct net_header header;
    struct frame frame;
};

static struct virtio_device nic;
static struct virtqueue receive, transmit;
static struct packet sent[WINDOW], received;
static uint8_t buffers[RECEIVE_BUFFERS][sizeof(struct packet)] __attribute__((aligned(64)));
static uint32_t buffer_size;
static unsigned in_flight;

static void offer_buffer(unsigned n)
{
    virtqueue_offer(&receive, n, &(struct virtq_buffer){buffers[n], buffer_size, true}, 1);
}

/* The next frame into `received`, its buffers given back; its length, or 0. */
static uint32_t poll(void)
{
    uint32_t written, size = 0;
    int n = virtqueue_take(&receive, &written);
    if (n < 0)
        return 0;
    const struct net_header *header = (const void *)buffers[n];
    CHECK_EQ(header->flags | header->gso_type, 0);
    unsigned parts = nic.agreed & NET_F_MRG_RXBUF ? header->buffers : 1;
    CHECK(parts >= 1 && parts <= RECEIVE_BUFFERS);
    for (;;) {
        CHECK(written <= buffer_size && size + written <= sizeof received);
        memcpy((char *)&received + size, buffers[n], written);
        size += written;
        offer_buffer((unsigned)n);
        if (--parts == 0)
            break;
        CHECK_EQ(written, buffer_size); /* 5.1.6.4.1: only the last may be part full */
        while ((n = virtqueue_take(&receive, &written)) < 0)
            ;
    }
    virtqueue_publish(&receive);
    CHECK(size >= sizeof(struct net_header) + FRAME_MIN);
    return size - (uint32_t)sizeof(struct net_header);
}

static void send(unsigned slot, uint32_t length)
{
    sent[slot].header = (struct net_header){0};
    virtqueue_offer(&transmit, slot,
                    &(struct virtq_buffer){&sent[slot], sizeof(struct net_header) + length, false}, 1);
    virtqueue_publish(&transmit);
    in_flight++;
}

/* Until the device has read what was sent. */
static void settle(void)
{
    for (uint32_t written; in_flight;)
        if (virtqueue_take(&transmit, &written) >= 0)
            in_flight--;
}

static void make(unsigned slot, uint16_t number, uint32_t length)
{
    struct frame *frame = &sent[slot].frame;
    memset(frame, 0xff, 12);
    frame->type[0] = 0x88;
    frame->type[1] = 0xb5;
    frame->number = number;
    frame->length = (uint16_t)length;
    for (uint32_t i = 0; i < sizeof frame->bytes; i++)
        frame->bytes[i] = (uint8_t)(number + i * 7);
}

static bool ours(uint32_t length)
{
    return length && received.frame.type[0] == 0x88 && received.frame.type[1] == 0xb5;
}

static uint64_t lead(uint64_t unused)
{
    bool met = false;
    while (!met) {
        make(0, HELLO, FRAME_MIN);
        send(0, FRAME_MIN);
        for (uint64_t since = rdtsc(); !met && rdtsc() - since < RETRY_TICKS;)
            met = ours(poll()) && received.frame.number == HELLO;
        settle();
    }
    uint16_t number = 1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        uint16_t expected = number;
        for (unsigned slot = 0; slot < WINDOW; slot++, number++) {
            uint32_t length = FRAME_MIN + (number * 97u) % (FRAME_MAX - FRAME_MIN + 1);
            make(slot, number, number == 1 ? FRAME_MAX : length);
            send(slot, sent[slot].frame.length);
        }
        for (unsigned slot = 0; slot < WINDOW;) {
            uint32_t length = poll();
            if (!ours(length) || received.frame.number == HELLO)
                continue;
            CHECK_EQ(received.frame.number, expected++);
            CHECK_EQ(length, sent[slot].frame.length);
            CHECK_EQ(memcmp(&received.frame, &sent[slot].frame, length), 0);
            slot++;
        }
        settle();
    }
    make(0, END, FRAME_MIN);
    send(0, FRAME_MIN);
    settle();
    return unused;
}

static uint64_t follow(uint64_t unused)
{
    do {
        uint32_t length;
        while (!ours(length = poll()))
            ;
        sent[0].frame = received.frame;
        send(0, length);
        settle();
    } while (received.frame.number != END);
    return unused;
}

static uint64_t run(uint64_t role)
{
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_NET, 0, &nic));
    uint64_t wanted =
        (argument("mergeable", 0) ? NET_F_MRG_RXBUF : 0) | (argument("packed", 0) ? VIRTIO_F_RING_PACKED : 0);
    virtio_negotiate(&nic, wanted);
    CHECK_EQ(nic.agreed, wanted | VIRTIO_F_VERSION_1);
    buffer_size = nic.agreed & NET_F_MRG_RXBUF ? SMALL : sizeof(struct packet);
    virtqueue_start(&nic, NET_RECEIVE, 64, 1, false, false, &receive);
    virtqueue_start(&nic, NET_TRANSMIT, 64, 1, false, false, &transmit);
    CHECK(receive.requests >= RECEIVE_BUFFERS && transmit.requests >= WINDOW);
    virtio_driver_ok(&nic);
    for (unsigned n = 0; n < RECEIVE_BUFFERS; n++)
        offer_buffer(n);
    virtqueue_publish(&receive);
    return role ? follow(0) : lead(0);
}

void guest_main(void)
{
    cpu_init();
    enter_user_with_ports(run, argument_required("role"));
}
