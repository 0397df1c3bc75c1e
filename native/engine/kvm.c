/* SPDX-License-Identifier: Apache-2.0 */
/* The KVM engine: a machine, its memory slots, its chips and its interrupt routes. */
#include "engine/kvm.h"
#include "base/error.h"
#include "base/thread.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PAGE_SIZE 4096u
#define TSS_ADDRESS                                                                                          \
    0xfffbd000ul /* three pages that KVM keeps for itself on Intel; below the BIOS, never RAM */
#define NOWHERE                                                                                              \
    (1ull << 51) /* guest-physical: beyond any memory of a machine, and of any processor yet made */

static struct kvm_machine *machine_of(struct vmm_engine *engine)
{
    return (struct kvm_machine *)engine;
}

static int vm_ioctl(struct vmm_engine *engine, unsigned long request, const void *argument, const char *what)
{
    return kvm_ioctl(machine_of(engine)->fd, request, argument, what);
}

/* ---- open, close ---- */

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

static void *close_on_thread(void *fd)
{
    close((int)(intptr_t)fd);
    return NULL;
}

/* Sanitized builds close in line: LeakSanitizer stops every thread at exit, and can wait for ever for one that ends
 * while it does. */
#ifdef __SANITIZE_ADDRESS__
enum { CLOSE_ON_THREAD = 0 };
#else
enum { CLOSE_ON_THREAD = 1 };
#endif

/* The last close of a machine waits for the kernel's grace periods, 1 to 30 ms. Nothing is left that could depend on
 * it, so the caller need not wait. */
static void close_machine(int fd)
{
    pthread_t thread;
    if (fd < 0)
        return;
    if (CLOSE_ON_THREAD && vmm_thread_start(&thread, "vmm-close", close_on_thread, (void *)(intptr_t)fd) == 0)
        pthread_detach(thread);
    else
        close(fd);
}

static void close_engine(struct vmm_engine *engine)
{
    struct kvm_machine *kvm = machine_of(engine);
    close_machine(kvm->fd);
    close_fd(kvm->kvm_fd);
    free(kvm);
}

static int open_device(struct kvm_machine *kvm, const char *path)
{
    kvm->kvm_fd = open(path, O_RDWR | O_CLOEXEC);
    if (kvm->kvm_fd < 0)
        return vmm_error_errno(path);
    const int version = kvm_ioctl(kvm->kvm_fd, KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION");
    if (version < 0)
        return version;
    if (version != KVM_API_VERSION)
        return vmm_error_set(-EPROTO, "KVM_GET_API_VERSION returned %d, not 12: use Linux 2.6.22 or later",
                             version);
    const int run_size = ioctl(kvm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (run_size < (int)sizeof(struct kvm_run))
        return vmm_error_errno("KVM_GET_VCPU_MMAP_SIZE");
    kvm->run_size = (uint32_t)run_size;
    return 0;
}

static int create_machine(struct kvm_machine *kvm)
{
    /* A signal that arrives while KVM_CREATE_VM sleeps makes it fail with EINTR: nothing was created, ask again. */
    do {
        kvm->fd = ioctl(kvm->kvm_fd, KVM_CREATE_VM, 0);
    } while (kvm->fd < 0 && errno == EINTR);
    return kvm->fd < 0 ? vmm_error_errno("KVM_CREATE_VM") : 0;
}

static int open_engine(const char *path, struct vmm_engine **out)
{
    struct kvm_machine *kvm = calloc(1, sizeof(*kvm));
    if (!kvm)
        return vmm_error_set(-ENOMEM, "no memory for a KVM machine");
    *kvm = (struct kvm_machine){.base.ops = &vmm_kvm_engine, .kvm_fd = -1, .fd = -1};
    int rc = open_device(kvm, path);
    rc = rc ? rc : create_machine(kvm);
    if (rc < 0) {
        close_engine(&kvm->base);
        return rc;
    }
    *out = &kvm->base;
    return 0;
}

static int capability(struct vmm_engine *engine, uint32_t number)
{
    const int n = ioctl(machine_of(engine)->fd, KVM_CHECK_EXTENSION, (unsigned long)number);
    return n < 0 ? 0 : n;
}

static int enable(struct vmm_engine *engine, const struct kvm_enable_cap *cap)
{
    return vm_ioctl(engine, KVM_ENABLE_CAP, cap, "KVM_ENABLE_CAP");
}

/* ---- chips and clock ---- */

static int create_chips(struct vmm_engine *engine, bool with_pit)
{
    const struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    int rc = vm_ioctl(engine, KVM_SET_TSS_ADDR, (void *)TSS_ADDRESS, "KVM_SET_TSS_ADDR");
    rc = rc ? rc : vm_ioctl(engine, KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP");
    if (rc == 0 && with_pit)
        rc = vm_ioctl(engine, KVM_CREATE_PIT2, &pit, "KVM_CREATE_PIT2");
    return rc;
}

static int get_chip(struct vmm_engine *engine, struct kvm_irqchip *chip)
{
    return vm_ioctl(engine, KVM_GET_IRQCHIP, chip, "KVM_GET_IRQCHIP");
}

static int set_chip(struct vmm_engine *engine, const struct kvm_irqchip *chip)
{
    return vm_ioctl(engine, KVM_SET_IRQCHIP, chip, "KVM_SET_IRQCHIP");
}

static int get_pit(struct vmm_engine *engine, struct kvm_pit_state2 *pit)
{
    return vm_ioctl(engine, KVM_GET_PIT2, pit, "KVM_GET_PIT2");
}

static int set_pit(struct vmm_engine *engine, const struct kvm_pit_state2 *pit)
{
    return vm_ioctl(engine, KVM_SET_PIT2, pit, "KVM_SET_PIT2");
}

static int get_clock(struct vmm_engine *engine, struct kvm_clock_data *clock)
{
    return vm_ioctl(engine, KVM_GET_CLOCK, clock, "KVM_GET_CLOCK");
}

static int set_clock(struct vmm_engine *engine, const struct kvm_clock_data *clock)
{
    return vm_ioctl(engine, KVM_SET_CLOCK, clock, "KVM_SET_CLOCK");
}

/* ---- memory ---- */

static int set_memory(struct vmm_engine *engine, const struct kvm_userspace_memory_region *slot)
{
    return vm_ioctl(engine, KVM_SET_USER_MEMORY_REGION, slot, "KVM_SET_USER_MEMORY_REGION");
}

static int dirty_log(struct vmm_engine *engine, uint32_t slot, uint64_t *bitmap)
{
    const struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
    return vm_ioctl(engine, KVM_GET_DIRTY_LOG, &log, "KVM_GET_DIRTY_LOG");
}

static int move_empty_slot(struct kvm_machine *kvm, uint64_t gpa)
{
    static const _Alignas(PAGE_SIZE) uint8_t zeros[PAGE_SIZE];
    const struct kvm_userspace_memory_region slot = {
        .slot = VMM_ENGINE_SLOTS,
        .flags = KVM_MEM_READONLY,
        .guest_phys_addr = gpa,
        .memory_size = sizeof(zeros),
        .userspace_addr = (uintptr_t)zeros,
    };
    const int rc = set_memory(&kvm->base, &slot);
    if (rc == 0)
        kvm->moved_to = gpa;
    return rc;
}

/*
 * Without nested paging KVM translates by shadow page tables. It keeps them up to date as the guest writes its own, but
 * does not see what this process writes. It drops all of them when a memory slot moves: this slot has no other use.
 */
static int forget_page_tables(struct vmm_engine *engine)
{
    struct kvm_machine *kvm = machine_of(engine);
    const int rc = kvm->moved_to ? 0 : move_empty_slot(kvm, NOWHERE);
    return rc ? rc : move_empty_slot(kvm, kvm->moved_to ^ PAGE_SIZE);
}

/* ---- interrupts and doorbells ---- */

static void line(struct vmm_engine *engine, uint32_t gsi, bool level)
{
    const struct kvm_irq_level irq = {.irq = gsi, .level = level};
    ioctl(machine_of(engine)->fd, KVM_IRQ_LINE, &irq); /* fails only without chips: the line leads nowhere */
}

static int routing(struct vmm_engine *engine, const struct kvm_irq_routing *table)
{
    return vm_ioctl(engine, KVM_SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING");
}

static int irqfd(struct vmm_engine *engine, int fd, uint32_t gsi)
{
    const struct kvm_irqfd request = {.fd = (uint32_t)fd, .gsi = gsi};
    return vm_ioctl(engine, KVM_IRQFD, &request, "KVM_IRQFD");
}

static int ioeventfd(struct vmm_engine *engine, const struct kvm_ioeventfd *doorbell)
{
    return vm_ioctl(engine, KVM_IOEVENTFD, doorbell, "KVM_IOEVENTFD");
}

/* ---- what guests may be offered ---- */

static int supported_cpuid(struct vmm_engine *engine, struct kvm_cpuid2 *list)
{
    return kvm_ioctl(machine_of(engine)->kvm_fd, KVM_GET_SUPPORTED_CPUID, list, "KVM_GET_SUPPORTED_CPUID");
}

static int msr_indices(struct vmm_engine *engine, struct kvm_msr_list *list)
{
    return kvm_ioctl(machine_of(engine)->kvm_fd, KVM_GET_MSR_INDEX_LIST, list, "KVM_GET_MSR_INDEX_LIST");
}

static int filter_msrs(struct vmm_engine *engine, const struct kvm_msr_filter *filter)
{
    return vm_ioctl(engine, KVM_X86_SET_MSR_FILTER, filter, "KVM_X86_SET_MSR_FILTER");
}

const struct vmm_engine_ops vmm_kvm_engine = {
    .open = open_engine,
    .close = close_engine,
    .capability = capability,
    .enable = enable,
    .create_chips = create_chips,
    .get_chip = get_chip,
    .set_chip = set_chip,
    .get_pit = get_pit,
    .set_pit = set_pit,
    .get_clock = get_clock,
    .set_clock = set_clock,
    .set_memory = set_memory,
    .dirty_log = dirty_log,
    .forget_page_tables = forget_page_tables,
    .line = line,
    .routing = routing,
    .irqfd = irqfd,
    .ioeventfd = ioeventfd,
    .supported_cpuid = supported_cpuid,
    .msr_indices = msr_indices,
    .filter_msrs = filter_msrs,
    .create_vcpu = kvm_create_vcpu,
    .destroy_vcpu = kvm_destroy_vcpu,
    .attach_thread = kvm_attach_thread,
    .run = kvm_run,
    .kick = kvm_kick,
    .get_state = kvm_get_state,
    .set_state = kvm_set_state,
    .get_msrs = kvm_get_msrs,
    .set_msrs = kvm_set_msrs,
    .get_cpuid = kvm_get_cpuid,
    .set_cpuid = kvm_set_cpuid,
    .translate = kvm_translate,
    .guest_debug = kvm_guest_debug,
    .tsc_khz = kvm_tsc_khz,
    .set_tsc_khz = kvm_set_tsc_khz,
    .get_tsc_offset = kvm_get_tsc_offset,
    .set_tsc_offset = kvm_set_tsc_offset,
    .guest_was_stopped = kvm_guest_was_stopped,
    .stats_fd = kvm_stats_fd,
};
