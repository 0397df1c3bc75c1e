/* SPDX-License-Identifier: Apache-2.0 */
/* A checkpoint: a copy of guest memory and the processors' state, and the way back to them. */
#include "core/dirty.h"

#include <errno.h>
#include <fcntl.h>
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
};

/* ---- the copy ---- */

/* Only what the memory file holds: the rest is zero, and costs nothing here either. */
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

static int copy_region(struct vmm_checkpoint *cp, uint32_t i)
{
    const struct vmm_region *r = &cp->vm->regions[i];
    uint8_t *copy =
        mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (copy == MAP_FAILED)
        return vmm_error_errno("mmap of a checkpoint");
    cp->copies[i] = copy;
    return copy_file(r, copy);
}

int vmm_checkpoint_create(vmm_vm *vm, vmm_checkpoint **out)
{
    *out = NULL;
    struct vmm_checkpoint *cp = calloc(1, sizeof(*cp));
    if (!cp)
        return vmm_error_set(-ENOMEM, "checkpoint");
    cp->vm = vm;
    cp->vcpus = calloc(vm->n_vcpus ? vm->n_vcpus : 1, sizeof(*cp->vcpus));
    int rc = cp->vcpus ? vmm_vm_save(vm, cp->vcpus, &cp->chips) : vmm_error_set(-ENOMEM, "checkpoint");
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

static void copy_back(void *opaque, uint32_t region, uint64_t page)
{
    const struct vmm_checkpoint *cp = opaque;
    memcpy(cp->vm->regions[region].host + page * PAGE_SIZE, cp->copies[region] + page * PAGE_SIZE, PAGE_SIZE);
}

int64_t vmm_checkpoint_restore_memory(vmm_checkpoint *cp)
{
    return vmm_dirty_undo(cp->log, copy_back, cp);
}

int vmm_checkpoint_restore_processors(vmm_checkpoint *cp)
{
    return vmm_vm_load(cp->vm, cp->vcpus, &cp->chips);
}
