/* SPDX-License-Identifier: Apache-2.0 */
/* The PCI host's and the virtio-pci transport's states: in another machine everything reads as it did. */
#include "pci_rig.h"

#include <errno.h>
#include <string.h>

struct whole {
    vmm_pci_host_state host;
    vmm_virtio_state device;
    vmm_virtio_pci_state transport;
};

static void save(rig *r, struct whole *s)
{
    vmm_pci_host_save(r->host, &s->host);
    CHECK_EQUAL(vmm_virtio_save(&r->dev, &s->device), 0);
    vmm_virtio_pci_save(r->transport, &s->transport);
}

static void load(rig *r, const struct whole *s)
{
    CHECK_EQUAL(vmm_pci_host_load(r->host, &s->host), 0);
    CHECK_EQUAL(vmm_virtio_load(&r->dev, &s->device), 0);
    CHECK_EQUAL(vmm_virtio_pci_load(r->transport, &s->transport), 0);
}

/* All that a guest can read without an effect: configuration spaces, BAR 0 but for the ISR. */
static void reads_the_same(rig *a, rig *b)
{
    for (unsigned slot = 0; slot < 2; slot++)
        for (unsigned at = 0; at < VMM_PCI_CONFIG_SIZE; at += 4)
            CHECK_EQUAL(config(a, slot, at, 4), config(b, slot, at, 4));
    for (unsigned at = 0; at < BAR_SIZE; at += 4)
        if (at != ISR)
            CHECK_EQUAL(in(a, at, at < 60 ? (at >= 16 && at < 32) || at >= 56 ? 2 : 4 : 4),
                        in(b, at, at < 60 ? (at >= 16 && at < 32) || at >= 56 ? 2 : 4 : 4));
    CHECK_EQUAL(in(a, STATUS, 1), in(b, STATUS, 1));
    for (unsigned gsi = 0; gsi < FIRST_GSI + WIRES; gsi++)
        CHECK_EQUAL(a->level[gsi], b->level[gsi]);
}

static void a_driven_function_reads_the_same_in_another_machine(void)
{
    rig a, b;
    struct whole state, again;
    set_up(&a, NULL);
    set_up(&b, NULL);
    drive(&a);
    use_buffer(&a, 0); /* the pin is up */
    vmm_bus_write(a.vm, VMM_PIO, PORTS, 4, 0x80000810);
    set_config(&a, 1, VMM_PCI_INTERRUPT_LINE, 1, 5);
    out(&a, 0, 4, 1);
    save(&a, &state);
    load(&b, &state);
    reads_the_same(&a, &b);
    CHECK_EQUAL(b.level[FIRST_GSI + 1], 1);
    CHECK_EQUAL(vmm_bus_read(b.vm, VMM_PIO, PORTS, 4), 0x80000810);
    CHECK_EQUAL(b.starts, 1);
    save(&b, &again);
    CHECK(!memcmp(&state.host, &again.host, sizeof(state.host)));
    CHECK_EQUAL(in(&b, ISR, 1), 1);
    CHECK_EQUAL(b.level[FIRST_GSI + 1], 0);
    out(&b, NOTIFY, 2, 0); /* it is driven on */
    uint64_t kicked;
    CHECK_EQUAL(eventfd_read(b.kicked, &kicked), 0);

    load(&b, &state); /* and put back */
    CHECK_EQUAL(b.level[FIRST_GSI + 1], 1);
    reads_the_same(&a, &b);
    struct whole off;
    tear_down(&a);
    set_up(&a, NULL);
    save(&a, &off); /* to a machine that was never started, and its BAR away */
    load(&b, &off);
    CHECK_EQUAL(b.level[FIRST_GSI + 1], 0);
    CHECK_EQUAL(in(&b, STATUS, 1), 0xff);
    CHECK_EQUAL(b.stops, 2);
    reads_the_same(&a, &b);
    tear_down(&a);
    tear_down(&b);
}

static void vectors_pending_bits_and_masks_are_taken_along(void)
{
    rig a, b;
    struct whole state;
    set_up(&a, NULL);
    set_up(&b, NULL);
    drive(&a);
    set_config(&a, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    out(&a, QUEUE_VECTOR, 2, 2);
    out(&a, 16, 2, 1);
    out(&a, TABLE + 2 * 16, 4, 0xfee01000);
    out(&a, TABLE + 2 * 16 + 8, 4, 0x41);
    use_buffer(&a, 0); /* masked: pending */
    set_config(&a, 1, MSIX_CONTROL, 2, MSIX_ENABLE | MSIX_MASK);
    out(&a, TABLE + 16 + 12, 4, 0);
    change_configuration(&a); /* the function is masked */
    save(&a, &state);
    load(&b, &state);
    CHECK_EQUAL(in(&b, PENDING, 8), 6);
    reads_the_same(&a, &b);
    use_buffer(&b, 0);
    CHECK_EQUAL(b.level[FIRST_GSI + 1], 0); /* the pin is silent */
    set_config(&b, 1, MSIX_CONTROL, 2, MSIX_ENABLE);
    CHECK_EQUAL(in(&b, PENDING, 8), 4); /* vector 1 is out, 2 has a mask of its own */
    tear_down(&a);
    tear_down(&b);
}

static void bars_that_changed_places_find_each_other_s(void)
{
    rig r;
    static const uint16_t size = 8;
    set_up(&r, NULL);
    CHECK_EQUAL(vmm_virtio_init(&r.other, r.vm, &ops, &r, 4, "virtio-test 1", 0, 1, &size, 0), 0);
    CHECK_EQUAL(vmm_virtio_pci_create(&r.other, r.host, 9, &r.second), 9);
    for (unsigned slot = 1; slot <= 9; slot += 8)
        set_config(&r, slot, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
    vmm_pci_host_state straight, crossed;
    vmm_pci_host_save(r.host, &straight);
    set_config(&r, 9, VMM_PCI_BAR0, 4, WINDOW + 2 * BAR_SIZE);
    set_config(&r, 1, VMM_PCI_BAR0, 4, WINDOW + BAR_SIZE);
    set_config(&r, 9, VMM_PCI_BAR0, 4, WINDOW);
    vmm_pci_host_save(r.host, &crossed);
    for (int round = 0; round < 2; round++) {
        CHECK_EQUAL(vmm_pci_host_load(r.host, &straight), 0);
        CHECK(in(&r, 18, 2) == 2 && in(&r, BAR_SIZE + 18, 2) == 1);
        CHECK_EQUAL(vmm_pci_host_load(r.host, &crossed), 0);
        CHECK(in(&r, 18, 2) == 1 && in(&r, BAR_SIZE + 18, 2) == 2);
    }
    tear_down(&r);
}

static void what_no_driver_can_have_written_is_refused(void)
{
    rig r;
    set_up(&r, NULL);
    drive(&r);
    struct whole good, s;
    save(&r, &good);
    const struct {
        unsigned slot, at;
        uint8_t value;
    } bytes[] = {{1, VMM_PCI_VENDOR, 1},          {1, VMM_PCI_BAR0, 0},
                 {1, VMM_PCI_COMMAND, 1},         {1, VMM_PCI_INTERRUPT_PIN, 2},
                 {1, VMM_PCI_STATUS, 0x8},        {0, VMM_PCI_INTERRUPT_LINE, 3},
                 {1, VMM_PCI_CAPABILITIES, 0xf0}, {1, 0xff, 1}};
    for (unsigned i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++) {
        s = good;
        s.host.config[bytes[i].slot][bytes[i].at] = bytes[i].value;
        CHECK_EQUAL(vmm_pci_host_load(r.host, &s.host), -EINVAL);
    }
    s = good;
    s.host.address = 3;
    CHECK_EQUAL(vmm_pci_host_load(r.host, &s.host), -EINVAL);
    for (uint32_t present = 0; present < 8; present++)
        if (present != 3) {
            s = good;
            s.host.present = present;
            CHECK_EQUAL(vmm_pci_host_load(r.host, &s.host), -EINVAL);
        }

    vmm_virtio_pci_state *const t = &s.transport, *const g = &good.transport;
    struct {
        void *at;
        size_t size;
        uint32_t value;
    } const wrong[] = {{&t->n_vectors, 4, 2},
                       {&t->n_vectors, 4, UINT32_MAX},
                       {&t->isr, 4, 4},
                       {&t->config_vector, 2, 3},
                       {&t->queue_vectors[0], 2, 3},
                       {&t->queue_vectors[63], 2, 0xfffe},
                       {&t->msix[1].words[0], 4, 0xfee00001},
                       {&t->msix[2].words[3], 4, 2},
                       {&t->msix[0].pending, 1, 2}};
    for (unsigned i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        s = good;
        memcpy(wrong[i].at, &wrong[i].value, wrong[i].size);
        CHECK_EQUAL(vmm_virtio_pci_load(r.transport, t), -EINVAL);
    }
    CHECK_EQUAL(vmm_virtio_pci_load(r.transport, g), 0);
    save(&r, &s);
    CHECK(!memcmp(&s.host, &good.host, sizeof(s.host)));
    CHECK(!memcmp(g->queue_vectors, t->queue_vectors, sizeof(g->queue_vectors)));
    tear_down(&r);
}

int main(void)
{
    a_driven_function_reads_the_same_in_another_machine();
    vectors_pending_bits_and_masks_are_taken_along();
    bars_that_changed_places_find_each_other_s();
    what_no_driver_can_have_written_is_refused();
    return 0;
}
