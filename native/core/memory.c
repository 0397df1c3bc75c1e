/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory: regions, each of one mapping and one memory slot of the engine. */
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21 << 26)
#endif

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

static int check_region(const struct vmm_vm *vm, uint64_t gpa, uint64_t size, uint32_t flags)
{
    uint64_t unit = flags & VMM_MEMORY_HUGE_2M ? 2u << 20 : 4096;
    if (!size || (gpa | size) % unit || gpa + (size - 1) < gpa)
        return vmm_error_set(
            -EINVAL, "memory region %#llx+%#llx is empty, wraps, or is not a multiple of its page size",
            (unsigned long long)gpa, (unsigned long long)size);
    if (vm->n_regions == VMM_MAX_REGIONS)
        return vmm_error_set(-ENOSPC, "more than %d memory regions", VMM_MAX_REGIONS);
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        const struct vmm_region *r = &vm->regions[i];
        if (gpa <= r->gpa + (r->size - 1) && r->gpa <= gpa + (size - 1))
            return vmm_error_set(-EEXIST, "memory region %#llx+%#llx overlaps another",
                                 (unsigned long long)gpa, (unsigned long long)size);
    }
    return 0;
}

static int map_region(struct vmm_region *r)
{
    uint32_t huge = r->flags & VMM_MEMORY_HUGE_2M ? MFD_HUGETLB | MFD_HUGE_2MB : 0;
    r->fd = memfd_create("guest-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING | huge);
    if (r->fd < 0)
        return vmm_error_errno("memfd_create");
    if (ftruncate(r->fd, (off_t)r->size) < 0)
        return vmm_error_errno("ftruncate of guest memory");
    /* A process that is given the memory (vhost-user) cannot take it from under us by making the file shorter. */
    if (fcntl(r->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return vmm_error_errno("sealing guest memory");
    r->host = mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->fd, 0);
    if (r->host == MAP_FAILED)
        return vmm_error_errno("mmap of guest memory");
    return 0;
}

static int give_region(struct vmm_vm *vm, uint32_t slot, const struct vmm_region *r)
{
    const struct kvm_userspace_memory_region region = {
        .slot = slot,
        .flags = (r->flags & VMM_MEMORY_DIRTY_LOG ? KVM_MEM_LOG_DIRTY_PAGES : 0) |
                 (r->flags & VMM_MEMORY_READONLY ? KVM_MEM_READONLY : 0),
        .guest_phys_addr = r->gpa,
        .memory_size = r->size,
        .userspace_addr = (uint64_t)(uintptr_t)r->host,
    };
    return vm->engine->ops->set_memory(vm->engine, &region);
}

int vmm_region_set_flags(struct vmm_vm *vm, uint32_t region, uint32_t flags)
{
    struct vmm_region changed = vm->regions[region];
    changed.flags = flags;
    int rc = give_region(vm, region, &changed);
    if (rc == 0)
        vm->regions[region].flags = flags;
    return rc;
}

int vmm_vm_add_memory(vmm_vm *vm, uint64_t gpa, uint64_t size, uint32_t flags, void **host, int *memfd)
{
    int rc = check_region(vm, gpa, size, flags);
    if (rc < 0)
        return rc;
    struct vmm_region r = {.gpa = gpa, .size = size, .host = MAP_FAILED, .fd = -1, .flags = flags};
    rc = map_region(&r);
    if (rc == 0)
        rc = give_region(vm, vm->n_regions, &r);
    if (rc < 0) {
        if (r.host != MAP_FAILED)
            munmap(r.host, size);
        close_fd(r.fd);
        return rc;
    }
    vm->regions[vm->n_regions++] = r;
    *host = r.host;
    *memfd = r.fd;
    return 0;
}

int vmm_vm_add_memory_file(vmm_vm *vm, uint64_t gpa, uint64_t size, int fd, uint64_t offset, uint32_t flags,
                           void **host)
{
    struct stat file;
    int rc = check_region(vm, gpa, size, flags);
    if (rc < 0)
        return rc;
    if (fstat(fd, &file) < 0)
        return vmm_error_errno("looking at the file of guest memory");
    if (flags || offset % 4096 || offset > (uint64_t)file.st_size || size > (uint64_t)file.st_size - offset)
        return vmm_error_set(-EINVAL, "memory region %#llx+%#llx is not in its file of %lld bytes",
                             (unsigned long long)gpa, (unsigned long long)size, (long long)file.st_size);
    struct vmm_region r = {.gpa = gpa, .size = size, .fd = -1, .flags = VMM_MEMORY_PRIVATE};
    r.host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, (off_t)offset);
    if (r.host == MAP_FAILED)
        return vmm_error_errno("mmap of a file of guest memory");
    /* Kept to tell pages of the file from our own. */
    r.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    r.offset = offset;
    rc = r.fd < 0 ? vmm_error_errno("the file of guest memory") : give_region(vm, vm->n_regions, &r);
    if (rc < 0) {
        munmap(r.host, size);
        close_fd(r.fd);
        return rc;
    }
    vm->regions[vm->n_regions++] = r;
    *host = r.host;
    return 0;
}

int vmm_vm_memory_fd(vmm_vm *vm, uint32_t region)
{
    return region < vm->n_regions ? vm->regions[region].fd
                                  : vmm_error_set(-EINVAL, "there is no memory region %u", region);
}

/* The mapping changes under KVM, which is told by the kernel; its address, and what is read there, stay the same. */
static int freeze_region(struct vmm_region *r)
{
    if (mmap(r->host, r->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, r->fd, 0) ==
        MAP_FAILED)
        return vmm_error_errno("mmap of frozen guest memory");
    r->flags |= VMM_MEMORY_PRIVATE;
    return 0;
}

int vmm_vm_freeze_memory(vmm_vm *vm, int *fds)
{
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        if (vm->regions[i].flags & VMM_MEMORY_PRIVATE)
            return vmm_error_set(-EALREADY, "guest memory is private already");
        if (vm->regions[i].flags & VMM_MEMORY_HUGE_2M)
            return vmm_error_set(-ENOTSUP, "guest memory in huge pages cannot be frozen: use ordinary pages");
    }
    int rc = 0;
    for (uint32_t i = 0; i < vm->n_regions && rc == 0; i++) {
        rc = freeze_region(&vm->regions[i]);
        fds[i] = vm->regions[i].fd;
    }
    return rc;
}

void *vmm_vm_gpa(vmm_vm *vm, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        const struct vmm_region *r = &vm->regions[i];
        if (gpa >= r->gpa && gpa - r->gpa < r->size && size <= r->size - (gpa - r->gpa))
            return r->host + (gpa - r->gpa);
    }
    return NULL;
}

void vmm_memory_deinit(struct vmm_vm *vm)
{
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        munmap(vm->regions[i].host, vm->regions[i].size);
        close_fd(vm->regions[i].fd);
    }
}
