/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bus: address -> device, for ports and for memory-mapped registers.
 *
 * Readers (vCPUs) take no lock. A writer publishes a new table and keeps the old one until every vCPU has
 * been seen outside it: a vCPU announces the epoch it reads under before it loads the table, so a writer that
 * finds the announcement empty knows that the next load will find the new table.
 */
#include "core.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

static uint64_t ones(uint32_t size)
{
    return size >= 8 ? UINT64_MAX : (1ull << (8 * size)) - 1;
}

void vmm_bus_init(struct vmm_bus *bus)
{
    pthread_mutex_init(&bus->lock, NULL);
    atomic_store(&bus->epoch, 1);
}

void vmm_bus_deinit(struct vmm_bus *bus)
{
    for (struct vmm_bus_table *t = bus->retired, *next; t; t = next) {
        next = t->next_retired;
        free(t);
    }
    for (int space = 0; space < 2; space++) {
        free(atomic_load(&bus->table[space]));
        free(atomic_load(&bus->hooks[space]));
    }
    pthread_mutex_destroy(&bus->lock);
}

/* ---- lookup ---- */

static const struct vmm_range *find(const struct vmm_bus_table *table, uint64_t address, uint32_t *hint)
{
    if (!table)
        return NULL;
    if (likely(*hint < table->n)) {
        const struct vmm_range *r = &table->ranges[*hint];
        if (likely(address >= r->base && address <= r->last))
            return r;
    }
    for (uint32_t low = 0, high = table->n; low < high;) {
        uint32_t middle = low + (high - low) / 2;
        const struct vmm_range *r = &table->ranges[middle];
        if (address < r->base) {
            high = middle;
        } else if (address > r->last) {
            low = middle + 1;
        } else {
            *hint = middle;
            return r;
        }
    }
    return NULL;
}

static inline void call(const struct vmm_range *r, uint64_t address, uint32_t size, uint64_t *value,
                        bool write)
{
    if (write)
        r->ops->write(r->opaque, address - r->base, size, *value & ones(size));
    else
        *value = r->ops->read(r->opaque, address - r->base, size) & ones(size);
}

static inline bool fits(const struct vmm_range *r, uint64_t address, uint32_t size)
{
    return size - 1 <= r->last - address && (size & (size - 1)) == 0;
}

/* Byte by byte, each to the device that claims it, in address order. */
static bool access_bytes(const struct vmm_bus_table *table, uint32_t *hint, uint64_t address, uint32_t size,
                         uint64_t *value, bool write, uint32_t *tag)
{
    bool claimed = true;
    uint64_t result = 0;
    for (uint32_t i = 0; i < size; i++) {
        uint64_t byte = write ? (*value >> (8 * i)) & 0xff : 0xff;
        const struct vmm_range *r = address + i < address ? NULL : find(table, address + i, hint);
        if (r) {
            call(r, address + i, 1, &byte, write);
            *tag = r->tag;
        } else {
            claimed = false;
        }
        result |= byte << (8 * i);
    }
    if (!write)
        *value = result;
    return claimed;
}

static void tell_hooks(struct vmm_vcpu *vcpu, const struct vmm_bus_table *hooks, int space, uint64_t address,
                       uint32_t size, uint64_t *value, bool write)
{
    vmm_access access = {.address = address,
                         .value = *value & ones(size),
                         .vcpu = vcpu->id,
                         .size = (uint8_t)size,
                         .write = write,
                         .space = (uint8_t)space};
    for (uint32_t i = 0; i < hooks->n; i++) {
        const struct vmm_range *hook = &hooks->ranges[i];
        /* Differences: neither an access nor a range that ends at the top of the space wraps. */
        bool touches = address <= hook->last && (address >= hook->base || hook->base - address < size);
        if (!touches)
            continue;
        access.tag = hook->tag;
        vcpu->vm->hook_access(vcpu->vm->hook_opaque, &access);
        access.value &= ones(size);
    }
    *value = access.value;
}

bool vmm_bus_access(struct vmm_vcpu *vcpu, int space, uint64_t address, uint32_t size, uint64_t *value,
                    bool write, uint32_t *tag)
{
    struct vmm_bus *bus = &vcpu->vm->bus;
    /* seq_cst: pairs with the writer, which publishes the table and then scans (publish, passed). Nested use (a device op that reaches
     * the bus again) keeps the outer, older announcement. */
    uint64_t outer = atomic_load_explicit(&vcpu->epoch, memory_order_relaxed);
    if (!outer)
        atomic_store(&vcpu->epoch, atomic_load_explicit(&bus->epoch, memory_order_relaxed));
    const struct vmm_bus_table *table = atomic_load(&bus->table[space]);
    const struct vmm_range *r = find(table, address, &vcpu->last_range[space]);
    const struct vmm_bus_table *hooks = atomic_load(&bus->hooks[space]);
    bool claimed = true;
    if (unlikely(hooks) && write)
        tell_hooks(vcpu, hooks, space, address, size, value, true);
    if (likely(r && fits(r, address, size))) {
        *tag = r->tag;
        call(r, address, size, value, write);
    } else {
        claimed = access_bytes(table, &vcpu->last_range[space], address, size, value, write, tag);
        if (!claimed)
            atomic_fetch_add_explicit(&vcpu->unclaimed, 1, memory_order_relaxed);
    }
    if (unlikely(hooks) && !write)
        tell_hooks(vcpu, hooks, space, address, size, value, false);
    if (!outer)
        atomic_store_explicit(&vcpu->epoch, 0, memory_order_release);
    return claimed;
}

/* ---- change ---- */

/* Has every vCPU but the caller's been outside the bus, or inside only under `epoch` or later? */
static bool passed(struct vmm_vm *vm, uint64_t epoch)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        uint64_t seen = atomic_load(&vm->vcpus[i]->epoch);
        if (vm->vcpus[i] != vmm_current_vcpu && seen && seen < epoch)
            return false;
    }
    return true;
}

/* The table the calling vCPU is reading may be retired too: it stays until a later change finds it passed. */
static bool held_by_caller(uint64_t epoch)
{
    uint64_t seen = vmm_current_vcpu ? atomic_load(&vmm_current_vcpu->epoch) : 0;
    return seen && seen < epoch;
}

/* Publish `table` (may be NULL) at `slot`; returns the epoch from which no reader can hold the one it replaces. */
static uint64_t publish(struct vmm_vm *vm, _Atomic(struct vmm_bus_table *) *slot, struct vmm_bus_table *table)
{
    struct vmm_bus *bus = &vm->bus;
    struct vmm_bus_table *old = atomic_exchange(slot, table);
    uint64_t epoch = atomic_fetch_add(&bus->epoch, 1) + 1;
    if (old) {
        old->retired_at = epoch;
        old->next_retired = bus->retired;
        bus->retired = old;
    }
    for (struct vmm_bus_table **at = &bus->retired; *at;) {
        struct vmm_bus_table *t = *at;
        if (passed(vm, t->retired_at) && !held_by_caller(t->retired_at)) {
            *at = t->next_retired;
            free(t);
        } else {
            at = &t->next_retired;
        }
    }
    return epoch;
}

static struct vmm_bus_table *table_create(uint32_t n)
{
    struct vmm_bus_table *t = calloc(1, sizeof(*t) + n * sizeof(t->ranges[0]));
    if (t)
        t->n = n;
    return t;
}

static bool overlaps_memory(const struct vmm_vm *vm, uint64_t base, uint64_t last)
{
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        const struct vmm_region *m = &vm->regions[i];
        if (base <= m->gpa + (m->size - 1) && last >= m->gpa)
            return true;
    }
    return false;
}

static int check_range(const struct vmm_vm *vm, int space, uint64_t base, uint64_t size)
{
    uint64_t last = base + (size - 1);
    if ((space != VMM_PIO && space != VMM_MMIO) || !size || last < base ||
        (space == VMM_PIO && last > 0xffff))
        return vmm_error_set(-EINVAL,
                             "the range of %#llx+%#llx is empty, wraps, or leaves its space: give another",
                             (unsigned long long)base, (unsigned long long)size);
    if (space == VMM_MMIO && overlaps_memory(vm, base, last))
        return vmm_error_set(-EEXIST, "range %#llx-%#llx overlaps guest RAM", (unsigned long long)base,
                             (unsigned long long)last);
    return 0;
}

static int attach_locked(struct vmm_vm *vm, int space, const struct vmm_range *range)
{
    const struct vmm_bus_table *old = atomic_load(&vm->bus.table[space]);
    uint32_t n = old ? old->n : 0, at = 0;
    if (n >= VMM_MAX_RANGES)
        return vmm_error_set(-ENOSPC, "more than %d ranges on the bus", VMM_MAX_RANGES);
    while (at < n && old->ranges[at].last < range->base)
        at++;
    if (at < n && old->ranges[at].base <= range->last)
        return vmm_error_set(-EEXIST, "range %#llx-%#llx overlaps %#llx-%#llx",
                             (unsigned long long)range->base, (unsigned long long)range->last,
                             (unsigned long long)old->ranges[at].base,
                             (unsigned long long)old->ranges[at].last);
    struct vmm_bus_table *table = table_create(n + 1);
    if (!table)
        return vmm_error_set(-ENOMEM, "no memory for a table of the bus");
    if (n) {
        memcpy(table->ranges, old->ranges, at * sizeof(*range));
        memcpy(table->ranges + at + 1, old->ranges + at, (n - at) * sizeof(*range));
    }
    table->ranges[at] = *range;
    publish(vm, &vm->bus.table[space], table);
    return 0;
}

int vmm_bus_attach(vmm_vm *vm, int space, uint64_t base, uint64_t size, const vmm_device_ops *ops,
                   void *opaque, uint32_t tag)
{
    int rc =
        ops ? check_range(vm, space, base, size) : vmm_error_set(-EINVAL, "a range needs a device's ops");
    if (rc < 0)
        return rc;
    struct vmm_range range = {base, base + (size - 1), ops, opaque, tag};
    pthread_mutex_lock(&vm->bus.lock);
    rc = attach_locked(vm, space, &range);
    pthread_mutex_unlock(&vm->bus.lock);
    return rc;
}

static int detach_locked(struct vmm_vm *vm, int space, uint64_t base, uint64_t *epoch)
{
    const struct vmm_bus_table *old = atomic_load(&vm->bus.table[space]);
    uint32_t n = old ? old->n : 0, at = 0;
    while (at < n && old->ranges[at].base != base)
        at++;
    if (at == n)
        return vmm_error_set(-ENOENT, "no range starts at %#llx", (unsigned long long)base);
    struct vmm_bus_table *table = table_create(n - 1);
    if (!table)
        return vmm_error_set(-ENOMEM, "no memory for a table of the bus");
    memcpy(table->ranges, old->ranges, at * sizeof(table->ranges[0]));
    memcpy(table->ranges + at, old->ranges + at + 1, (n - at - 1) * sizeof(table->ranges[0]));
    *epoch = publish(vm, &vm->bus.table[space], table);
    return 0;
}

static void wait_until_passed(struct vmm_vm *vm, uint64_t epoch)
{
    /* Two vCPUs detaching at once would wait for each other: a vCPU thread does not wait. */
    while (!vmm_current_vcpu && !passed(vm, epoch))
        sched_yield();
}

int vmm_bus_detach(vmm_vm *vm, int space, uint64_t base)
{
    if (space != VMM_PIO && space != VMM_MMIO)
        return vmm_error_set(-EINVAL, "space %d is neither VMM_PIO nor VMM_MMIO", space);
    uint64_t epoch = 0;
    pthread_mutex_lock(&vm->bus.lock);
    int rc = detach_locked(vm, space, base, &epoch);
    pthread_mutex_unlock(&vm->bus.lock);
    if (rc == 0)
        wait_until_passed(vm, epoch);
    return rc;
}

/* ---- hooks ---- */

void vmm_vm_on_hook(vmm_vm *vm, void (*access)(void *opaque, vmm_access *access),
                    void (*exit)(void *opaque, uint32_t vcpu, const vmm_exit_record *record), void *opaque)
{
    vm->hook_access = access;
    vm->hook_exit = exit;
    vm->hook_opaque = opaque; /* ordered before any table or reason bit by their seq_cst stores */
}

void vmm_hook_exits(vmm_vm *vm, uint64_t reasons)
{
    atomic_store(&vm->hooked_exits, reasons);
}

static int hook_attach_locked(struct vmm_vm *vm, int space, const struct vmm_range *range)
{
    const struct vmm_bus_table *old = atomic_load(&vm->bus.hooks[space]);
    uint32_t n = old ? old->n : 0;
    if (n >= VMM_MAX_HOOKS)
        return vmm_error_set(-ENOSPC, "more than %d hooks", VMM_MAX_HOOKS);
    struct vmm_bus_table *table = table_create(n + 1);
    if (!table)
        return vmm_error_set(-ENOMEM, "no memory for a table of hooks");
    if (n)
        memcpy(table->ranges, old->ranges, n * sizeof(*range));
    table->ranges[n] = *range;
    publish(vm, &vm->bus.hooks[space], table);
    return 0;
}

int vmm_hook_attach(vmm_vm *vm, int space, uint64_t base, uint64_t size, uint32_t tag)
{
    struct vmm_range range = {.base = base, .last = base + (size - 1), .tag = tag};
    int rc = check_range(vm, space, base, size);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&vm->bus.lock);
    rc = hook_attach_locked(vm, space, &range);
    pthread_mutex_unlock(&vm->bus.lock);
    return rc;
}

static int hook_detach_locked(struct vmm_vm *vm, int space, uint32_t tag, uint64_t *epoch)
{
    const struct vmm_bus_table *old = atomic_load(&vm->bus.hooks[space]);
    uint32_t n = old ? old->n : 0, at = 0;
    while (at < n && old->ranges[at].tag != tag)
        at++;
    if (at == n)
        return vmm_error_set(-ENOENT, "there is no hook with tag %u", tag);
    struct vmm_bus_table *table =
        n > 1 ? table_create(n - 1) : NULL; /* none left: the bus is as fast as before */
    if (n > 1 && !table)
        return vmm_error_set(-ENOMEM, "no memory for a table of hooks");
    if (table) {
        memcpy(table->ranges, old->ranges, at * sizeof(table->ranges[0]));
        memcpy(table->ranges + at, old->ranges + at + 1, (n - at - 1) * sizeof(table->ranges[0]));
    }
    *epoch = publish(vm, &vm->bus.hooks[space], table);
    return 0;
}

int vmm_hook_detach(vmm_vm *vm, int space, uint32_t tag)
{
    if (space != VMM_PIO && space != VMM_MMIO)
        return vmm_error_set(-EINVAL, "space %d is neither VMM_PIO nor VMM_MMIO", space);
    uint64_t epoch = 0;
    pthread_mutex_lock(&vm->bus.lock);
    int rc = hook_detach_locked(vm, space, tag, &epoch);
    pthread_mutex_unlock(&vm->bus.lock);
    if (rc == 0)
        wait_until_passed(vm, epoch);
    return rc;
}

/* ---- from outside a vCPU ---- */

static void access_outside(vmm_vm *vm, int space, uint64_t address, uint32_t size, uint64_t *value,
                           bool write)
{
    uint64_t result = 0;
    for (uint32_t i = 0, step; i < size; i += step) {
        struct vmm_range range = {0};
        uint32_t hint = UINT32_MAX;
        pthread_mutex_lock(&vm->bus.lock);
        const struct vmm_range *r = find(atomic_load(&vm->bus.table[space]), address + i, &hint);
        if (r)
            range = *r;
        pthread_mutex_unlock(&vm->bus.lock);
        step = r && i == 0 && fits(&range, address, size) ? size : 1;
        uint64_t part = write ? *value >> (8 * i) : ones(step);
        if (r)
            call(&range, address + i, step, &part, write);
        result |= (part & ones(step)) << (8 * i);
    }
    *value = result;
}

uint64_t vmm_bus_read(vmm_vm *vm, int space, uint64_t address, uint32_t size)
{
    uint64_t value = UINT64_MAX;
    if ((space == VMM_PIO || space == VMM_MMIO) && size >= 1 && size <= 8)
        access_outside(vm, space, address, size, &value, false);
    return value;
}

void vmm_bus_write(vmm_vm *vm, int space, uint64_t address, uint32_t size, uint64_t value)
{
    if ((space == VMM_PIO || space == VMM_MMIO) && size >= 1 && size <= 8)
        access_outside(vm, space, address, size, &value, true);
}

uint64_t vmm_bus_unclaimed(vmm_vm *vm)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        sum += atomic_load_explicit(&vm->vcpus[i]->unclaimed, memory_order_relaxed);
    return sum;
}
