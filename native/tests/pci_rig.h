/* SPDX-License-Identifier: Apache-2.0 */
/* A PCI host with a virtio device in slot 1, and a guest's ways to reach them. For tests and fuzzers. */
#ifndef VMM_TESTS_PCI_RIG_H
#define VMM_TESTS_PCI_RIG_H

#include "devices/msix.h"
#include "machine.h"
#include "virtio/virtio.h"

#include <sys/eventfd.h>

#define ECAM 0xe0000000ull
#define PORTS 0xcf8
#define WINDOW 0xc1000000ull
#define WINDOW_SIZE 0x100000ull
#define FIRST_GSI 16
#define WIRES 8
#define ISA_IRQ 11
#define BAR_SIZE 0x8000

enum { COMMON = 0, ISR = 0x1000, DEVICE = 0x2000, NOTIFY = 0x3000, TABLE = 0x4000, PENDING = 0x5000 };
enum {
    STATUS = 20,
    QUEUE_SELECT = 22,
    QUEUE_SIZE = 24,
    QUEUE_VECTOR = 26,
    QUEUE_ENABLE = 28,
    QUEUE_RESET = 58
};
enum { MSIX_CONTROL = 0x42, MSIX_ENABLE = 0x8000, MSIX_MASK = 0x4000 }; /* the first capability is MSI-X */

typedef struct rig {
    vmm_vm *vm;
    vmm_pci_host *host;
    struct vmm_virtio dev, other;
    vmm_virtio_pci *transport, *second;
    struct vmm_pci_function *spare;
    int level[FIRST_GSI + WIRES];
    unsigned edges; /* of the ISA line */
    int kicked;     /* eventfd: queues kicked */
    unsigned starts, stops;
} rig;

static inline void set_level(void *opaque, uint32_t gsi, int level)
{
    rig *r = opaque;
    CHECK(r->level[gsi] != level); /* a wire is driven on changes only */
    r->level[gsi] = level;
    r->edges += gsi == ISA_IRQ && level;
}

static inline void started(void *opaque)
{
    ((rig *)opaque)->starts++;
}

static inline void stopped(void *opaque)
{
    ((rig *)opaque)->stops++;
}

static inline void kick(void *opaque, uint32_t queue)
{
    CHECK_EQUAL(eventfd_write(((rig *)opaque)->kicked, queue + 1), 0);
}

static const struct vmm_virtio_ops ops = {.start = started, .stop = stopped, .kick = kick};

/* vm NULL: one without KVM, whose lines are the rig's. */
static inline void create_host(rig *r, vmm_vm *vm)
{
    *r = (rig){.vm = vm ? vm : machine_create(), .kicked = eventfd(0, 0)};
    if (!vm) {
        r->vm->lines = calloc(VMM_MAX_LINES, sizeof(*r->vm->lines));
        for (uint32_t gsi = FIRST_GSI; gsi < FIRST_GSI + WIRES; gsi++)
            r->vm->lines[gsi] = (vmm_line){.set = set_level, .opaque = r, .n = gsi};
        r->vm->lines[ISA_IRQ] = (vmm_line){.set = set_level, .opaque = r, .n = ISA_IRQ};
    }
    const vmm_pci_layout layout = {WINDOW, WINDOW_SIZE, FIRST_GSI, WIRES, ISA_IRQ};
    CHECK_EQUAL(vmm_pci_host_create(r->vm, &layout, &r->host), 0);
    CHECK_EQUAL(vmm_bus_attach(r->vm, VMM_PIO, PORTS, 8, vmm_pci_ports_ops(), r->host, 1), 0);
    CHECK_EQUAL(vmm_bus_attach(r->vm, VMM_MMIO, ECAM, 1 << 20, vmm_pci_ecam_ops(), r->host, 2), 0);
}

/* A host and a device of two queues with 8 bytes of configuration, in slot 1. */
static inline void set_up(rig *r, vmm_vm *vm)
{
    static const uint16_t sizes[] = {64, 128};
    create_host(r, vm);
    CHECK_EQUAL(vmm_virtio_init(&r->dev, r->vm, &ops, r, 4, "virtio-test 0", 1 << 3, 2, sizes, 8), 0);
    CHECK_EQUAL(vmm_virtio_pci_create(&r->dev, r->host, -1, &r->transport), 1);
}

static inline void tear_down(rig *r)
{
    if (r->transport)
        vmm_virtio_reset(&r->dev);
    vmm_vm_destroy(r->vm);
    vmm_virtio_pci_destroy(r->transport);
    vmm_virtio_pci_destroy(r->second);
    vmm_virtio_deinit(&r->dev);
    vmm_virtio_deinit(&r->other);
    vmm_pci_host_destroy(r->host);
    close(r->kicked);
}

static inline uint64_t config(rig *r, unsigned slot, unsigned offset, unsigned size)
{
    return vmm_bus_read(r->vm, VMM_MMIO, ECAM + (slot << 15) + offset, size);
}

static inline void set_config(rig *r, unsigned slot, unsigned offset, unsigned size, uint64_t value)
{
    vmm_bus_write(r->vm, VMM_MMIO, ECAM + (slot << 15) + offset, size, value);
}

static inline uint64_t in(rig *r, unsigned offset, unsigned size)
{
    return vmm_bus_read(r->vm, VMM_MMIO, WINDOW + offset, size);
}

static inline void out(rig *r, unsigned offset, unsigned size, uint64_t value)
{
    vmm_bus_write(r->vm, VMM_MMIO, WINDOW + offset, size, value);
}

/* Through reset, features and queue 0 to DRIVER_OK, as 3.1.1 has it. */
static inline void drive(rig *r)
{
    set_config(r, 1, VMM_PCI_COMMAND, 2, VMM_PCI_COMMAND_MEMORY | VMM_PCI_COMMAND_MASTER);
    out(r, STATUS, 1, 0);
    out(r, STATUS, 1, 3);
    out(r, 8, 4, 0);
    out(r, 12, 4, 0);
    out(r, 8, 4, 1);
    out(r, 12, 4, 1 | 1 << 8); /* VERSION_1, RING_RESET */
    out(r, STATUS, 1, 11);
    CHECK_EQUAL(in(r, STATUS, 1), 11);
    out(r, QUEUE_SELECT, 2, 0);
    out(r, 32, 8, 0x1000);
    out(r, 40, 4, 0x2000);
    out(r, 44, 4, 0);
    out(r, 48, 4, 0x3000);
    out(r, 52, 4, 0);
    out(r, QUEUE_ENABLE, 2, 1);
    CHECK_EQUAL(in(r, QUEUE_ENABLE, 2), 1);
    out(r, STATUS, 1, 15);
    CHECK_EQUAL(in(r, STATUS, 1), 15);
    CHECK_EQUAL(r->starts, 1);
    uint64_t at_start; /* what was offered before DRIVER_OK is looked at once */
    CHECK_EQUAL(eventfd_read(r->kicked, &at_start), 0);
}

/* What a device does when it has used buffers, or its configuration changed. */
static inline void use_buffer(rig *r, unsigned queue)
{
    VMM_VIRTIO_LOCKED(&r->dev);
    r->dev.transport->queue_interrupt(r->dev.transport_opaque, queue);
}

static inline void change_configuration(rig *r)
{
    VMM_VIRTIO_LOCKED(&r->dev);
    r->dev.transport->config_interrupt(r->dev.transport_opaque);
}

#endif
