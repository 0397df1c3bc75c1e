/* SPDX-License-Identifier: Apache-2.0 */
/* All that KVM keeps of a machine's processors, read and set in the one order that works. */
#include "time/state.h"
#include "time/clocks.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <x86intrin.h>

#define SAME(ours, theirs) _Static_assert(sizeof(ours) == sizeof(struct theirs), #ours " is " #theirs)
SAME(vmm_events, kvm_vcpu_events);
SAME(vmm_debug_registers, kvm_debugregs);
SAME(vmm_pic, kvm_pic_state);
SAME(vmm_ioapic, kvm_ioapic_state);
SAME(vmm_pit_channel, kvm_pit_channel_state);
SAME(vmm_pit, kvm_pit_state2);
_Static_assert(offsetof(vmm_events, exception_payload) ==
                       offsetof(struct kvm_vcpu_events, exception_payload) &&
                   offsetof(vmm_events, smi_smm) == offsetof(struct kvm_vcpu_events, smi),
               "vmm_events is kvm_vcpu_events");
_Static_assert(sizeof(((vmm_vcpu_state *)0)->lapic) == sizeof(struct kvm_lapic_state) &&
                   sizeof(((vmm_vcpu_state *)0)->xsave) == sizeof(struct kvm_xsave),
               "architectural areas");

enum {
    MSR_TSC = 0x10,
    MSR_TSC_DEADLINE = 0x6e0,
    MSR_TSC_AUX = 0xc0000103,
    MSR_HV_RUNTIME = 0x40000010,    /* the host thread's time */
    MSR_HV_TIME_COUNT = 0x40000020, /* kvmclock in other units */
    MSR_WALL_CLOCK_OLD = 0x11,
    MSR_WALL_CLOCK = 0x4b564d00,
    WALL_CLOCK_SIZE = 12,        /* struct pvclock_wall_clock: Documentation/virt/kvm/x86/msr.rst */
    MSR_MTRR_PHYS_FIRST = 0x200, /* base and mask of 8 */
    MSR_MTRR_PHYS_LAST = 0x20f,
    MSR_MTRR_DEFAULT = 0x2ff,
    MSR_MC0_CTL = 0x400, /* control, status, address and misc of each bank (SDM vol. 3, 16.3.2) */
    MC_BANKS_MAX = 32,   /* KVM_MAX_MCE_BANKS */
};

/* Clocks are not saved as MSRs, but as of one moment (clocks.c); some are another clock's other name. */
static bool is_clock(uint32_t index)
{
    return index == MSR_TSC || index == MSR_TSC_DEADLINE || index == MSR_HV_RUNTIME ||
           index == MSR_HV_TIME_COUNT;
}

/* What the processor is, rather than what it is doing: it may differ where the state is loaded. */
static bool informs(uint32_t index)
{
    switch (index) {
    case 0x17:  /* IA32_PLATFORM_ID */
    case 0x8b:  /* IA32_BIOS_SIGN_ID */
    case 0xce:  /* MSR_PLATFORM_INFO */
    case 0x10a: /* IA32_ARCH_CAPABILITIES */
    case 0x179: /* IA32_MCG_CAP */
    case 0x345: /* IA32_PERF_CAPABILITIES */
        return true;
    default:
        return index >= 0x480 && index <= 0x492; /* IA32_VMX_*: capabilities of nested virtualization */
    }
}

struct msr_list {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[VMM_STATE_MSRS_MAX + 2];
};

/* ---- which MSRs there are ---- */

static bool readable(const struct vmm_vcpu *vcpu, uint32_t index)
{
    struct msr_list one = {.head.nmsrs = 1, .entries[0].index = index};
    return vcpu->engine->ops->get_msrs(vcpu->engine, &one.head) == 1;
}

static void add_msr(const struct vmm_vcpu *vcpu, uint32_t index)
{
    struct vmm_vm *vm = vcpu->vm;
    if (vm->n_msrs == VMM_STATE_MSRS_MAX || is_clock(index) || !readable(vcpu, index))
        return;
    for (uint32_t i = 0; i < vm->n_msrs; i++)
        if (vm->msrs[i] == index)
            return;
    vm->msrs[vm->n_msrs++] = index;
}

/* What KVM has, but leaves out of its list: some of its versions do, or all (banks of machine checks, MTRRs). */
static const uint32_t unlisted[] = {
    MSR_TSC_AUX,
    0x48,  /* IA32_SPEC_CTRL */
    0x122, /* IA32_TSX_CTRL */
    0x1d9, /* IA32_DEBUGCTL */
    0xda0, /* IA32_XSS */
    MSR_MTRR_DEFAULT,
};

static const struct {
    uint32_t first, last;
} unlisted_ranges[] = {
    {MSR_MTRR_PHYS_FIRST, MSR_MTRR_PHYS_LAST},
    {0x250, 0x250}, /* MTRRs of fixed ranges: 64, 16 and 4 KiB */
    {0x258, 0x259},
    {0x268, 0x26f},
    {MSR_MC0_CTL, MSR_MC0_CTL + 4 * MC_BANKS_MAX - 1},
};

int vmm_vm_saved_msrs(vmm_vm *vm, uint32_t *indices, uint32_t max)
{
    struct {
        struct kvm_msr_list head;
        uint32_t indices[VMM_STATE_MSRS_MAX];
    } list = {.head.nmsrs = VMM_STATE_MSRS_MAX};
    uint32_t n = 0;
    const int rc = vm->engine->ops->msr_indices(vm->engine, &list.head);
    if (rc < 0)
        return rc;
    if (list.head.nmsrs + VMM_UNLISTED_MSRS > max)
        return vmm_error_set(-E2BIG, "KVM_GET_MSR_INDEX_LIST has %u entries", list.head.nmsrs);
    for (uint32_t i = 0; i < list.head.nmsrs; i++)
        indices[n++] = list.indices[i];
    for (size_t i = 0; i < sizeof(unlisted) / sizeof(unlisted[0]); i++)
        indices[n++] = unlisted[i];
    for (size_t i = 0; i < sizeof(unlisted_ranges) / sizeof(unlisted_ranges[0]); i++)
        for (uint32_t index = unlisted_ranges[i].first; index <= unlisted_ranges[i].last; index++)
            indices[n++] = index;
    return (int)n;
}

_Static_assert(sizeof(unlisted) / sizeof(unlisted[0]) + (MSR_MTRR_PHYS_LAST - MSR_MTRR_PHYS_FIRST + 1) + 11 +
                       4 * MC_BANKS_MAX ==
                   VMM_UNLISTED_MSRS,
               "as many as vmmcore.h says");

static int find_msrs(const struct vmm_vcpu *vcpu)
{
    uint32_t indices[VMM_STATE_MSRS_MAX];
    struct vmm_vm *vm = vcpu->vm;
    if (vm->msrs)
        return 0;
    const int n = vmm_vm_saved_msrs(vm, indices, VMM_STATE_MSRS_MAX);
    if (n < 0)
        return n;
    vm->msrs = calloc(VMM_STATE_MSRS_MAX, sizeof(*vm->msrs));
    if (!vm->msrs)
        return vmm_error_set(-ENOMEM, "no memory for the list of MSRs");
    for (int i = 0; i < n; i++)
        add_msr(vcpu, indices[i]);
    return 0;
}

/* ---- one vCPU ---- */

/* The MSRs, then TSC and deadline behind them; *read_at is the host's TSC beside the guest's. */
static int read_msrs(const struct vmm_vcpu *vcpu, struct msr_list *list, uint64_t *read_at)
{
    const struct vmm_vm *vm = vcpu->vm;
    const uint32_t n = vm->n_msrs;
    for (uint32_t i = 0; i < n; i++)
        list->entries[i].index = vm->msrs[i];
    list->entries[n].index = MSR_TSC;
    list->entries[n + 1].index = MSR_TSC_DEADLINE;
    list->head.nmsrs = n + 2;
    *read_at = __rdtsc();
    const int got = vcpu->engine->ops->get_msrs(vcpu->engine, &list->head);
    if (got == (int)n + 1) /* a machine without the deadline timer */
        list->entries[n + 1].data = 0;
    return got > (int)n ? 0 : vmm_error_set(-EIO, "KVM_GET_MSRS gave %d of %u", got, n + 2);
}

static int save_vcpu(struct vmm_vcpu *vcpu, const struct vmm_moment *at, vmm_vcpu_state *to)
{
    struct msr_list msrs;
    struct kvm_xcrs xcrs;
    struct kvm_mp_state mp;
    uint64_t read_at;
    memset(to, 0, sizeof(*to));
    int rc = vmm_vcpu_flush_registers(vcpu);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_REGS, &to->regs);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_SREGS, &to->sregs);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_EVENTS, &to->events);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_DEBUGREGS, &to->debug);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_MP, &mp);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_XCRS, &xcrs);
    rc = rc ? rc : vmm_engine_get(vcpu->engine, VMM_STATE_XSAVE, to->xsave);
    rc = rc ? rc : read_msrs(vcpu, &msrs, &read_at);
    if (rc == 0 && vcpu->vm->has_chips)
        rc = vmm_engine_get(vcpu->engine, VMM_STATE_LAPIC, to->lapic);
    if (rc < 0)
        return rc;
    to->mp_state = mp.mp_state;
    to->xcr0 = xcrs.nr_xcrs ? xcrs.xcrs[0].value : 1;
    to->n_msrs = vcpu->vm->n_msrs;
    for (uint32_t i = 0; i < to->n_msrs; i++)
        to->msrs[i] = (vmm_msr){
            .index = msrs.entries[i].index,
            .value = vmm_msr_for_guest(vcpu, msrs.entries[i].index, msrs.entries[i].data),
        };
    vmm_clocks_save_tsc(vcpu, at, msrs.entries[to->n_msrs].data, read_at, to);
    to->tsc_deadline = msrs.entries[to->n_msrs + 1].data;
    return 0;
}

/* ---- translations ---- */

#define PAGE_SIZE 4096u

/* The processor's own: KVM has it forget them when it is given another CR3, but not when it is given the same. All else
 * is as it will be. */
static int forget_translations(const struct vmm_vcpu *vcpu, const vmm_vcpu_state *next)
{
    vmm_sregs other;
    memcpy(&other, &next->sregs, sizeof(other));
    other.cr3 ^= PAGE_SIZE;
    return vmm_engine_set(vcpu->engine, VMM_STATE_SREGS, &other);
}

/* ---- one vCPU: back ---- */

static const struct kvm_msr_entry *entry_of(const struct msr_list *list, uint32_t n, uint32_t index)
{
    for (uint32_t i = 0; i < n; i++)
        if (list->entries[i].index == index)
            return &list->entries[i];
    return NULL;
}

static void add(struct msr_list *list, uint32_t index, uint64_t value)
{
    list->entries[list->head.nmsrs++] = (struct kvm_msr_entry){.index = index, .data = value};
}

/* Those that are not as in `now` (NULL: all). */
static int set_msrs(const struct vmm_vcpu *vcpu, const vmm_vcpu_state *from, const struct msr_list *now)
{
    struct msr_list set = {.head.nmsrs = 0};
    for (uint32_t i = 0; i < from->n_msrs; i++) {
        const uint32_t index = from->msrs[i].index;
        const uint64_t value = vmm_msr_for_kvm(vcpu, index, from->msrs[i].value);
        const struct kvm_msr_entry *is = now ? entry_of(now, vcpu->vm->n_msrs, index) : NULL;
        if (!informs(index) && !is_clock(index) && (!is || is->data != value))
            add(&set, index, value);
    }
    const int done = vcpu->engine->ops->set_msrs(vcpu->engine, &set.head);
    if (done < 0)
        return done;
    return done == (int)set.head.nmsrs
               ? 0
               : vmm_error_set(-EINVAL, "KVM refuses %#llx for MSR %#x",
                               (unsigned long long)set.entries[done].data, set.entries[done].index);
}

/* Where KVM writes the time of day into guest memory when the MSR that says so is written. NULL: nowhere. */
static void *wall_clock(const struct vmm_vcpu *vcpu, const vmm_vcpu_state *state)
{
    for (uint32_t i = 0; i < state->n_msrs; i++)
        if ((state->msrs[i].index == MSR_WALL_CLOCK || state->msrs[i].index == MSR_WALL_CLOCK_OLD) &&
            state->msrs[i].value)
            return vmm_vm_gpa(vcpu->vm, state->msrs[i].value, WALL_CLOCK_SIZE);
    return NULL;
}

/* Those that differ: also where KVM refuses a value that it gave, which is no matter if it has it still. */
static int load_other_msrs(const struct vmm_vcpu *vcpu, const vmm_vcpu_state *from)
{
    struct msr_list now;
    uint64_t read_at;
    int rc = find_msrs(vcpu);
    rc = rc ? rc : read_msrs(vcpu, &now, &read_at);
    return rc ? rc : set_msrs(vcpu, from, &now);
}

/* All of them, unasked: a call less, which are what a roll-back mostly is. Where one writes memory, which is as it should
 * be already, that is put back. */
static int load_msrs(const struct vmm_vcpu *vcpu, const vmm_vcpu_state *from)
{
    uint8_t kept[WALL_CLOCK_SIZE];
    void *written = wall_clock(vcpu, from);
    if (!written && set_msrs(vcpu, from, NULL) == 0)
        return 0;
    if (written)
        memcpy(kept, written, sizeof(kept));
    const int rc = load_other_msrs(vcpu, from);
    if (written)
        memcpy(written, kept, sizeof(kept));
    return rc;
}

/*
 * Registers, segments and events may go in with the next entry, which costs nothing: each call does, and a roll-back is
 * mostly calls. Not where the vCPU waits for others to start it, which comes before that in KVM_RUN, nor for a debugger,
 * which is told where KVM believes the vCPU to be.
 */
static bool may_wait(const struct vmm_vcpu *vcpu, const vmm_vcpu_state *from)
{
    return vcpu->vm->sync_regs && !vcpu->vm->debug.open && from->mp_state == KVM_MP_STATE_RUNNABLE;
}

static void leave_registers(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from)
{
    struct kvm_sync_regs *to = &vcpu->run->s.regs;
    memcpy(&to->regs, &from->regs, sizeof(to->regs));
    memcpy(&to->sregs, &from->sregs, sizeof(to->sregs));
    memcpy(&to->events, &from->events, sizeof(to->events));
    vcpu->run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
}

static int set_registers(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from)
{
    int rc = vmm_engine_set(vcpu->engine, VMM_STATE_SREGS, &from->sregs);
    rc = rc ? rc : vmm_engine_set(vcpu->engine, VMM_STATE_REGS, &from->regs);
    return rc ? rc : vmm_engine_set(vcpu->engine, VMM_STATE_EVENTS, &from->events);
}

/*
 * A host without XSAVE has no XCR0, and KVM gives 1 for it (x87) but takes nothing. Asked only when KVM refuses: a
 * roll-back need not wait for it.
 */
static int load_xcr0(struct vmm_vcpu *vcpu, uint64_t value)
{
    const struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs[0].value = value};
    const int rc = vmm_engine_set(vcpu->engine, VMM_STATE_XCRS, &xcrs);
    if (rc == 0 || vmm_vm_check_extension(vcpu->vm, KVM_CAP_XCRS))
        return rc;
    return value == 1 ? 0
                      : vmm_error_set(
                            -ENOTSUP,
                            "the guest's XCR0 is %#llx, and this host's processor has no XSAVE: go on where "
                            "it has",
                            (unsigned long long)value);
}

/*
 * SREGS before LAPIC (the APIC's mode is in its base register), LAPIC before the deadline, REGS before EVENTS. `known`:
 * KVM gave this state to us, and will not find fault with it.
 */
static int load_vcpu(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from, const struct vmm_moment *at,
                     bool known)
{
    const struct kvm_mp_state mp = {.mp_state = from->mp_state};
    uint64_t beyond;
    if (from->n_msrs > VMM_STATE_MSRS_MAX)
        return vmm_error_set(-EINVAL, "a vCPU's state has %u MSRs, more than there are", from->n_msrs);
    vcpu->run->kvm_dirty_regs = 0;
    int rc = forget_translations(vcpu, from);
    rc = rc ? rc : load_xcr0(vcpu, from->xcr0);
    rc = rc ? rc : vmm_engine_set(vcpu->engine, VMM_STATE_XSAVE, from->xsave);
    rc = rc ? rc : load_msrs(vcpu, from);
    rc = rc ? rc : vmm_clocks_load_tsc(vcpu, from, at, &beyond);
    if (rc == 0 && vcpu->vm->has_chips)
        rc = vmm_engine_set(vcpu->engine, VMM_STATE_LAPIC, from->lapic);
    rc = rc ? rc : vmm_clocks_load_deadline(vcpu, from, beyond);
    rc = rc ? rc : vmm_engine_set(vcpu->engine, VMM_STATE_DEBUGREGS, &from->debug);
    rc = rc ? rc : vmm_engine_set(vcpu->engine, VMM_STATE_MP, &mp);
    const bool wait = known && may_wait(vcpu, from);
    if (rc == 0 && !wait)
        rc = set_registers(vcpu, from);
    vcpu->unsettled = false;
    if (rc == 0 && vcpu->vm->compat && vcpu->vm->compat->loaded)
        vcpu->vm->compat->loaded(vcpu, from);
    if (rc == 0 && wait)
        leave_registers(vcpu, from);
    return rc;
}

/* ---- chips ---- */

static int move_chip(struct vmm_vm *vm, bool set, uint32_t id, void *state, size_t size)
{
    struct kvm_irqchip chip = {.chip_id = id};
    memcpy(&chip.chip, state, size);
    const int rc =
        set ? vm->engine->ops->set_chip(vm->engine, &chip) : vm->engine->ops->get_chip(vm->engine, &chip);
    if (rc == 0)
        memcpy(state, &chip.chip, size);
    return rc;
}

/* The slave first: KVM looks at both whenever one is set, and an input of the slave's would come to the new master. */
static int move_chips(struct vmm_vm *vm, bool set, vmm_chips_state *chips)
{
    int rc = move_chip(vm, set, KVM_IRQCHIP_PIC_SLAVE, &chips->pic[1], sizeof(chips->pic[1]));
    rc = rc ? rc : move_chip(vm, set, KVM_IRQCHIP_PIC_MASTER, &chips->pic[0], sizeof(chips->pic[0]));
    return rc ? rc : move_chip(vm, set, KVM_IRQCHIP_IOAPIC, &chips->ioapic, sizeof(chips->ioapic));
}

/* vmm_pit is struct kvm_pit_state2, but for its alignment. */
static int save_pit(struct vmm_vm *vm, vmm_chips_state *to)
{
    struct kvm_pit_state2 pit = {0};
    const int rc = to->has_pit ? vm->engine->ops->get_pit(vm->engine, &pit) : 0;
    memcpy(&to->pit, &pit, sizeof(to->pit));
    return rc;
}

static int save_chips(struct vmm_vm *vm, vmm_chips_state *to)
{
    memset(to, 0, sizeof(*to));
    to->has_irqchip = vm->has_chips;
    to->has_pit = vm->has_chips && (vm->flags & VMM_VM_PIT);
    const int rc = save_pit(vm, to);
    return rc || !to->has_irqchip ? rc : move_chips(vm, false, to);
}

static int load_chips(struct vmm_vm *vm, const vmm_chips_state *from)
{
    vmm_chips_state copy = *from;
    if (from->has_irqchip != vm->has_chips || from->has_pit != (vm->has_chips && (vm->flags & VMM_VM_PIT)))
        return vmm_error_set(-EINVAL, "the state is of a machine with other interrupt controllers or timers");
    return from->has_irqchip ? move_chips(vm, true, &copy) : 0;
}

/* Last of all: it runs from here on, and its tick must find the controllers it is for. */
static int load_pit(struct vmm_vm *vm, const vmm_chips_state *from)
{
    struct kvm_pit_state2 pit;
    memcpy(&pit, &from->pit, sizeof(pit));
    return from->has_pit ? vm->engine->ops->set_pit(vm->engine, &pit) : 0;
}

/* ---- all of it ---- */

int vmm_vm_save(vmm_vm *vm, vmm_vcpu_state *vcpus, vmm_chips_state *chips)
{
    struct vmm_moment at = {0};
    int rc = vm->n_vcpus ? find_msrs(vm->vcpus[0]) : 0;
    rc = rc ? rc : save_chips(vm, chips);
    rc = rc ? rc : vmm_clocks_save(vm, chips, &at);
    for (uint32_t i = 0; i < vm->n_vcpus && rc == 0; i++)
        rc = save_vcpu(vm->vcpus[i], &at, &vcpus[i]);
    return rc;
}

/* `known`: KVM gave the state to us; `remapped`: page tables may have been written since; `ahead`: clocks go on with the
 * host's. */
static int load(struct vmm_vm *vm, const vmm_vcpu_state *vcpus, const vmm_chips_state *chips, bool remapped,
                bool known, bool ahead)
{
    struct vmm_moment at = {0};
    int rc = remapped && vm->shadow_paging ? vm->engine->ops->forget_page_tables(vm->engine) : 0;
    rc = rc ? rc : load_chips(vm, chips);
    rc = rc ? rc : vmm_clocks_load(vm, chips, ahead, &at);
    for (uint32_t i = 0; i < vm->n_vcpus && rc == 0; i++)
        rc = load_vcpu(vm->vcpus[i], &vcpus[i], &at, known);
    for (uint32_t i = 0; i < vm->n_vcpus && rc == 0 && ahead; i++)
        vmm_clocks_jumped(vm->vcpus[i]);
    return rc ? rc : load_pit(vm, chips);
}

int vmm_vm_roll_back(struct vmm_vm *vm, const vmm_vcpu_state *vcpus, const vmm_chips_state *chips,
                     bool remapped)
{
    return load(vm, vcpus, chips, remapped, true, false);
}

int vmm_vm_load(vmm_vm *vm, const vmm_vcpu_state *vcpus, const vmm_chips_state *chips, int ahead)
{
    return load(vm, vcpus, chips, vm->ran, false,
                ahead); /* before any guest's instruction nothing was copied */
}
