/* SPDX-License-Identifier: Apache-2.0 */
/* A machine: /dev/kvm, guest memory, interrupt lines, life cycle. */
#include "core/halt.h"
#include "core/lazy.h"
#include "core/loop.h"
#include "core/thread.h"
#include "vmmsnapshot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21 << 26)
#endif

_Static_assert(VMM_LAST_EXITS == 64 && (VMM_LAST_EXITS & (VMM_LAST_EXITS - 1)) == 0, "vmmcore.h promises 64");

/* ---- create, destroy ---- */

/*
 * KVM wants the interrupt controllers before the first vCPU; they come no earlier than that because a memory
 * slot that is set after them waits for the SRCU grace period in which KVM frees the buses they replaced (4
 * to 7 ms).
 */
int vmm_vm_create_chips(struct vmm_vm *vm)
{
    if (vm->has_chips || !(vm->flags & VMM_VM_IRQCHIP))
        return 0;
    const int rc = vm->engine->ops->create_chips(vm->engine, vm->flags & VMM_VM_PIT);
    vm->has_chips = rc == 0;
    return rc;
}

static int prepare(struct vmm_vm *vm, const char *path)
{
    const int rc = vmm_kvm_engine.open(path, &vm->engine);
    if (rc < 0)
        return rc;
    const int all = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    vm->sync_regs = (vmm_vm_check_extension(vm, KVM_CAP_SYNC_REGS) & all) == all;
    vm->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (vm->stop_fd < 0)
        return vmm_error_errno("eventfd");
    vm->lines = calloc(VMM_MAX_LINES, sizeof(*vm->lines));
    return vm->lines ? 0 : vmm_error_set(-ENOMEM, "interrupt lines");
}

int vmm_vm_create(const char *kvm_path, uint32_t flags, vmm_vm **out)
{
    *out = NULL;
    struct vmm_vm *vm = calloc(1, sizeof(*vm));
    if (!vm)
        return vmm_error_set(-ENOMEM, "machine");
    vm->stop_fd = -1;
    vm->flags = flags;
    vm->stop_vcpu = UINT32_MAX;
    pthread_mutex_init(&vm->lock, NULL);
    vmm_cond_init(&vm->changed);
    pthread_mutex_init(&vm->io_trace_lock, NULL);
    pthread_mutex_init(&vm->dirty_lock, NULL);
    vmm_bus_init(&vm->bus);
    int rc = prepare(vm, kvm_path);
    if (rc < 0) {
        vmm_vm_destroy(vm);
        return rc;
    }
    *out = vm;
    return 0;
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

void vmm_vm_destroy(vmm_vm *vm)
{
    if (!vm)
        return;
    vmm_lazy_destroy(vm->lazy); /* first: the I/O thread may be waiting for a page */
    vmm_loop_destroy(vm->loop);
    vmm_halt_destroy(vm->halt);
    vmm_trace_destroy(vm);
    vmm_debug_deinit(vm);
    pthread_mutex_destroy(&vm->io_trace_lock);
    pthread_mutex_destroy(&vm->dirty_lock);
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        if (vm->compat)
            vm->compat->vcpu_fini(vm->vcpus[i]);
        vmm_vcpu_destroy(vm->vcpus[i]);
    }
    if (vm->compat)
        vm->compat->vm_fini(vm);
    if (vm->engine)
        vm->engine->ops->close(vm->engine);
    for (uint32_t i = 0; i < vm->n_regions; i++) {
        munmap(vm->regions[i].host, vm->regions[i].size);
        close_fd(vm->regions[i].fd);
    }
    close_fd(vm->stop_fd);
    vmm_bus_deinit(&vm->bus);
    pthread_cond_destroy(&vm->changed);
    pthread_mutex_destroy(&vm->lock);
    free(vm->touched);
    free(vm->msrs);
    free(vm->lines);
    free(vm);
}

int vmm_vm_check_extension(vmm_vm *vm, uint32_t capability)
{
    return vm->engine->ops->capability(vm->engine, capability);
}

int vmm_vm_enable_cap(vmm_vm *vm, uint32_t capability, uint64_t arg0, uint64_t arg1, uint64_t arg2,
                      uint64_t arg3)
{
    const struct kvm_enable_cap cap = {.cap = capability, .args = {arg0, arg1, arg2, arg3}};
    return vm->engine->ops->enable(vm->engine, &cap);
}

void vmm_vm_on_message(vmm_vm *vm, void (*say)(void *opaque, const char *text), void *opaque)
{
    vm->say_opaque = opaque;
    vm->say = say;
}

void vmm_vm_say(struct vmm_vm *vm, const char *format, ...)
{
    char text[240];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (vm->say)
        vm->say(vm->say_opaque, text);
}

/* ---- memory ---- */

static int check_region(const struct vmm_vm *vm, uint64_t gpa, uint64_t size, uint32_t flags)
{
    uint64_t unit = flags & VMM_MEMORY_HUGE_2M ? 2u << 20 : 4096;
    if (!size || (gpa | size) % unit || gpa + (size - 1) < gpa)
        return vmm_error_set(-EINVAL, "memory region %#llx+%#llx", (unsigned long long)gpa,
                             (unsigned long long)size);
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
        return vmm_error_set(-EINVAL, "memory region %#llx+%#llx from a file of %lld bytes",
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
                                  : vmm_error_set(-EINVAL, "memory region %u", region);
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
            return vmm_error_set(-ENOTSUP, "guest memory in huge pages");
    }
    int rc = 0;
    for (uint32_t i = 0; i < vm->n_regions && rc == 0; i++) {
        rc = freeze_region(&vm->regions[i]);
        fds[i] = vm->regions[i].fd;
    }
    return rc;
}

int64_t vmm_vm_pages_in_use(vmm_vm *vm, uint32_t region, uint64_t *bitmap)
{
    if (region >= vm->n_regions)
        return vmm_error_set(-EINVAL, "there is no memory region %u", region);
    const struct vmm_region *r = &vm->regions[region];
    return vmm_pages_find(r->host, r->size, r->fd, r->offset, r->flags & VMM_MEMORY_PRIVATE ? 1 : 0, bitmap);
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

/* ---- lines ---- */

static void set_engine_line(void *opaque, uint32_t gsi, int level)
{
    struct vmm_vm *vm = opaque;
    vm->engine->ops->line(vm->engine, gsi, level != 0);
}

const vmm_line *vmm_vm_line(vmm_vm *vm, uint32_t gsi)
{
    if (gsi >= VMM_MAX_LINES)
        return NULL;
    pthread_mutex_lock(&vm->lock);
    if (!vm->lines[gsi].set)
        vm->lines[gsi] = (vmm_line){.set = set_engine_line, .opaque = vm, .n = gsi};
    pthread_mutex_unlock(&vm->lock);
    return &vm->lines[gsi];
}

void vmm_line_set(const vmm_line *line, int level)
{
    if (line && line->set)
        line->set(line->opaque, line->n, level);
}
