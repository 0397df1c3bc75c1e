/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The clocks of a machine: kvmclock, each vCPU's TSC, the deadline of its timer. They are read as of one moment and set
 * as of one, so that they agree as they did and every vCPU of a machine gets the same offset: only then does KVM know
 * its TSCs to be one, and gives all vCPUs one kvmclock (its "master clock").
 *
 * KVM keeps a guest's TSC in one of three ways. Mostly it is the host's, scaled, and an offset, which is set by
 * KVM_VCPU_TSC_OFFSET (Documentation/virt/kvm/devices/vcpu.rst), or by writes of the MSR before Linux 5.16. Where the
 * host's TSCs are not trusted, a vCPU's stands still while it does not run, and catches up with kvmclock when it enters
 * the guest again. And there are hosts on which it is the host's, whatever is set.
 */
#include "time/clocks.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include <x86intrin.h>

enum {
    MSR_TSC = 0x10,
    MSR_TSC_DEADLINE = 0x6e0,
    RATE_PPM = 250, /* KVM's tsc_tolerance_ppm: rates that near are one */
    NS_PER_MS = 1000000,
};

#define NS_PER_S 1000000000ull
#define TSC_NEAR (1ull << 20) /* ticks: less than that, and a TSC is where it was set */

static uint64_t ticks_in(uint64_t ns, uint32_t khz)
{
    return (uint64_t)((unsigned __int128)ns * khz / NS_PER_MS);
}

static uint64_t real_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static int read_clock(const struct vmm_vm *vm, struct kvm_clock_data *clock)
{
    memset(clock, 0, sizeof(*clock));
    return vm->engine->ops->get_clock(vm->engine, clock);
}

/* ---- one vCPU's TSC ---- */

static bool offset_of(const struct vmm_vcpu *vcpu, uint64_t *offset)
{
    return vcpu->engine->ops->get_tsc_offset(vcpu->engine, offset) == 0;
}

static uint32_t rate_of(const struct vmm_vcpu *vcpu)
{
    return vcpu->engine->ops->tsc_khz(vcpu->engine);
}

/* The guest's ticks in so many of the host's; a span may be negative. */
static uint64_t scaled_span(const struct vmm_vcpu *vcpu, uint64_t host_ticks)
{
    if (!vcpu->scaled_khz)
        return host_ticks;
    const __int128 span = (__int128)(int64_t)host_ticks * vcpu->scaled_khz / vcpu->vm->host_khz;
    return (uint64_t)span;
}

int vmm_clocks_created(struct vmm_vcpu *vcpu)
{
    struct vmm_vm *vm = vcpu->vm;
    struct kvm_clock_data clock;
    if (vm->n_vcpus)
        return 0;
    vm->host_khz = rate_of(vcpu);
    const int rc = read_clock(vm, &clock);
    vm->clock_set = clock.clock;
    vm->tsc_set = 0; /* as KVM makes it */
    return rc;
}

/* ---- saving ---- */

int vmm_clocks_save(struct vmm_vm *vm, vmm_chips_state *to, struct vmm_moment *at)
{
    struct kvm_clock_data clock;
    const int rc = read_clock(vm, &clock);
    if (rc < 0)
        return rc;
    const bool paired = clock.flags & KVM_CLOCK_HOST_TSC;
    at->host_tsc = paired ? clock.host_tsc : __rdtsc();
    at->clock = to->clock = clock.clock;
    to->realtime = clock.flags & KVM_CLOCK_REALTIME ? clock.realtime : real_now();
    return 0;
}

/* Where a TSC stands still that does not run: what KVM will have it catch up with. */
static uint64_t caught_up(const struct vmm_vcpu *vcpu, const struct vmm_moment *at, uint64_t stands_at)
{
    const struct vmm_vm *vm = vcpu->vm;
    const uint64_t due = vm->tsc_set + ticks_in(at->clock - vm->clock_set, rate_of(vcpu));
    return (int64_t)(due - stands_at) > 0 ? due : stands_at;
}

void vmm_clocks_save_tsc(const struct vmm_vcpu *vcpu, const struct vmm_moment *at, uint64_t value,
                         uint64_t read_at, vmm_vcpu_state *to)
{
    uint64_t offset, again;
    to->tsc_khz = rate_of(vcpu);
    if (!offset_of(vcpu, &offset))
        to->tsc = value - scaled_span(vcpu, read_at - at->host_tsc);
    else if (offset_of(vcpu, &again) && again != offset) /* it stands still: by another offset each time */
        to->tsc = caught_up(vcpu, at, value);
    else if (vcpu->scaled_khz)
        to->tsc = value - scaled_span(vcpu, read_at - at->host_tsc);
    else
        to->tsc = at->host_tsc + offset;
}

/* ---- loading ---- */

int vmm_clocks_load(struct vmm_vm *vm, const vmm_chips_state *from, bool ahead, struct vmm_moment *at)
{
    struct kvm_clock_data clock = {.clock = from->clock};
    if (ahead && vmm_vm_check_extension(vm, KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_REALTIME) {
        clock.flags = KVM_CLOCK_REALTIME; /* KVM adds the time since then, if there was any */
        clock.realtime = from->realtime;
    } else if (ahead) {
        const uint64_t now = real_now();
        clock.clock += now > from->realtime ? now - from->realtime : 0;
    }
    int rc = vm->engine->ops->set_clock(vm->engine, &clock);
    if (rc < 0)
        return rc;
    at->host_tsc =
        __rdtsc(); /* if they are no pair: rather before kvmclock, which must not get ahead of the TSC */
    rc = read_clock(vm, &clock);
    if (rc < 0)
        return rc;
    if (clock.flags & KVM_CLOCK_HOST_TSC)
        at->host_tsc = clock.host_tsc;
    at->clock = clock.clock;
    at->passed = (int64_t)(clock.clock - from->clock) > 0 ? clock.clock - from->clock : 0;
    return 0;
}

/* The rate that the guest has measured, or was told, where it was saved on another host. Without scaling KVM goes on at
 * its own. */
static int set_rate(struct vmm_vcpu *vcpu, uint32_t khz)
{
    const int64_t host = vcpu->vm->host_khz, off = (int64_t)khz - host;
    const bool near = (off < 0 ? -off : off) * 1000000 <= host * RATE_PPM;
    if (!khz || khz == rate_of(vcpu))
        return 0;
    if (vmm_vm_check_extension(vcpu->vm, KVM_CAP_TSC_CONTROL) > 0 &&
        vcpu->engine->ops->set_tsc_khz(vcpu->engine, khz) == 0) {
        vcpu->scaled_khz = near || !host ? 0 : khz; /* KVM does not scale to one so near either */
        return 0;
    }
    return near && !vcpu->scaled_khz
               ? 0
               : vmm_error_set(-EOPNOTSUPP,
                               "the guest\'s TSC counts at %g MHz and this host's at %g MHz, and it cannot "
                               "scale: use a host with TSC scaling, or with a TSC of the same rate",
                               (double)khz / 1e3, (double)host / 1e3);
}

static int get_tsc(struct vmm_vcpu *vcpu, uint64_t *value)
{
    const uint32_t index = MSR_TSC;
    return vmm_vcpu_get_msrs(vcpu, &index, value, 1) == 1 ? 0 : vmm_error_set(-EINVAL, "KVM has no TSC");
}

/*
 * A write near to what KVM expects it takes for an attempt to synchronize vCPUs and rounds to the first one's: that is
 * what the others want, and the first does not, so it is moved far away before.
 */
static int write_tsc(struct vmm_vcpu *vcpu, uint64_t target, const struct vmm_moment *at)
{
    const uint32_t tsc = MSR_TSC;
    uint64_t value = target ^ 1ull << 62;
    if (vcpu == vcpu->vm->vcpus[0] && vmm_vcpu_set_msrs(vcpu, &tsc, &value, 1) != 1)
        return vmm_error_set(-EINVAL, "KVM refuses a TSC");
    value = target + scaled_span(vcpu, __rdtsc() - at->host_tsc);
    return vmm_vcpu_set_msrs(vcpu, &tsc, &value, 1) == 1 ? 0 : vmm_error_set(-EINVAL, "KVM refuses a TSC");
}

/* What KVM made of the host's TSC at that moment, without offset. */
static int scaled_tsc(struct vmm_vcpu *vcpu, const struct vmm_moment *at, uint64_t offset, uint64_t *value)
{
    if (!vcpu->scaled_khz) {
        *value = at->host_tsc;
        return 0;
    }
    const int rc = get_tsc(vcpu, value);
    *value -= offset + scaled_span(vcpu, __rdtsc() - at->host_tsc);
    return rc;
}

/* It has counted what it did not take: all vCPUs are out of step for it until they were given one offset. */
static int leave_offsets(struct vmm_vm *vm, uint64_t offset)
{
    vm->tsc_fixed = true;
    int rc = 0;
    for (uint32_t i = 0; i < vm->n_vcpus && rc == 0; i++)
        rc = vm->vcpus[i]->engine->ops->set_tsc_offset(vm->vcpus[i]->engine, offset);
    return rc;
}

/* By the offset. KVM says whether it took it once, and is not asked again: a roll-back is mostly calls. */
static int set_offset(struct vmm_vcpu *vcpu, uint64_t before, uint64_t wanted, uint64_t *beyond)
{
    struct vmm_vm *vm = vcpu->vm;
    uint64_t after;
    if (vm->tsc_fixed) {
        *beyond = before - wanted;
        return 0;
    }
    const int rc = vcpu->engine->ops->set_tsc_offset(vcpu->engine, wanted);
    if (rc < 0)
        return rc;
    if (vm->tsc_settable || before == wanted || !offset_of(vcpu, &after))
        return 0;
    vm->tsc_settable = after != before;
    *beyond = vm->tsc_settable ? 0 : before - wanted;
    return vm->tsc_settable ? 0 : leave_offsets(vm, before);
}

/* By writing it, where that is all there is. */
static int set_value(struct vmm_vcpu *vcpu, uint64_t target, const struct vmm_moment *at, uint64_t *beyond)
{
    uint64_t after = 0;
    int rc = write_tsc(vcpu, target, at);
    rc = rc ? rc : get_tsc(vcpu, &after);
    *beyond = after - (target + scaled_span(vcpu, __rdtsc() - at->host_tsc));
    if (*beyond + TSC_NEAR < 2 * TSC_NEAR)
        *beyond = 0;
    return rc;
}

/* *beyond: how far the TSC is from where it should be, since KVM takes none. */
static int set_tsc(struct vmm_vcpu *vcpu, uint64_t target, const struct vmm_moment *at, uint64_t *beyond)
{
    uint64_t before = 0, base;
    *beyond = 0;
    const bool asked = !vcpu->vm->tsc_settable || vcpu->scaled_khz;
    if (asked && !offset_of(vcpu, &before))
        return set_value(vcpu, target, at, beyond);
    const int rc = scaled_tsc(vcpu, at, before, &base);
    return rc ? rc : set_offset(vcpu, before, target - base, beyond);
}

int vmm_clocks_load_tsc(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from, const struct vmm_moment *at,
                        uint64_t *beyond)
{
    const int rc = set_rate(vcpu, from->tsc_khz);
    if (rc < 0)
        return rc;
    const uint32_t khz = from->tsc_khz ? from->tsc_khz : vcpu->vm->host_khz;
    const uint64_t target = from->tsc + ticks_in(at->passed, khz);
    if (vcpu == vcpu->vm->vcpus[0]) {
        vcpu->vm->clock_set = at->clock;
        vcpu->vm->tsc_set = target;
    }
    return set_tsc(vcpu, target, at, beyond);
}

int vmm_clocks_load_deadline(struct vmm_vcpu *vcpu, const vmm_vcpu_state *from, uint64_t beyond)
{
    const uint32_t deadline = MSR_TSC_DEADLINE;
    const uint64_t value = from->tsc_deadline + beyond;
    if (!from->tsc_deadline || !vcpu->vm->has_chips)
        return 0;
    return vmm_vcpu_set_msrs(vcpu, &deadline, &value, 1) == 1
               ? 0
               : vmm_error_set(-EINVAL, "KVM refuses the TSC deadline");
}

void vmm_clocks_jumped(const struct vmm_vcpu *vcpu)
{
    vcpu->engine->ops->guest_was_stopped(vcpu->engine);
}
