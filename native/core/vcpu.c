/* SPDX-License-Identifier: Apache-2.0 */
/* A vCPU and everything KVM remembers of it; running it is run.c. */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

_Static_assert(sizeof(vmm_regs) == sizeof(struct kvm_regs), "vmm_regs is kvm_regs");
_Static_assert(sizeof(vmm_segment) == sizeof(struct kvm_segment), "vmm_segment is kvm_segment");
_Static_assert(sizeof(vmm_dtable) == sizeof(struct kvm_dtable), "vmm_dtable is kvm_dtable");
_Static_assert(sizeof(vmm_sregs) == sizeof(struct kvm_sregs), "vmm_sregs is kvm_sregs");
_Static_assert(offsetof(vmm_sregs, cr0) == offsetof(struct kvm_sregs, cr0), "vmm_sregs is kvm_sregs");
_Static_assert(offsetof(vmm_regs, rip) == offsetof(struct kvm_regs, rip), "vmm_regs is kvm_regs");
_Static_assert(sizeof(vmm_cpuid_entry) == sizeof(struct kvm_cpuid_entry2),
               "vmm_cpuid_entry is kvm_cpuid_entry2");

#define MAX_MSRS 512  /* KVM_GET_MSR_INDEX_LIST is near 200 */
#define MAX_CPUID 512 /* KVM_MAX_CPUID_ENTRIES is 256 */

_Thread_local struct vmm_vcpu *vmm_current_vcpu;

int vmm_vcpu_create(vmm_vm *vm, uint32_t id, vmm_vcpu **out)
{
    *out = NULL;
    if (vm->n_vcpus == VMM_MAX_VCPUS)
        return vmm_error_set(-ENOSPC, "more than %d vCPUs", VMM_MAX_VCPUS);
    int rc = vmm_vm_create_chips(vm);
    if (rc < 0)
        return rc;
    struct vmm_vcpu *vcpu = calloc(1, sizeof(*vcpu));
    if (!vcpu)
        return vmm_error_set(-ENOMEM, "vCPU");
    vcpu->vm = vm;
    vcpu->id = id;
    vcpu->run = MAP_FAILED;
    vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)id);
    if (vcpu->fd >= 0)
        vcpu->run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    rc = vcpu->run == MAP_FAILED ? vmm_error_errno("KVM_CREATE_VCPU") : 0;
    rc = rc ? rc : vmm_clocks_created(vcpu);
    if (rc == 0 && vm->compat)
        rc = vm->compat->vcpu_init(vcpu);
    if (rc < 0) {
        vmm_vcpu_destroy(vcpu);
        return rc;
    }
    vm->vcpus[vm->n_vcpus++] = vcpu;
    *out = vcpu;
    return vmm_trace_vcpu_init(vcpu);
}

void vmm_vcpu_destroy(struct vmm_vcpu *vcpu)
{
    if (!vcpu)
        return;
    if (vcpu->run != MAP_FAILED)
        munmap(vcpu->run, vcpu->vm->run_size);
    if (vcpu->fd >= 0)
        close(vcpu->fd);
    free(vcpu);
}

int vmm_vcpu_fd(vmm_vcpu *vcpu)
{
    return vcpu->fd;
}

/* ---- registers ---- */

/* Without vm->lock, which a caller may hold: who paused the machine has seen every vCPU park under it. */
static bool runs_elsewhere(const vmm_vcpu *vcpu)
{
    return atomic_load(&vcpu->state) == VMM_VCPU_RUNNING && vcpu != vmm_current_vcpu;
}

/*
 * A vCPU in KVM_RUN keeps everybody else's ioctls waiting until it exits: for ever, if it halts. So of one that runs,
 * only its own thread may ask. With a request made it is about to leave, and the ioctl waits for no more than that.
 */
static int at_rest(const vmm_vcpu *vcpu)
{
    const uint32_t leaving = VMM_REQUEST_STOP | VMM_REQUEST_PAUSE | VMM_REQUEST_DEBUG;
    if (!runs_elsewhere(vcpu) || atomic_load(&vcpu->vm->requests) & leaving)
        return 0;
    return vmm_error_set(-EBUSY, "vCPU %u runs: pause the machine before you look at it", vcpu->id);
}

static int vcpu_ioctl(vmm_vcpu *vcpu, unsigned long request, void *argument, const char *what)
{
    const int rc = vmm_vcpu_give_registers(vcpu);
    return rc < 0 ? rc : ioctl(vcpu->fd, request, argument) < 0 ? vmm_error_errno(what) : 0;
}

/* In the order in which KVM_RUN takes them. */
int vmm_vcpu_give_registers(struct vmm_vcpu *vcpu)
{
    int rc = at_rest(vcpu);
    if (rc < 0 || runs_elsewhere(vcpu)) /* its own thread gives what is left there before it leaves */
        return rc;
    const uint64_t waiting = vcpu->run->kvm_dirty_regs;
    struct kvm_sync_regs *from = &vcpu->run->s.regs;
    vcpu->run->kvm_dirty_regs = 0;
    if (waiting & KVM_SYNC_X86_REGS)
        rc = vcpu_ioctl(vcpu, KVM_SET_REGS, &from->regs, "KVM_SET_REGS");
    if (rc == 0 && waiting & KVM_SYNC_X86_SREGS)
        rc = vcpu_ioctl(vcpu, KVM_SET_SREGS, &from->sregs, "KVM_SET_SREGS");
    if (rc == 0 && waiting & KVM_SYNC_X86_EVENTS)
        rc = vcpu_ioctl(vcpu, KVM_SET_VCPU_EVENTS, &from->events, "KVM_SET_VCPU_EVENTS");
    return rc;
}

int vmm_vcpu_get_regs(vmm_vcpu *vcpu, vmm_regs *regs)
{
    return vcpu_ioctl(vcpu, KVM_GET_REGS, regs, "KVM_GET_REGS");
}

int vmm_vcpu_set_regs(vmm_vcpu *vcpu, const vmm_regs *regs)
{
    return vcpu_ioctl(vcpu, KVM_SET_REGS, (void *)(uintptr_t)regs, "KVM_SET_REGS");
}

int vmm_vcpu_get_sregs(vmm_vcpu *vcpu, vmm_sregs *sregs)
{
    return vcpu_ioctl(vcpu, KVM_GET_SREGS, sregs, "KVM_GET_SREGS");
}

int vmm_vcpu_set_sregs(vmm_vcpu *vcpu, const vmm_sregs *sregs)
{
    return vcpu_ioctl(vcpu, KVM_SET_SREGS, (void *)(uintptr_t)sregs, "KVM_SET_SREGS");
}

int vmm_vcpu_translate(vmm_vcpu *vcpu, uint64_t linear, uint64_t *gpa)
{
    struct kvm_translation t = {.linear_address = linear};
    int rc = vcpu_ioctl(vcpu, KVM_TRANSLATE, &t, "KVM_TRANSLATE");
    if (rc < 0)
        return rc;
    if (!t.valid)
        return vmm_error_set(-EFAULT, "linear address %#llx is not mapped", (unsigned long long)linear);
    *gpa = t.physical_address;
    return 0;
}

/* ---- CPUID and MSRs ---- */

struct cpuid_list {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[MAX_CPUID];
};

int vmm_vm_supported_cpuid(vmm_vm *vm, vmm_cpuid_entry *entries, uint32_t max)
{
    struct cpuid_list list = {.head.nent = MAX_CPUID};
    if (ioctl(vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, &list) < 0)
        return vmm_error_errno("KVM_GET_SUPPORTED_CPUID");
    if (list.head.nent > max)
        return vmm_error_set(-E2BIG, "KVM_GET_SUPPORTED_CPUID has %u entries", list.head.nent);
    memcpy(entries, list.entries, list.head.nent * sizeof(*entries));
    return (int)list.head.nent;
}

int vmm_vcpu_set_cpuid(vmm_vcpu *vcpu, const vmm_cpuid_entry *entries, uint32_t n)
{
    struct cpuid_list list = {.head.nent = n};
    if (n > MAX_CPUID)
        return vmm_error_set(-E2BIG, "%u CPUID entries", n);
    memcpy(list.entries, entries, n * sizeof(*entries));
    return vcpu_ioctl(vcpu, KVM_SET_CPUID2, &list, "KVM_SET_CPUID2");
}

struct msr_list {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[MAX_MSRS];
};

static int msrs(vmm_vcpu *vcpu, unsigned long request, const uint32_t *index, uint64_t *value, uint32_t n)
{
    struct msr_list list = {.head.nmsrs = n};
    if (n > MAX_MSRS)
        return vmm_error_set(-E2BIG, "%u MSRs", n);
    const int rc = vmm_vcpu_give_registers(vcpu); /* EFER and the APIC's base are among both */
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < n; i++)
        list.entries[i] = (struct kvm_msr_entry){.index = index[i], .data = value[i]};
    int taken = ioctl(vcpu->fd, request, &list);
    if (taken < 0)
        return vmm_error_errno(request == KVM_GET_MSRS ? "KVM_GET_MSRS" : "KVM_SET_MSRS");
    for (int i = 0; i < taken; i++)
        value[i] = list.entries[i].data;
    return taken;
}

int vmm_vcpu_get_msrs(vmm_vcpu *vcpu, const uint32_t *index, uint64_t *value, uint32_t n)
{
    memset(value, 0, n * sizeof(*value));
    return msrs(vcpu, KVM_GET_MSRS, index, value, n);
}

int vmm_vcpu_set_msrs(vmm_vcpu *vcpu, const uint32_t *index, const uint64_t *value, uint32_t n)
{
    return msrs(vcpu, KVM_SET_MSRS, index, (uint64_t *)(uintptr_t)value, n);
}

/* ---- the rest of KVM's state, by kind ---- */

struct state_kind {
    unsigned long get, set;
    uint16_t size;
    uint8_t chip; /* irqchip number, which the caller's struct carries as its first word */
    const char *name;
};

#define STATE(kind, noun, type) [kind] = {KVM_GET_##noun, KVM_SET_##noun, sizeof(struct type), 0, #noun}
#define CHIP(kind, n) [kind] = {KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, sizeof(struct kvm_irqchip), n, "IRQCHIP"}

static const struct state_kind state_kinds[] = {
    STATE(VMM_STATE_MP, MP_STATE, kvm_mp_state),
    STATE(VMM_STATE_EVENTS, VCPU_EVENTS, kvm_vcpu_events),
    STATE(VMM_STATE_DEBUGREGS, DEBUGREGS, kvm_debugregs),
    STATE(VMM_STATE_LAPIC, LAPIC, kvm_lapic_state),
    STATE(VMM_STATE_FPU, FPU, kvm_fpu),
    STATE(VMM_STATE_XSAVE, XSAVE, kvm_xsave),
    STATE(VMM_STATE_XCRS, XCRS, kvm_xcrs),
    STATE(VMM_STATE_CLOCK, CLOCK, kvm_clock_data),
    [VMM_STATE_PIT] = {KVM_GET_PIT2, KVM_SET_PIT2, sizeof(struct kvm_pit_state2), 0, "PIT2"},
    CHIP(VMM_STATE_PIC_MASTER, KVM_IRQCHIP_PIC_MASTER),
    CHIP(VMM_STATE_PIC_SLAVE, KVM_IRQCHIP_PIC_SLAVE),
    CHIP(VMM_STATE_IOAPIC, KVM_IRQCHIP_IOAPIC),
};

int vmm_state_size(int kind)
{
    size_t n = sizeof(state_kinds) / sizeof(state_kinds[0]);
    return kind >= 0 && (size_t)kind < n && state_kinds[kind].size ? state_kinds[kind].size : -EINVAL;
}

static int state(int fd, int kind, void *buffer, size_t size, bool set, bool machine)
{
    int expected = vmm_state_size(kind);
    if (expected < 0 || (kind >= VMM_STATE_CLOCK) != machine)
        return vmm_error_set(-EINVAL, "state kind %d", kind);
    const struct state_kind *k = &state_kinds[kind];
    if (size != (size_t)expected)
        return vmm_error_set(-EMSGSIZE, "%s state is %d bytes, not %zu", k->name, expected, size);
    if (k->get == KVM_GET_IRQCHIP)
        memcpy(buffer, &(uint32_t){k->chip}, sizeof(uint32_t));
    return ioctl(fd, set ? k->set : k->get, buffer) < 0 ? vmm_error_errno(k->name) : 0;
}

int vmm_vcpu_get_state(vmm_vcpu *vcpu, int kind, void *buffer, size_t size)
{
    const int rc = vmm_vcpu_give_registers(vcpu);
    return rc ? rc : state(vcpu->fd, kind, buffer, size, false, false);
}

/* A private copy: the irqchip's number is written into it, and the caller's bytes are const. */
static int set_copy(int fd, int kind, const void *buffer, size_t size, bool machine)
{
    _Alignas(64) uint8_t copy[sizeof(struct kvm_xsave)];
    if (size > sizeof(copy))
        return vmm_error_set(-EMSGSIZE, "state of %zu bytes", size);
    memcpy(copy, buffer, size);
    return state(fd, kind, copy, size, true, machine);
}

int vmm_vcpu_set_state(vmm_vcpu *vcpu, int kind, const void *buffer, size_t size)
{
    const int rc = vmm_vcpu_give_registers(vcpu);
    return rc ? rc : set_copy(vcpu->fd, kind, buffer, size, false);
}

int vmm_vm_get_state(vmm_vm *vm, int kind, void *buffer, size_t size)
{
    return state(vm->fd, kind, buffer, size, false, true);
}

int vmm_vm_set_state(vmm_vm *vm, int kind, const void *buffer, size_t size)
{
    return set_copy(vm->fd, kind, buffer, size, true);
}
