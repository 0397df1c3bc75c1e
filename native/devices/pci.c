/* SPDX-License-Identifier: Apache-2.0 */
#include "devices/pci.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define WIRES_MAX 8
#define TAG_FIRST 0x80000000u /* BARs' tags on the bus; a machine's own ranges count from 1 */

struct vmm_pci_host {
    struct vmm_vm *vm;
    struct vmm_msi *msi;
    struct vmm_pci_function *slots[VMM_PCI_SLOTS];
    vmm_pci_layout layout;
    uint64_t next; /* free address in the window */

    pthread_mutex_t lock; /* what functions share: where BARs decode, who asserts which wire */
    const vmm_line *wires[WIRES_MAX];
    uint32_t asserted[WIRES_MAX]; /* by wire: slots that assert it */
    const vmm_line *isa;          /* the wires' sum, for the 8259; NULL: not wired */
    bool isa_up;

    _Atomic uint32_t address; /* CONFIG_ADDRESS */

    struct vmm_pci_function bridge;
    pthread_mutex_t bridge_lock;
};

static bool touches(uint32_t offset, uint32_t size, uint32_t first, uint32_t n)
{
    return offset < first + n && first < offset + size;
}

/* ---- interrupt pins ---- */

/*
 * Unless the guest says otherwise the 8259 takes its inputs for edge-triggered: when one slot lets go, those that
 * still assert the line make a new edge.
 */
static void drive_isa(struct vmm_pci_host *host, bool released)
{
    uint32_t asserted = 0;
    for (uint32_t n = 0; n < host->layout.n_gsis; n++)
        asserted |= host->asserted[n];
    if (host->isa_up && (!asserted || released))
        vmm_line_set(host->isa, 0);
    if (asserted && (!host->isa_up || released))
        vmm_line_set(host->isa, 1);
    host->isa_up = asserted != 0;
}

/* With the host's lock held. */
static void drive_pin(struct vmm_pci_function *f)
{
    struct vmm_pci_host *host = f->host;
    uint32_t wire = f->slot % host->layout.n_gsis, slot = 1u << f->slot;
    uint32_t before = host->asserted[wire];
    uint32_t after = f->interrupt && !f->pin_held ? before | slot : before & ~slot;
    if (before == after)
        return;
    host->asserted[wire] = after;
    if (!before != !after)
        vmm_line_set(host->wires[wire], after != 0);
    drive_isa(host, !(after & slot));
}

void vmm_pci_interrupt(struct vmm_pci_function *f, bool on)
{
    pthread_mutex_lock(&f->host->lock);
    f->interrupt = on;
    drive_pin(f);
    pthread_mutex_unlock(&f->host->lock);
}

static void command_written(struct vmm_pci_function *f)
{
    pthread_mutex_lock(&f->host->lock);
    f->pin_held = vmm_pci_get(f->config + VMM_PCI_COMMAND, 2) & VMM_PCI_COMMAND_INTX_DISABLE;
    drive_pin(f);
    pthread_mutex_unlock(&f->host->lock);
}

/* It tells of the function, whatever the command register makes of it (PCI 3.0, 6.2.3). */
static void update_status(struct vmm_pci_function *f)
{
    pthread_mutex_lock(&f->host->lock);
    f->config[VMM_PCI_STATUS] &= (uint8_t)~VMM_PCI_STATUS_INTERRUPT;
    f->config[VMM_PCI_STATUS] |= f->interrupt ? VMM_PCI_STATUS_INTERRUPT : 0;
    pthread_mutex_unlock(&f->host->lock);
}

/* ---- where BARs decode ---- */

static uint64_t bar_value(const struct vmm_pci_function *f, unsigned bar)
{
    const uint8_t *at = f->config + VMM_PCI_BAR0 + 4 * bar;
    uint64_t value = vmm_pci_get(at, 4) | (uint64_t)vmm_pci_get(at + 4, 4) << 32;
    return value & ~(f->bars[bar].size - 1);
}

static uint64_t bar_wanted(const struct vmm_pci_function *f, unsigned bar)
{
    bool on = vmm_pci_get(f->config + VMM_PCI_COMMAND, 2) & VMM_PCI_COMMAND_MEMORY;
    return on && f->bars[bar].size ? bar_value(f, bar) : VMM_PCI_NOWHERE;
}

/*
 * Bring the bus to what configuration spaces say: first take away, then place, so that a BAR may go where another
 * was. One whose range is taken (RAM, another device) answers nowhere, and has its chance when something moves.
 */
static void settle(struct vmm_pci_host *host)
{
    for (int placing = 0; placing < 2; placing++)
        for (uint32_t slot = 0; slot < VMM_PCI_SLOTS; slot++)
            for (unsigned n = 0; host->slots[slot] && n < VMM_PCI_BARS; n++) {
                struct vmm_pci_bar *bar = &host->slots[slot]->bars[n];
                if (bar->at == bar->wanted)
                    continue;
                if (!placing && bar->at != VMM_PCI_NOWHERE &&
                    vmm_bus_detach(host->vm, VMM_MMIO, bar->at) == 0)
                    bar->at = VMM_PCI_NOWHERE;
                else if (placing && bar->at == VMM_PCI_NOWHERE &&
                         vmm_bus_attach(host->vm, VMM_MMIO, bar->wanted, bar->size, bar->ops, bar->opaque,
                                        TAG_FIRST + slot * VMM_PCI_BARS + n) == 0)
                    bar->at = bar->wanted;
            }
}

/* With the host's lock held: does configuration space say something new? */
static bool bars_want(struct vmm_pci_function *f)
{
    bool changed = false;
    for (unsigned n = 0; n < VMM_PCI_BARS; n++) {
        uint64_t wanted = bar_wanted(f, n);
        changed |= f->bars[n].wanted != wanted;
        f->bars[n].wanted = wanted;
    }
    return changed;
}

static void decode(struct vmm_pci_function *f)
{
    pthread_mutex_lock(&f->host->lock);
    const bool changed = bars_want(f);
    if (changed)
        settle(f->host);
    pthread_mutex_unlock(&f->host->lock);
    if (changed && f->ops && f->ops->decoded)
        f->ops->decoded(f->opaque);
}

uint64_t vmm_pci_bar_address(struct vmm_pci_function *f, unsigned bar)
{
    pthread_mutex_lock(&f->host->lock);
    uint64_t at = f->bars[bar].at;
    pthread_mutex_unlock(&f->host->lock);
    return at;
}

/* ---- configuration space ---- */

static uint32_t config_read(struct vmm_pci_function *f, uint32_t offset, uint32_t size)
{
    pthread_mutex_lock(f->lock);
    if (touches(offset, size, VMM_PCI_STATUS, 1))
        update_status(f);
    if (f->ops && f->ops->config_read)
        f->ops->config_read(f->opaque, offset, size);
    uint32_t value = vmm_pci_get(f->config + offset, size);
    pthread_mutex_unlock(f->lock);
    return value;
}

static void config_write(struct vmm_pci_function *f, uint32_t offset, uint32_t size, uint32_t value)
{
    pthread_mutex_lock(f->lock);
    for (uint32_t i = 0; i < size; i++) {
        uint8_t mask = f->writable[offset + i];
        f->config[offset + i] = (f->config[offset + i] & ~mask) | ((value >> (8 * i)) & mask);
    }
    if (touches(offset, size, VMM_PCI_COMMAND, 2))
        command_written(f);
    if (touches(offset, size, VMM_PCI_COMMAND, 2) || touches(offset, size, VMM_PCI_BAR0, 4 * VMM_PCI_BARS))
        decode(f);
    if (f->ops && f->ops->config_written)
        f->ops->config_written(f->opaque, offset, size);
    pthread_mutex_unlock(f->lock);
}

/* The function at a bus-device-function number whose space has these bytes, or NULL: the only way from the guest's. */
static struct vmm_pci_function *find(struct vmm_pci_host *host, uint64_t bdf, uint64_t offset, uint32_t size)
{
    bool there = bdf < VMM_PCI_SLOTS * 8 && bdf % 8 == 0 && size <= 4 && offset < VMM_PCI_CONFIG_SIZE &&
                 size <= VMM_PCI_CONFIG_SIZE - offset;
    return there ? host->slots[bdf / 8] : NULL;
}

static uint64_t ecam_read(void *opaque, uint64_t offset, uint32_t size)
{
    if (size == 8)
        return ecam_read(opaque, offset, 4) | ecam_read(opaque, offset + 4, 4) << 32;
    struct vmm_pci_function *f = find(opaque, offset >> 12, offset & 0xfff, size);
    return f ? config_read(f, (uint32_t)(offset & 0xfff), size) : (1ull << (8 * size)) - 1;
}

static void ecam_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    if (size == 8) {
        ecam_write(opaque, offset, 4, (uint32_t)value);
        ecam_write(opaque, offset + 4, 4, value >> 32);
        return;
    }
    struct vmm_pci_function *f = find(opaque, offset >> 12, offset & 0xfff, size);
    if (f)
        config_write(f, (uint32_t)(offset & 0xfff), size, (uint32_t)value);
}

#define CONFIG_ENABLE (1u << 31)
#define CONFIG_DATA 4
enum { RESET_CONTROL = 1, RST_CPU = 4 }; /* port 0xcf9: of the chip set, not of PCI (Intel ICH9, 13.7.5) */

/* What the bytes of CONFIG_DATA from `offset` on are, as the ECAM has them; UINT64_MAX: nothing (mechanism #1 off). */
static uint64_t selected(struct vmm_pci_host *host, uint64_t offset, uint32_t size)
{
    uint32_t address = atomic_load_explicit(&host->address, memory_order_relaxed);
    if (offset < CONFIG_DATA || offset + size > CONFIG_DATA + 4 || !(address & CONFIG_ENABLE))
        return UINT64_MAX;
    return (uint64_t)(address >> 8 & 0xffff) << 12 | (address & 0xfc) | (offset & 3);
}

static uint64_t ports_read(void *opaque, uint64_t offset, uint32_t size)
{
    struct vmm_pci_host *host = opaque;
    if (offset == 0 && size == 4)
        return atomic_load_explicit(&host->address, memory_order_relaxed);
    if (offset == RESET_CONTROL && size == 1)
        return 0;
    uint64_t at = selected(host, offset, size);
    return at == UINT64_MAX ? at : ecam_read(host, at, size);
}

static void ports_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value)
{
    struct vmm_pci_host *host = opaque;
    /* Only a whole double word reaches CONFIG_ADDRESS (PCI 3.0, 3.2.2.3.2). */
    if (offset == 0 && size == 4)
        atomic_store_explicit(&host->address, (uint32_t)value & (CONFIG_ENABLE | 0xfffffc),
                              memory_order_relaxed);
    if (offset == RESET_CONTROL && size == 1 && value & RST_CPU)
        vmm_vm_stop(host->vm, VMM_STOP_RESET, 0);
    uint64_t at = selected(host, offset, size);
    if (at != UINT64_MAX)
        ecam_write(host, at, size, value);
}

const vmm_device_ops *vmm_pci_ports_ops(void)
{
    static const vmm_device_ops ops = {ports_read, ports_write};
    return &ops;
}

const vmm_device_ops *vmm_pci_ecam_ops(void)
{
    static const vmm_device_ops ops = {ecam_read, ecam_write};
    return &ops;
}

/* ---- making a function ---- */

void vmm_pci_function_init(struct vmm_pci_function *f, const struct vmm_pci_identity *identity, bool pin,
                           pthread_mutex_t *lock, const struct vmm_pci_function_ops *ops, void *opaque)
{
    *f = (struct vmm_pci_function){
        .lock = lock, .ops = ops, .opaque = opaque, .capabilities_end = VMM_PCI_HEADER_END};
    vmm_pci_put(f->config + VMM_PCI_VENDOR, identity->vendor, 2);
    vmm_pci_put(f->config + VMM_PCI_DEVICE, identity->device, 2);
    vmm_pci_put(f->config + VMM_PCI_REVISION, identity->revision, 1);
    vmm_pci_put(f->config + VMM_PCI_CLASS, identity->class_code, 3);
    vmm_pci_put(f->config + VMM_PCI_SUBSYSTEM_VENDOR, identity->subsystem_vendor, 2);
    vmm_pci_put(f->config + VMM_PCI_SUBSYSTEM, identity->subsystem, 2);
    vmm_pci_put(f->writable + VMM_PCI_COMMAND,
                VMM_PCI_COMMAND_MEMORY | VMM_PCI_COMMAND_MASTER | (pin ? VMM_PCI_COMMAND_INTX_DISABLE : 0),
                2);
    f->config[VMM_PCI_INTERRUPT_PIN] = pin;
    f->writable[VMM_PCI_INTERRUPT_LINE] = pin ? 0xff : 0;
    for (unsigned n = 0; n < VMM_PCI_BARS; n++)
        f->bars[n].wanted = f->bars[n].at = VMM_PCI_NOWHERE;
}

void vmm_pci_add_bar(struct vmm_pci_function *f, unsigned bar, uint64_t size, const vmm_device_ops *ops,
                     void *opaque)
{
    f->bars[bar].size = size;
    f->bars[bar].ops = ops;
    f->bars[bar].opaque = opaque;
    uint8_t *writable = f->writable + VMM_PCI_BAR0 + 4 * bar;
    vmm_pci_put(writable, (uint32_t) ~(size - 1),
                4); /* the flags below are read-only with the rest of the low bits */
    vmm_pci_put(writable + 4, (uint32_t)(~(size - 1) >> 32), 4);
    f->config[VMM_PCI_BAR0 + 4 * bar] = 0x4; /* memory, 64-bit, not prefetchable (PCI 3.0, 6.2.5.1) */
}

uint32_t vmm_pci_add_capability(struct vmm_pci_function *f, uint8_t id, uint32_t size)
{
    uint32_t at = f->capabilities_end;
    f->capabilities_end += (size + 3) & ~3u;
    f->config[f->last_capability ? f->last_capability + 1 : VMM_PCI_CAPABILITIES] = (uint8_t)at;
    f->config[VMM_PCI_STATUS] |= VMM_PCI_STATUS_CAPABILITIES;
    f->config[at] = id;
    f->last_capability = at;
    return at;
}

static int choose_slot(const struct vmm_pci_host *host, int slot)
{
    if (slot >= VMM_PCI_SLOTS)
        return vmm_error_set(-EINVAL, "PCI slot %d: there are 0 to %d", slot, VMM_PCI_SLOTS - 1);
    if (slot >= 0)
        return host->slots[slot] ? vmm_error_set(-EBUSY, "PCI slot %d is taken", slot) : slot;
    for (slot = 0; slot < VMM_PCI_SLOTS; slot++)
        if (!host->slots[slot])
            return slot;
    return vmm_error_set(-ENOSPC, "all %d PCI slots are taken", VMM_PCI_SLOTS);
}

static int place_bars(struct vmm_pci_host *host, struct vmm_pci_function *f)
{
    uint64_t next = host->next, end = host->layout.window + host->layout.window_size;
    for (unsigned n = 0; n < VMM_PCI_BARS; n++) {
        uint64_t size = f->bars[n].size;
        if (!size)
            continue;
        uint64_t at = (next + size - 1) & ~(size - 1);
        if (at < next || at > end || size > end - at)
            return vmm_error_set(-ENOSPC, "no %#llx bytes are left in the PCI window",
                                 (unsigned long long)size);
        uint8_t *bar = f->config + VMM_PCI_BAR0 + 4 * n;
        vmm_pci_put(bar, (uint32_t)at | bar[0], 4);
        vmm_pci_put(bar + 4, (uint32_t)(at >> 32), 4);
        next = at + size;
    }
    host->next = next;
    return 0;
}

static uint32_t interrupt_line(const struct vmm_pci_host *host, uint32_t slot)
{
    return host->isa ? host->layout.isa_irq : host->layout.first_gsi + slot % host->layout.n_gsis;
}

int vmm_pci_insert(struct vmm_pci_host *host, struct vmm_pci_function *f, int slot)
{
    slot = choose_slot(host, slot);
    if (slot < 0)
        return slot;
    int rc = place_bars(host, f);
    if (rc < 0)
        return rc;
    f->host = host;
    f->slot = (uint32_t)slot;
    if (f->config[VMM_PCI_INTERRUPT_PIN])
        f->config[VMM_PCI_INTERRUPT_LINE] = (uint8_t)interrupt_line(host, f->slot);
    memcpy(f->power_on, f->config, sizeof(f->config));
    host->slots[slot] = f;
    return slot;
}

void vmm_pci_remove(struct vmm_pci_function *f)
{
    if (f->host)
        f->host->slots[f->slot] = NULL;
    f->host = NULL;
}

/* ---- the host ---- */

struct vmm_vm *vmm_pci_vm(struct vmm_pci_host *host)
{
    return host->vm;
}

struct vmm_msi *vmm_pci_msi(struct vmm_pci_host *host)
{
    return host->msi;
}

static int connect_wires(struct vmm_pci_host *host)
{
    if (!host->layout.n_gsis || host->layout.n_gsis > WIRES_MAX)
        return vmm_error_set(-EINVAL, "%u interrupt wires of the PCI host: 1 to %d", host->layout.n_gsis,
                             WIRES_MAX);
    for (uint32_t n = 0; n < host->layout.n_gsis; n++) {
        host->wires[n] = vmm_vm_line(host->vm, host->layout.first_gsi + n);
        if (!host->wires[n])
            return vmm_error_set(-EINVAL, "interrupt line %u", host->layout.first_gsi + n);
    }
    host->isa = host->layout.isa_irq ? vmm_vm_line(host->vm, host->layout.isa_irq) : NULL;
    return 0;
}

int vmm_pci_host_create(vmm_vm *vm, const vmm_pci_layout *layout, vmm_pci_host **out)
{
    /* The identity of QEMU's generic PCI Express host bridge: no driver expects registers of it. */
    static const struct vmm_pci_identity bridge = {
        .vendor = 0x1b36, .device = 0x0008, .class_code = 0x060000};
    *out = NULL;
    struct vmm_pci_host *host = calloc(1, sizeof(*host));
    if (!host)
        return vmm_error_set(-ENOMEM, "PCI host");
    host->vm = vm;
    host->layout = *layout;
    host->next = layout->window;
    pthread_mutex_init(&host->lock, NULL);
    pthread_mutex_init(&host->bridge_lock, NULL);
    vmm_pci_function_init(&host->bridge, &bridge, false, &host->bridge_lock, NULL, NULL);
    int rc = connect_wires(host);
    if (rc == 0)
        rc = vmm_msi_create(vm, &host->msi);
    if (rc == 0)
        rc = vmm_pci_insert(host, &host->bridge, 0);
    if (rc < 0) {
        vmm_pci_host_destroy(host);
        return rc;
    }
    *out = host;
    return 0;
}

void vmm_pci_host_destroy(vmm_pci_host *host)
{
    if (!host)
        return;
    vmm_msi_destroy(host->msi);
    pthread_mutex_destroy(&host->bridge_lock);
    pthread_mutex_destroy(&host->lock);
    free(host);
}

static void reset_function(struct vmm_pci_function *f)
{
    pthread_mutex_lock(f->lock);
    memcpy(f->config, f->power_on, sizeof(f->config));
    command_written(f);
    decode(f);
    if (f->ops && f->ops->reset)
        f->ops->reset(f->opaque);
    pthread_mutex_unlock(f->lock);
}

void vmm_pci_host_reset(vmm_pci_host *host)
{
    atomic_store_explicit(&host->address, 0, memory_order_relaxed);
    for (uint32_t slot = 0; slot < VMM_PCI_SLOTS; slot++)
        if (host->slots[slot])
            reset_function(host->slots[slot]);
}

/* ---- state ---- */

void vmm_pci_host_save(vmm_pci_host *host, vmm_pci_host_state *s)
{
    memset(s, 0, sizeof(*s));
    s->address = atomic_load_explicit(&host->address, memory_order_relaxed);
    for (uint32_t slot = 0; slot < VMM_PCI_SLOTS; slot++) {
        struct vmm_pci_function *f = host->slots[slot];
        if (!f)
            continue;
        pthread_mutex_lock(f->lock);
        s->present |= 1u << slot;
        memcpy(s->config[slot], f->config, sizeof(f->config));
        s->config[slot][VMM_PCI_STATUS] &= (uint8_t)~VMM_PCI_STATUS_INTERRUPT; /* made when it is read */
        pthread_mutex_unlock(f->lock);
    }
}

/* Only what a driver can write may differ from power-on. */
static int check_config(const struct vmm_pci_function *f, const uint8_t *config)
{
    for (uint32_t i = 0; i < VMM_PCI_CONFIG_SIZE; i++)
        if ((config[i] ^ f->power_on[i]) & ~f->writable[i])
            return vmm_error_set(-EINVAL, "PCI slot %u: register %#x is %#x, and cannot be written", f->slot,
                                 i, config[i]);
    return 0;
}

static int check_host(const vmm_pci_host *host, const vmm_pci_host_state *s)
{
    if (s->address & ~(CONFIG_ENABLE | 0xfffffc))
        return vmm_error_set(-EINVAL, "PCI: CONFIG_ADDRESS %#x", s->address);
    for (uint32_t slot = 0; slot < VMM_PCI_SLOTS; slot++) {
        const struct vmm_pci_function *f = host->slots[slot];
        if (!f != !(s->present >> slot & 1))
            return vmm_error_set(-EINVAL, "PCI slot %u is %s, and in the state it is not", slot,
                                 f ? "taken" : "empty");
        int rc = f ? check_config(f, s->config[slot]) : 0;
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* All of them before BARs are settled: one may go where another was. */
static void load_config(vmm_pci_host *host, const vmm_pci_host_state *s)
{
    for (uint32_t slot = 0; slot < VMM_PCI_SLOTS; slot++) {
        struct vmm_pci_function *f = host->slots[slot];
        if (!f)
            continue;
        pthread_mutex_lock(f->lock);
        memcpy(f->config, s->config[slot], sizeof(f->config));
        command_written(f);
        pthread_mutex_unlock(f->lock);
    }
}

int vmm_pci_host_load(vmm_pci_host *host, const vmm_pci_host_state *s)
{
    int rc = check_host(host, s);
    if (rc < 0)
        return rc;
    atomic_store_explicit(&host->address, s->address, memory_order_relaxed);
    load_config(host, s);
    bool changed = false;
    pthread_mutex_lock(&host->lock);
    for (uint32_t slot = 0; slot < VMM_PCI_SLOTS; slot++)
        changed |= host->slots[slot] && bars_want(host->slots[slot]);
    if (changed)
        settle(host);
    pthread_mutex_unlock(&host->lock);
    for (uint32_t slot = 0; changed && slot < VMM_PCI_SLOTS; slot++) {
        struct vmm_pci_function *f = host->slots[slot];
        if (!f || !f->ops || !f->ops->decoded)
            continue;
        pthread_mutex_lock(f->lock);
        f->ops->decoded(f->opaque);
        pthread_mutex_unlock(f->lock);
    }
    return 0;
}

int vmm_pci_get_bar(vmm_pci_host *host, uint32_t slot, uint32_t bar, vmm_pci_bar_info *info)
{
    if (slot >= VMM_PCI_SLOTS || bar >= VMM_PCI_BARS)
        return vmm_error_set(-EINVAL, "PCI slot %u, BAR %u", slot, bar);
    struct vmm_pci_function *f = host->slots[slot];
    if (!f)
        return vmm_error_set(-ENODEV, "PCI slot %u is empty", slot);
    if (!f->bars[bar].size)
        return vmm_error_set(-EINVAL, "PCI slot %u has no BAR %u", slot, bar);
    info->size = f->bars[bar].size;
    info->address = vmm_pci_bar_address(f, bar);
    info->tag = TAG_FIRST + slot * VMM_PCI_BARS + bar;
    return 0;
}
