/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Configuration space, BAR and MSI-X registers of two virtio functions that share an interrupt wire, written by a
 * guest that knows no rules. An input is a list of accesses; at its end the invariants below hold, and a reset brings
 * everything back.
 */
#include "pci_rig.h"

#include <string.h>

#define OTHER_SLOT (1 + WIRES)

/* One access of the guest, or a thing that happens. Offsets are folded into the range the access goes to. */
struct step {
    uint8_t what;
    uint8_t size; /* 1 << (size % 4) */
    uint16_t offset;
    uint32_t low, high;
};

enum what { CONFIG, CONFIG_PORTS, BAR, ANYWHERE, MOVE, BUFFER, CONFIGURATION, WHATS };

static rig r;
static uint8_t power_on[2][VMM_PCI_CONFIG_SIZE], read_only[2][VMM_PCI_CONFIG_SIZE];

static unsigned slot_of(unsigned function)
{
    return function ? OTHER_SLOT : 1;
}

static struct vmm_virtio *device_of(unsigned function)
{
    return function ? &r.other : &r.dev;
}

static void touch(uint64_t address, uint32_t size, uint64_t value, bool write)
{
    if (write)
        vmm_bus_write(r.vm, VMM_MMIO, address, size, value);
    else
        vmm_bus_read(r.vm, VMM_MMIO, address, size);
}

static uint64_t bar_of(unsigned function)
{
    vmm_pci_bar_info info;
    CHECK_EQUAL(vmm_pci_get_bar(r.host, slot_of(function), 0, &info), 0);
    return info.address;
}

static void take(const struct step *s)
{
    unsigned function = s->what >> 7, slot = slot_of(function);
    bool write = !(s->what & 0x40);
    uint32_t size = 1u << s->size % 4;
    uint64_t value = s->low | (uint64_t)s->high << 32, bar = bar_of(function);
    switch (s->what % 0x40 % WHATS) {
    case CONFIG:
        touch(ECAM + (slot << 15) + s->offset % 0x100, size, value, write);
        break;
    case CONFIG_PORTS:
        vmm_bus_write(r.vm, VMM_PIO, PORTS, 4, 1u << 31 | slot << 11 | s->offset % 0x100);
        if (write)
            vmm_bus_write(r.vm, VMM_PIO, PORTS + s->size / 4 % 8, size, value);
        else
            vmm_bus_read(r.vm, VMM_PIO, PORTS + s->size / 4 % 8, size);
        break;
    case BAR: /* where decoding is off, turn it on: most of the registers are behind it */
        if (bar == VMM_PCI_NOWHERE)
            set_config(&r, slot, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY);
        else
            touch(bar + s->offset % BAR_SIZE, size, value, write);
        break;
    case ANYWHERE:
        touch(ECAM + (value & 0xfffff), size, value >> 20, write);
        break;
    case MOVE:
        set_config(&r, slot, VMM_PCI_BAR0, 8, WINDOW + s->offset % 4 * BAR_SIZE);
        break;
    case BUFFER: {
        VMM_VIRTIO_LOCKED(device_of(function));
        if (device_of(function)->running)
            device_of(function)->transport->queue_interrupt(device_of(function)->transport_opaque,
                                                            s->offset % 2);
        break;
    }
    case CONFIGURATION:
        vmm_virtio_config_set(device_of(function), 0, &value, 8);
        break;
    }
}

static void copy_config(unsigned slot, uint8_t to[VMM_PCI_CONFIG_SIZE])
{
    for (unsigned i = 0; i < VMM_PCI_CONFIG_SIZE; i += 8) {
        uint64_t word = config(&r, slot, i, 8);
        memcpy(to + i, &word, 8);
    }
}

static void check_invariants(void)
{
    bool up = false;
    uint64_t bars[2];
    uint8_t now[VMM_PCI_CONFIG_SIZE];
    for (unsigned function = 0; function < 2; function++) {
        unsigned slot = slot_of(function);
        copy_config(slot, now);
        for (unsigned i = 0; i < VMM_PCI_CONFIG_SIZE; i++)
            CHECK(!((now[i] ^ power_on[function][i]) & read_only[function][i]));
        bars[function] = bar_of(function);
        bool decoding = config(&r, slot, VMM_PCI_COMMAND, 2) & VMM_PCI_COMMAND_MEMORY;
        uint64_t said = config(&r, slot, VMM_PCI_BAR0, 8) & ~0xfull;
        CHECK(bars[function] == VMM_PCI_NOWHERE || (decoding && bars[function] == said));
        bool held = config(&r, slot, VMM_PCI_COMMAND, 2) & VMM_PCI_COMMAND_INTX_DISABLE;
        bool messages = config(&r, slot, MSIX_CONTROL, 2) & MSIX_ENABLE;
        bool pin = atomic_load(&device_of(function)->isr) && !messages;
        CHECK_EQUAL(!!(config(&r, slot, VMM_PCI_STATUS, 2) & VMM_PCI_STATUS_INTERRUPT), pin);
        up |= pin && !held;
    }
    CHECK_EQUAL(r.level[FIRST_GSI + 1], up);
    CHECK_EQUAL(r.level[ISA_IRQ], up);
    CHECK(bars[0] != bars[1] || bars[0] == VMM_PCI_NOWHERE);
}

static void check_power_on(void)
{
    uint8_t now[VMM_PCI_CONFIG_SIZE];
    vmm_virtio_reset(&r.dev);
    vmm_virtio_reset(&r.other);
    vmm_pci_host_reset(r.host);
    for (unsigned function = 0; function < 2; function++) {
        CHECK_EQUAL(bar_of(function), VMM_PCI_NOWHERE);
        copy_config(slot_of(function), now);
        CHECK(!memcmp(now, power_on[function], sizeof(now)));
    }
    CHECK_EQUAL(r.level[FIRST_GSI + 1], 0);
}

static void take_picture(void)
{
    for (unsigned function = 0; function < 2; function++) {
        copy_config(slot_of(function), power_on[function]);
        for (unsigned i = 0; i < VMM_PCI_CONFIG_SIZE; i++) {
            set_config(&r, slot_of(function), i, 1, ~power_on[function][i]);
            read_only[function][i] = (uint8_t) ~(config(&r, slot_of(function), i, 1) ^ power_on[function][i]);
        }
        read_only[function][VMM_PCI_STATUS] &= (uint8_t)~VMM_PCI_STATUS_INTERRUPT;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!r.vm) {
        static const uint16_t sizes[] = {8, 8};
        set_up(&r, NULL);
        static const struct vmm_virtio_ops idle;
        r.dev.ops = &idle;
        CHECK_EQUAL(vmm_virtio_init(&r.other, r.vm, &idle, &r, 2, "virtio-test 1", 0, 2, sizes, 8), 0);
        CHECK_EQUAL(vmm_virtio_pci_create(&r.other, r.host, OTHER_SLOT, &r.second), OTHER_SLOT);
        take_picture();
    }
    check_power_on();
    for (struct step s; size >= sizeof(s); data += sizeof(s), size -= sizeof(s)) {
        memcpy(&s, data, sizeof(s));
        take(&s);
    }
    check_invariants();
    return 0;
}
