/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Interrupts of virtio-rng, taken while the processor halts: one cause for each request, no more. Which kind, decide
 * the transport and "msix=1": MSI-X, a vector for the queue; INTx; or the level-triggered line of virtio-mmio. With
 * "masked=1" (MSI-X) the entry is masked while a request is done, and the interrupt comes when it no longer is.
 * "requests=N": so many (8).
 */
#include "interrupts.h"
#include "pci.h"
#include "virtio.h"

enum { VECTOR_QUEUE = VECTOR_FREE, VECTOR_CONFIG, BYTES = 64, QUEUE_ENTRY = 1, CONFIG_ENTRY = 0 };

static struct virtio_device rng;
static struct virtqueue queue;
static volatile unsigned causes, config_interrupts;
static bool by_message;

static void on_queue(struct trap_frame *frame)
{
    (void)frame;
    /* A message is a cause; of a line the device says so, and reading takes the level away before the I/O APIC looks
     * again. A shared line may interrupt without a cause of ours, and on some KVMs one of its own does. */
    if (by_message || virtio_isr(&rng) == VIRTIO_ISR_QUEUE)
        causes++;
    lapic_write(LAPIC_EOI, 0);
}

static void on_config(struct trap_frame *frame)
{
    (void)frame;
    config_interrupts++;
    lapic_write(LAPIC_EOI, 0);
}

static void let_interrupts_in(void)
{
    __asm__ volatile("sti; nop; nop; cli" ::: "memory");
}

static void start_request(void)
{
    static uint8_t bytes[BYTES];
    virtqueue_offer(&queue, 0, &(struct virtq_buffer){bytes, sizeof bytes, true}, 1);
    virtqueue_publish(&queue);
}

void guest_main(void)
{
    cpu_init();
    pic_init(); /* and nothing of it unmasked: firmware may have left a timer running */
    lapic_init();
    trap_handlers[VECTOR_QUEUE] = on_queue;
    trap_handlers[VECTOR_CONFIG] = on_config;
    REQUIRE(EXIT_DEVICE, virtio_find(VIRTIO_RNG, 0, &rng));
    virtio_negotiate(&rng, argument("event_idx", 0) ? VIRTIO_F_EVENT_IDX : 0);
    by_message = argument("msix", 0);
    print("%s\n", by_message ? "MSI-X" : rng.pci ? "INTx" : "line");
    if (by_message) {
        CHECK(rng.pci);
        pci_msix_route(rng.function, CONFIG_ENTRY, VECTOR_CONFIG);
        pci_msix_route(rng.function, QUEUE_ENTRY, VECTOR_QUEUE);
        pci_msix_enable(rng.function, true);
        virtqueue_vector(&rng, 0, QUEUE_ENTRY);
    } else {
        ioapic_route(rng.irq, VECTOR_QUEUE, IOAPIC_LEVEL);
    }
    virtqueue_start(&rng, 0, 8, 1, false, true, &queue);
    virtio_driver_ok(&rng);

    const unsigned requests = (unsigned)argument("requests", 8);
    for (unsigned n = 1; n <= requests; n++) {
        uint32_t written = 0;
        bool done = false;
        start_request();
        for (;;) {
            done = done || virtqueue_take(&queue, &written) == 0;
            if (done && causes >= n)
                break;
            wait_for_interrupt();
        }
        CHECK(written > 0 && written <= BYTES);
        let_interrupts_in();
        CHECK_EQ(causes, n);
    }
    CHECK_EQ(config_interrupts, 0);

    if (argument("masked", 0)) {
        uint32_t written;
        pci_msix_mask(rng.function, QUEUE_ENTRY, true);
        start_request();
        while (virtqueue_take(&queue, &written) < 0)
            let_interrupts_in();
        let_interrupts_in();
        CHECK_EQ(causes, requests);
        pci_msix_mask(rng.function, QUEUE_ENTRY, false);
        while (causes == requests)
            wait_for_interrupt();
    }
}
