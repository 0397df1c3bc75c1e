/* SPDX-License-Identifier: Apache-2.0 */
/* A checkpoint: a copy of guest memory and the processors' state, and the way back to them. */
#include "base/bitmap.h"
#include "time/dirty.h"
#include "time/state.h"
#include "vmmsnapshot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_SIZE 4096u

struct vmm_checkpoint {
    struct vmm_vm *vm;
    vmm_dirty *log;
    uint8_t *copies[VMM_MAX_REGIONS]; /* of whole regions; what was never touched is not there */
    vmm_vcpu_state *vcpus;
    vmm_chips_state chips;
    bool remapped; /* what was put back may hold page tables that were in use */
};

/* ---- the copy ---- */

/* Only what the memfd holds: the rest is zero, and costs nothing here either. */
static int copy_file(const struct vmm_region *r, uint8_t *copy)
{
    for (off_t end, at = 0; at < (off_t)r->size; at = end) {
        at = lseek(r->fd, at, SEEK_DATA);
        if (at < 0)
            return errno == ENXIO ? 0 : vmm_error_errno("looking for guest memory in use");
        end = lseek(r->fd, at, SEEK_HOLE);
        if (end < 0)
            return vmm_error_errno("looking for guest memory in use");
        memcpy(copy + at, r->host + at, (size_t)(end - at));
    }
    return 0;
}

/* The file is mapped anew; what was written over it is copied. */
static int copy_private(const struct vmm_region *r, uint8_t *copy)
{
    const uint64_t pages = r->size / PAGE_SIZE;
    uint64_t *own = calloc((pages + 63) / 64, sizeof(*own));
    const int rc =
        own ? vmm_pages_own(r->host, r->size, own) : vmm_error_set(-ENOMEM, "no memory for a checkpoint");
    for (uint64_t page = 0; rc == 0 && (page = vmm_bitmap_next(own, page, pages, true)) < pages; page++)
        memcpy(copy + page * PAGE_SIZE, r->host + page * PAGE_SIZE, PAGE_SIZE);
    free(own);
    return rc;
}

static int copy_region(struct vmm_checkpoint *cp, uint32_t i)
{
    const struct vmm_region *r = &cp->vm->regions[i];
    const bool private = r->flags & VMM_MEMORY_PRIVATE;
    const int flags = MAP_PRIVATE | MAP_NORESERVE | (private ? 0 : MAP_ANONYMOUS);
    uint8_t *copy =
        mmap(NULL, r->size, PROT_READ | PROT_WRITE, flags, private ? r->fd : -1, (off_t)r->offset);
    if (copy == MAP_FAILED)
        return vmm_error_errno("mmap of a checkpoint");
    cp->copies[i] = copy;
    return private ? copy_private(r, copy) : copy_file(r, copy);
}

int vmm_checkpoint_create(vmm_vm *vm, vmm_checkpoint **out)
{
    *out = NULL;
    struct vmm_checkpoint *cp = calloc(1, sizeof(*cp));
    if (!cp)
        return vmm_error_set(-ENOMEM, "no memory for a checkpoint");
    cp->vm = vm;
    cp->vcpus = calloc(vm->n_vcpus ? vm->n_vcpus : 1, sizeof(*cp->vcpus));
    int rc = cp->vcpus ? vmm_vm_save(vm, cp->vcpus, &cp->chips)
                       : vmm_error_set(-ENOMEM, "no memory for a checkpoint");
    rc = rc ? rc : vmm_dirty_open(vm, &cp->log); /* before the copy, which then has everything older */
    for (uint32_t i = 0; i < vm->n_regions && rc == 0; i++)
        rc = copy_region(cp, i);
    if (rc < 0) {
        vmm_checkpoint_destroy(cp);
        return rc;
    }
    *out = cp;
    return 0;
}

void vmm_checkpoint_destroy(vmm_checkpoint *cp)
{
    if (!cp)
        return;
    for (uint32_t i = 0; i < cp->vm->n_regions; i++)
        if (cp->copies[i])
            munmap(cp->copies[i], cp->vm->regions[i].size);
    vmm_dirty_close(cp->log);
    free(cp->vcpus);
    free(cp);
}

/* ---- the way back ---- */

/*
 * Whether the page may be a page table of which KVM has copied an entry that is to change. Only entries that are
 * present and accessed get there (KVM sets the latter first, as a processor would), and a copy goes when the guest
 * writes its entry; so the entry still reads as it was copied. Of 4 bytes, or the low half of 8.
 */
static bool may_map(const uint8_t *now, const uint8_t *then)
{
    enum { PRESENT = 1, ACCESSED = 1 << 5, USED = PRESENT | ACCESSED, BLOCK = 64 };
    for (size_t block = 0; block < PAGE_SIZE; block += BLOCK) {
        if (!memcmp(now + block, then + block, BLOCK))
            continue;
        for (size_t i = block; i < block + BLOCK; i += sizeof(uint64_t)) {
            uint64_t old, new;
            memcpy(&old, now + i, sizeof(old));
            memcpy(&new, then + i, sizeof(new));
            if (old != new && ((old & USED) == USED || (old >> 32 & USED) == USED))
                return true;
        }
    }
    return false;
}

static void copy_back(void *opaque, uint32_t region, uint64_t page)
{
    struct vmm_checkpoint *cp = opaque;
    uint8_t *now = cp->vm->regions[region].host + page * PAGE_SIZE;
    const uint8_t *then = cp->copies[region] + page * PAGE_SIZE;
    if (cp->vm->shadow_paging && !cp->remapped)
        cp->remapped = may_map(now, then);
    memcpy(now, then, PAGE_SIZE);
}

int64_t vmm_checkpoint_roll_back_memory(vmm_checkpoint *cp)
{
    return vmm_dirty_undo(cp->log, copy_back, cp);
}

int vmm_checkpoint_roll_back_processors(vmm_checkpoint *cp)
{
    const int rc = vmm_vm_roll_back(cp->vm, cp->vcpus, &cp->chips, cp->remapped);
    cp->remapped = cp->remapped && rc < 0;
    return rc;
}
