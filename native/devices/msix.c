/* SPDX-License-Identifier: Apache-2.0 */
#include "devices/msix.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CAPABILITY_ID 0x11
#define CAPABILITY_SIZE 12
#define CONTROL 2 /* of the capability: message control */
#define TABLE 4
#define PENDING 8

enum { CONTROL_MASK = 0x4000, CONTROL_ENABLE = 0x8000 };
enum { WORD_CONTROL = 3, VECTOR_MASKED = 1 };

int vmm_msix_init(struct vmm_msix *msix, struct vmm_pci_function *f, struct vmm_msi *msi, uint32_t n,
                  unsigned bar, uint32_t table, uint32_t pending)
{
    *msix = (struct vmm_msix){.function = f, .msi = msi};
    if (!n || n > VMM_MSIX_VECTORS_MAX)
        return vmm_error_set(-EINVAL, "%u MSI-X vectors", n);
    msix->entries = calloc(n, sizeof(*msix->entries));
    if (!msix->entries)
        return vmm_error_set(-ENOMEM, "MSI-X table");
    for (; msix->n < n; msix->n++) {
        int rc = vmm_msi_open(msi, &msix->entries[msix->n].vector);
        if (rc < 0) {
            vmm_msix_deinit(msix);
            return rc;
        }
    }
    vmm_msix_reset(msix);
    msix->capability = vmm_pci_add_capability(f, CAPABILITY_ID, CAPABILITY_SIZE);
    vmm_pci_put(f->config + msix->capability + CONTROL, n - 1, 2);
    vmm_pci_put(f->writable + msix->capability + CONTROL, CONTROL_MASK | CONTROL_ENABLE, 2);
    vmm_pci_put(f->config + msix->capability + TABLE, table | bar, 4);
    vmm_pci_put(f->config + msix->capability + PENDING, pending | bar, 4);
    return 0;
}

void vmm_msix_deinit(struct vmm_msix *msix)
{
    for (uint32_t i = 0; i < msix->n; i++)
        vmm_msi_close(msix->msi, &msix->entries[i].vector);
    free(msix->entries);
    *msix = (struct vmm_msix){0};
}

void vmm_msix_reset(struct vmm_msix *msix)
{
    msix->enabled = msix->masked = false;
    for (uint32_t i = 0; i < msix->n; i++) {
        struct vmm_msix_entry *e = &msix->entries[i];
        e->words[0] = e->words[1] = e->words[2] = 0;
        e->words[WORD_CONTROL] = VECTOR_MASKED;
        e->pending = false;
    }
}

static bool silent(const struct vmm_msix *msix, const struct vmm_msix_entry *e)
{
    return !msix->enabled || msix->masked || (e->words[WORD_CONTROL] & VECTOR_MASKED);
}

/* The entry, a mask or the enable bit changed: while it can be signalled its route is up to date. */
static void update(struct vmm_msix *msix, struct vmm_msix_entry *e)
{
    if (silent(msix, e))
        return;
    /* The message is the guest's: one that KVM refuses makes the vector mute, which is all that follows. */
    vmm_msi_route(msix->msi, &e->vector, e->words[0] | (uint64_t)e->words[1] << 32, e->words[2]);
    if (e->pending) {
        e->pending = false;
        vmm_msi_signal(&e->vector);
    }
}

/* Did it change? */
static bool read_control(struct vmm_msix *msix)
{
    const uint32_t control = vmm_pci_get(msix->function->config + msix->capability + CONTROL, 2);
    const bool enabled = control & CONTROL_ENABLE, masked = control & CONTROL_MASK;
    const bool changed = msix->enabled != enabled || msix->masked != masked;
    msix->enabled = enabled;
    msix->masked = masked;
    return changed;
}

void vmm_msix_config_written(struct vmm_msix *msix)
{
    if (!read_control(msix))
        return;
    for (uint32_t i = 0; i < msix->n; i++)
        update(msix, &msix->entries[i]);
}

void vmm_msix_save(const struct vmm_msix *msix, vmm_msix_entry_state *entries)
{
    for (uint32_t i = 0; i < msix->n; i++) {
        memcpy(entries[i].words, msix->entries[i].words, sizeof(entries[i].words));
        entries[i].pending = msix->entries[i].pending;
    }
}

int vmm_msix_load(struct vmm_msix *msix, const vmm_msix_entry_state *entries)
{
    for (uint32_t i = 0; i < msix->n; i++)
        if (entries[i].words[0] & 3 || entries[i].words[WORD_CONTROL] & ~(uint32_t)VECTOR_MASKED ||
            entries[i].pending > 1)
            return vmm_error_set(-EINVAL, "MSI-X vector %u: message address %#x, control %#x", i,
                                 entries[i].words[0], entries[i].words[WORD_CONTROL]);
    read_control(msix);
    for (uint32_t i = 0; i < msix->n; i++) {
        memcpy(msix->entries[i].words, entries[i].words, sizeof(entries[i].words));
        msix->entries[i].pending = entries[i].pending;
        update(msix, &msix->entries[i]);
    }
    return 0;
}

void vmm_msix_signal(struct vmm_msix *msix, uint32_t vector)
{
    if (vector >= msix->n || !msix->enabled)
        return;
    struct vmm_msix_entry *e = &msix->entries[vector];
    if (silent(msix, e))
        e->pending = true;
    else
        vmm_msi_signal(&e->vector);
}

/* ---- table and pending bits ---- */

static bool aligned(uint64_t offset, uint32_t size)
{
    return (size == 4 || size == 8) && offset % size == 0;
}

static uint64_t ones(uint32_t size)
{
    return size >= 8 ? UINT64_MAX : (1ull << (8 * size)) - 1;
}

uint64_t vmm_msix_table_read(const struct vmm_msix *msix, uint64_t offset, uint32_t size)
{
    if (!aligned(offset, size) || offset / VMM_MSIX_ENTRY >= msix->n)
        return ones(size);
    const uint32_t *word = &msix->entries[offset / VMM_MSIX_ENTRY].words[offset % VMM_MSIX_ENTRY / 4];
    return size == 8 ? word[0] | (uint64_t)word[1] << 32 : word[0];
}

void vmm_msix_table_write(struct vmm_msix *msix, uint64_t offset, uint32_t size, uint64_t value)
{
    if (!aligned(offset, size) || offset / VMM_MSIX_ENTRY >= msix->n)
        return;
    struct vmm_msix_entry *e = &msix->entries[offset / VMM_MSIX_ENTRY];
    uint32_t *word = &e->words[offset % VMM_MSIX_ENTRY / 4];
    word[0] = (uint32_t)value;
    if (size == 8)
        word[1] = (uint32_t)(value >> 32);
    e->words[0] &= ~3u;                      /* always zero (PCI 3.0, 6.8.2.4) */
    e->words[WORD_CONTROL] &= VECTOR_MASKED; /* the rest is reserved (6.8.2.7) */
    update(msix, e);
}

uint64_t vmm_msix_pending_read(const struct vmm_msix *msix, uint64_t offset, uint32_t size)
{
    if (!aligned(offset, size))
        return ones(size);
    uint64_t bits = 0;
    for (uint32_t i = 0; i < 8 * size && 8 * offset + i < msix->n; i++)
        bits |= (uint64_t)msix->entries[8 * offset + i].pending << i;
    return bits;
}
