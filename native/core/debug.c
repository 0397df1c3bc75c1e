/* SPDX-License-Identifier: Apache-2.0 */
/* The one owner of KVM_SET_GUEST_DEBUG: what each vCPU's debug registers hold, what it stops for, and the events. */
#include "base/thread.h"
#include "core/stop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    INT3 = 0xcc,
    VECTOR_BP = 3,
    DR6_BS = 1 << 14,
    DR6_WHY = 7 << 13 /* BD, BS, BT */,
    DR7_EXACT = 0x700,
    MAX_PLANTED = 4096
};

/* ---- what KVM is asked for ---- */

static bool by_step(const struct vmm_debug *debug)
{
    return debug->flags & VMM_DEBUG_WATCH_BY_STEP;
}

static bool watches(const struct vmm_debug_point *point)
{
    return point->kind == VMM_DEBUG_WRITE || point->kind == VMM_DEBUG_ACCESS;
}

static bool steps_to_watch(const struct vmm_debug *debug)
{
    bool any = false;
    for (uint32_t i = 0; i < VMM_DEBUG_REGISTERS; i++)
        any |= watches(&debug->points[i]);
    return any && by_step(debug);
}

/* SDM volume 3, 17.2.4: DR7's enable, R/W and LEN fields of one register. */
static uint64_t dr7_fields(uint32_t slot, const struct vmm_debug_point *point)
{
    static const uint8_t length[9] = {[1] = 0, [2] = 1, [4] = 3, [8] = 2};
    uint64_t rw = point->kind == VMM_DEBUG_EXECUTE ? 0 : point->kind == VMM_DEBUG_WRITE ? 1 : 3;
    return 2ull << 2 * slot | (rw | (uint64_t)length[point->size] << 2) << (16 + 4 * slot);
}

static void debug_registers(const struct vmm_vcpu *vcpu, struct kvm_guest_debug *to)
{
    const struct vmm_debug *debug = &vcpu->vm->debug;
    uint64_t dr7 = 0;
    for (uint32_t i = 0; i < debug->reserved; i++)
        if ((to->arch.debugreg[i] = vcpu->debug.reserved[i]))
            dr7 |= 2ull << 2 * i;
    for (uint32_t i = debug->reserved; i < VMM_DEBUG_REGISTERS; i++) {
        const struct vmm_debug_point *point = &debug->points[i];
        if (point->kind == VMM_DEBUG_NONE || (watches(point) && by_step(debug)))
            continue;
        to->arch.debugreg[i] = point->linear;
        dr7 |= dr7_fields(i, point);
    }
    if (dr7) {
        to->arch.debugreg[7] = dr7 | DR7_EXACT;
        to->control |= KVM_GUESTDBG_USE_HW_BP;
    }
}

static int set_guest_debug(struct vmm_vcpu *vcpu, uint32_t more)
{
    const struct vmm_debug *debug = &vcpu->vm->debug;
    struct kvm_guest_debug to = {.control = more};
    const int rc = vmm_vcpu_flush_registers(vcpu); /* KVM notes where a step begins */
    if (rc < 0)
        return rc;
    if (!vcpu->debug.step_over)
        debug_registers(vcpu, &to);
    if (debug->n_planted)
        to.control |= KVM_GUESTDBG_USE_SW_BP;
    if (vcpu->debug.step)
        to.control |= KVM_GUESTDBG_SINGLESTEP | (debug->controls & KVM_GUESTDBG_BLOCKIRQ);
    if (vcpu->debug.step_over || vcpu->debug.follow || (steps_to_watch(debug) && !vcpu->debug.user))
        to.control |= KVM_GUESTDBG_SINGLESTEP;
    if (to.control)
        to.control |= KVM_GUESTDBG_ENABLE;
    return vcpu->engine->ops->guest_debug(vcpu->engine, &to);
}

int vmm_debug_apply(struct vmm_vcpu *vcpu)
{
    return set_guest_debug(vcpu, 0);
}

static int apply_to_all(struct vmm_vm *vm)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < vm->n_vcpus; i++)
        rc = vmm_debug_apply(vm->vcpus[i]);
    return rc;
}

/* ---- while no vCPU runs ---- */

#define PARK_MS 10000 /* a vCPU that was started while paused parks before it enters the guest or a device */

static bool any_running(const struct vmm_vm *vm)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        if (vm->vcpus[i]->state == VMM_VCPU_RUNNING)
            return true;
    return false;
}

static int refuse_running(struct vmm_vm *vm)
{
    const struct timespec until = vmm_deadline(PARK_MS);
    int late = 0;
    pthread_mutex_lock(&vm->lock);
    while (vm->pauses && any_running(vm) &&
           !late) /* one that was started while paused is on its way to park */
        late = vmm_cond_wait_until(&vm->changed, &vm->lock, &until);
    bool running = any_running(vm);
    pthread_mutex_unlock(&vm->lock);
    return running ? vmm_error_set(-EBUSY, "a debugger's request while vCPUs run: pause the machine first")
                   : 0;
}

/* Debug events are a reason to park, until they are taken; and so is being held. */
static void request_locked(struct vmm_vm *vm)
{
    bool any = vm->debug.pending;
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        any |= vm->vcpus[i]->debug.held;
    if (any)
        atomic_fetch_or(&vm->requests, VMM_REQUEST_DEBUG);
    else
        atomic_fetch_and(&vm->requests, ~(uint32_t)VMM_REQUEST_DEBUG);
    pthread_cond_broadcast(&vm->changed);
}

bool vmm_debug_parked(const struct vmm_vcpu *vcpu)
{
    return vcpu->vm->debug.pending || vcpu->debug.held;
}

int vmm_debug_open(vmm_vm *vm, uint32_t flags)
{
    struct vmm_debug *debug = &vm->debug;
    int rc = refuse_running(vm);
    if (rc < 0)
        return rc;
    if (flags & ~(uint32_t)VMM_DEBUG_WATCH_BY_STEP)
        return vmm_error_set(-EINVAL, "vmm_debug_open: unknown flags %#x", flags);
    if (vmm_vm_check_extension(vm, KVM_CAP_SET_GUEST_DEBUG) <= 0)
        return vmm_error_set(-ENOTSUP, "debugging needs KVM_CAP_SET_GUEST_DEBUG");
    if (debug->fd <= 0)
        debug->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (debug->fd < 0)
        return vmm_error_errno("eventfd");
    debug->controls = (uint32_t)vmm_vm_check_extension(vm, KVM_CAP_SET_GUEST_DEBUG2);
    debug->flags = flags;
    debug->open = true;
    return 0;
}

static void forget_events_locked(struct vmm_vm *vm)
{
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        vm->vcpus[i]->debug.event.kind = VMM_DEBUG_NONE;
    vm->debug.pending = 0;
    uint64_t count;
    ssize_t got = read(vm->debug.fd, &count, sizeof(count));
    (void)got; /* EAGAIN: it was not signalled */
}

void vmm_debug_rearm(struct vmm_vm *vm)
{
    if (!vm->debug.open)
        return;
    forget_events_locked(vm);
    request_locked(vm);
}

static void end_locked(struct vmm_vcpu_debug *debug)
{
    debug->step = debug->held = debug->user = false;
    debug->follow = debug->stop_at = 0;
}

int vmm_debug_close(vmm_vm *vm)
{
    struct vmm_debug *debug = &vm->debug;
    int rc = refuse_running(vm);
    if (rc < 0 || !debug->open)
        return rc;
    if (debug->n_planted)
        return vmm_error_set(-EBUSY, "%u software breakpoints are still planted", debug->n_planted);
    memset(debug->points, 0, sizeof(debug->points));
    debug->open = false;
    pthread_mutex_lock(&vm->lock);
    for (uint32_t i = 0; i < vm->n_vcpus; i++)
        end_locked(&vm->vcpus[i]->debug);
    forget_events_locked(vm);
    request_locked(vm);
    pthread_mutex_unlock(&vm->lock);
    return apply_to_all(vm);
}

void vmm_debug_deinit(struct vmm_vm *vm)
{
    free(vm->debug.planted);
    if (vm->debug.fd > 0)
        close(vm->debug.fd);
}

int vmm_debug_fd(vmm_vm *vm)
{
    return vm->debug.fd;
}

/* ---- points ---- */

/* Where `gpa` is among the planted, or would be. */
static uint32_t planted_at(const struct vmm_debug *debug, uint64_t gpa)
{
    uint32_t low = 0, high = debug->n_planted;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (debug->planted[middle] < gpa)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool is_planted(const struct vmm_debug *debug, uint32_t at, uint64_t gpa)
{
    return at < debug->n_planted && debug->planted[at] == gpa;
}

static int make_room(struct vmm_debug *debug)
{
    if (debug->n_planted < debug->room)
        return 0;
    uint32_t room = debug->room ? 2 * debug->room : 16;
    if (room > MAX_PLANTED)
        return vmm_error_set(-ENOSPC, "more than %d software breakpoints", MAX_PLANTED);
    uint64_t *grown = realloc(debug->planted, room * sizeof(*grown));
    if (!grown)
        return vmm_error_set(-ENOMEM, "no memory for software breakpoints");
    debug->planted = grown;
    debug->room = room;
    return 0;
}

int vmm_debug_plant(vmm_vm *vm, uint64_t gpa, uint8_t *original)
{
    struct vmm_debug *debug = &vm->debug;
    int rc = refuse_running(vm);
    if (rc < 0)
        return rc;
    uint8_t *byte = vmm_vm_gpa(vm, gpa, 1);
    uint32_t at = planted_at(debug, gpa);
    if (!byte)
        return vmm_error_set(-EFAULT, "no RAM at %#llx for a breakpoint", (unsigned long long)gpa);
    if (is_planted(debug, at, gpa))
        return vmm_error_set(-EEXIST, "a breakpoint is at %#llx already", (unsigned long long)gpa);
    rc = make_room(debug);
    if (rc < 0)
        return rc;
    memmove(&debug->planted[at + 1], &debug->planted[at], (debug->n_planted - at) * sizeof(*debug->planted));
    debug->planted[at] = gpa;
    debug->n_planted++;
    *original = *byte;
    *byte = INT3;
    return debug->n_planted == 1 ? apply_to_all(vm) : 0;
}

int vmm_debug_lift(vmm_vm *vm, uint64_t gpa, uint8_t byte)
{
    struct vmm_debug *debug = &vm->debug;
    int rc = refuse_running(vm);
    if (rc < 0)
        return rc;
    uint32_t at = planted_at(debug, gpa);
    if (!is_planted(debug, at, gpa))
        return vmm_error_set(-ENOENT, "no breakpoint is at %#llx", (unsigned long long)gpa);
    uint8_t *place = vmm_vm_gpa(vm, gpa, 1);
    if (*place == INT3)
        *place = byte;
    debug->n_planted--;
    memmove(&debug->planted[at], &debug->planted[at + 1], (debug->n_planted - at) * sizeof(*debug->planted));
    return debug->n_planted == 0 ? apply_to_all(vm) : 0;
}

uint32_t vmm_debug_slots(vmm_vm *vm)
{
    return VMM_DEBUG_REGISTERS - vm->debug.reserved;
}

/* What lies at a watched address now. False: nothing is mapped there. */
static bool watched_value(struct vmm_vcpu *vcpu, const struct vmm_debug_point *point, uint64_t *value)
{
    uint64_t gpa;
    if (vmm_vcpu_translate(vcpu, point->linear, &gpa) < 0)
        return false;
    const void *at = vmm_vm_gpa(vcpu->vm, gpa, point->size);
    *value = 0;
    if (at)
        memcpy(value, at, point->size);
    return at;
}

int vmm_debug_set_point(vmm_vm *vm, uint32_t slot, int kind, uint64_t linear, uint32_t size)
{
    struct vmm_debug *debug = &vm->debug;
    int rc = refuse_running(vm);
    if (rc < 0)
        return rc;
    bool sized = kind == VMM_DEBUG_EXECUTE ? size == 1 : size == 1 || size == 2 || size == 4 || size == 8;
    bool known = kind == VMM_DEBUG_NONE || kind == VMM_DEBUG_EXECUTE || kind == VMM_DEBUG_WRITE ||
                 kind == VMM_DEBUG_ACCESS;
    if (slot >= vmm_debug_slots(vm) || !known || (kind && (!sized || linear % size)))
        return vmm_error_set(-EINVAL, "debug register %u: kind %d, %u bytes at %#llx", slot, kind, size,
                             (unsigned long long)linear);
    if (kind == VMM_DEBUG_ACCESS && by_step(debug))
        return vmm_error_set(-ENOTSUP, "this host's KVM sees no reads of kernel data: watch writes instead");
    struct vmm_debug_point *point = &debug->points[debug->reserved + slot];
    *point = (struct vmm_debug_point){.linear = linear, .kind = (uint8_t)kind, .size = (uint8_t)size};
    if (watches(point) && vm->n_vcpus)
        (void)watched_value(vm->vcpus[0], point,
                            &point->last); /* not mapped yet: any value is a change from 0 */
    return apply_to_all(vm);
}

bool vmm_debug_wants(const struct vmm_vcpu *vcpu, uint64_t linear)
{
    const struct vmm_debug *debug = &vcpu->vm->debug;
    for (uint32_t i = debug->reserved; i < VMM_DEBUG_REGISTERS; i++)
        if (debug->points[i].kind == VMM_DEBUG_EXECUTE && debug->points[i].linear == linear)
            return true;
    return false;
}

/* ---- steps and holds ---- */

static bool at_cpl3(struct vmm_vcpu *vcpu)
{
    vmm_sregs sregs;
    return vmm_vcpu_get_sregs(vcpu, &sregs) == 0 && sregs.ss.dpl == 3 && sregs.cr0 & 1;
}

int vmm_debug_step(vmm_vcpu *vcpu, int on)
{
    int rc = refuse_running(vcpu->vm);
    if (rc < 0)
        return rc;
    if (on && by_step(&vcpu->vm->debug) && at_cpl3(vcpu))
        return vmm_error_set(-ENOTSUP, "this host's KVM cannot stop vCPU %u at CPL 3", vcpu->id);
    vcpu->debug.step = on;
    return vmm_debug_apply(vcpu);
}

/* The registers before the next instruction. The step is asked for again: POPF, IRET, SYSRET may have taken TF away. */
static bool keep_and_step(struct vmm_vcpu *vcpu)
{
    struct vmm_vcpu_debug *debug = &vcpu->debug;
    debug->known = vmm_vcpu_get_regs(vcpu, &debug->regs) == 0 && vmm_vcpu_get_sregs(vcpu, &debug->sregs) == 0;
    return debug->known && vmm_debug_apply(vcpu) == 0;
}

int vmm_debug_follow(vmm_vcpu *vcpu, uint64_t steps)
{
    int rc = refuse_running(vcpu->vm);
    if (rc < 0)
        return rc;
    if (steps && by_step(&vcpu->vm->debug) && at_cpl3(vcpu))
        return vmm_error_set(-ENOTSUP, "this host's KVM cannot stop vCPU %u at CPL 3", vcpu->id);
    vcpu->debug.follow = steps;
    vcpu->debug.followed = 0;
    vcpu->debug.known = false;
    if (!steps)
        return vmm_debug_apply(vcpu);
    return keep_and_step(vcpu) ? 0 : vmm_error_set(-EIO, "vCPU %u cannot be stepped", vcpu->id);
}

int vmm_debug_followed(vmm_vcpu *vcpu, vmm_regs *regs, vmm_sregs *sregs, uint64_t *steps)
{
    int rc = refuse_running(vcpu->vm);
    if (rc == 0 && !vcpu->debug.known)
        rc = vmm_error_set(-ENOENT, "vCPU %u was not followed", vcpu->id);
    if (rc < 0)
        return rc;
    *regs = vcpu->debug.regs;
    *sregs = vcpu->debug.sregs;
    *steps = vcpu->debug.followed;
    return 0;
}

int vmm_debug_stop_at(vmm_vcpu *vcpu, uint64_t count)
{
    int rc = refuse_running(vcpu->vm);
    if (rc == 0)
        vcpu->debug.stop_at = count;
    return rc;
}

int vmm_debug_hold(vmm_vcpu *vcpu, int on)
{
    int rc = refuse_running(vcpu->vm);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&vcpu->vm->lock);
    vcpu->debug.held = on;
    request_locked(vcpu->vm);
    pthread_mutex_unlock(&vcpu->vm->lock);
    return 0;
}

/* ---- events ---- */

static void report(struct vmm_vcpu *vcpu, uint32_t kind, uint64_t linear)
{
    struct vmm_vm *vm = vcpu->vm;
    struct vmm_debug *debug = &vm->debug;
    pthread_mutex_lock(&vm->lock);
    if (vcpu->debug.event.kind == VMM_DEBUG_NONE) {
        vcpu->debug.event = (vmm_debug_event){.vcpu = vcpu->id, .kind = kind, .address = linear};
        vcpu->debug.order = debug->events++;
        debug->pending++;
    }
    request_locked(vm);
    vmm_vm_kick_locked(vm);
    ssize_t written = write(debug->fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)written; /* only a full counter could refuse, and then it is readable already */
    pthread_mutex_unlock(&vm->lock);
}

void vmm_debug_counted(struct vmm_vcpu *vcpu)
{
    vcpu->debug.stop_at = 0; /* no count is 0: one was recorded just now */
    if (vcpu->vm->debug.open)
        report(vcpu, VMM_DEBUG_COUNT, 0);
}

int vmm_debug_take(vmm_vm *vm, vmm_debug_event *event)
{
    int rc = vm->debug.open ? refuse_running(vm) : vmm_error_set(-EINVAL, "no debugger is open");
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&vm->lock);
    struct vmm_vcpu *first = NULL;
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        struct vmm_vcpu *vcpu = vm->vcpus[i];
        if (vcpu->debug.event.kind && (!first || vcpu->debug.order < first->debug.order))
            first = vcpu;
    }
    if (first)
        *event = first->debug.event;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < vm->n_vcpus; i++) {
        struct vmm_vcpu_debug *debug = &vm->vcpus[i]->debug;
        if (debug->event.kind)
            debug->follow = 0;
        bool lasts = debug->event.kind == VMM_DEBUG_WRITE || debug->event.kind == VMM_DEBUG_ACCESS;
        if (vm->vcpus[i] == first || !lasts)
            debug->event.kind = VMM_DEBUG_NONE;
        kept += debug->event.kind != VMM_DEBUG_NONE;
    }
    vm->debug.pending = kept;
    uint64_t count;
    ssize_t done = kept ? write(vm->debug.fd, &(uint64_t){1}, sizeof(uint64_t))
                        : read(vm->debug.fd, &count, sizeof(count));
    (void)done; /* full or empty already */
    request_locked(vm);
    pthread_mutex_unlock(&vm->lock);
    return first != NULL;
}

/* ---- exits ---- */

/* Stepping to watch goes on at CPL 0 only; look where the vCPU is now. */
static int follow_cpl(struct vmm_vcpu *vcpu)
{
    if (!steps_to_watch(&vcpu->vm->debug))
        return 0;
    bool user = at_cpl3(vcpu);
    if (user == vcpu->debug.user)
        return 0;
    vcpu->debug.user = user;
    return vmm_debug_apply(vcpu);
}

static bool report_change(struct vmm_vcpu *vcpu)
{
    struct vmm_debug *debug = &vcpu->vm->debug;
    uint64_t now;
    for (uint32_t i = debug->reserved; i < VMM_DEBUG_REGISTERS; i++) {
        struct vmm_debug_point *point = &debug->points[i];
        if (watches(point) && watched_value(vcpu, point, &now) &&
            __atomic_exchange_n(&point->last, now, __ATOMIC_RELAXED) != now) {
            report(vcpu, point->kind, point->linear);
            return true;
        }
    }
    return false;
}

/* One instruction was executed: for a watchpoint, a step, or a debugger that follows. */
static bool report_step(struct vmm_vcpu *vcpu)
{
    bool watching = steps_to_watch(&vcpu->vm->debug), stepping = vcpu->debug.step;
    const bool following = vcpu->debug.follow;
    if (watching && report_change(vcpu))
        return true;
    if (following) {
        vcpu->debug.followed++;
        stepping |= !--vcpu->debug.follow || !keep_and_step(vcpu);
    }
    if (stepping)
        report(vcpu, VMM_DEBUG_STEP, 0);
    if (watching)
        (void)follow_cpl(vcpu); /* KVM_SET_GUEST_DEBUG cannot fail here where it has not before */
    return watching || stepping || following;
}

/* The linear address of the next instruction; false when the host refuses. */
static bool next_instruction(struct vmm_vcpu *vcpu, uint64_t *linear)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    if (vmm_engine_get(vcpu->engine, VMM_STATE_REGS, &regs) != 0 ||
        vmm_engine_get(vcpu->engine, VMM_STATE_SREGS, &sregs) != 0)
        return false;
    *linear = sregs.cs.l && sregs.efer & 0x400 ? regs.rip : (uint32_t)(sregs.cs.base + regs.rip);
    return true;
}

static bool report_planted(struct vmm_vcpu *vcpu)
{
    const struct vmm_debug *debug = &vcpu->vm->debug;
    uint64_t linear, gpa;
    if (!debug->n_planted || !next_instruction(vcpu, &linear) || vmm_vcpu_translate(vcpu, linear, &gpa) < 0 ||
        !is_planted(debug, planted_at(debug, gpa), gpa))
        return false;
    report(vcpu, VMM_DEBUG_SOFTWARE, linear);
    return true;
}

int vmm_debug_int3(struct vmm_vcpu *vcpu)
{
    uint8_t bytes[16];
    if (!vcpu->vm->debug.n_planted || (vmm_vcpu_failed_instruction(vcpu, bytes) && bytes[0] != INT3))
        return 0; /* what KVM reports spares three ioctls */
    return vcpu->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && report_planted(vcpu);
}

void vmm_debug_completed(struct vmm_vcpu *vcpu)
{
    if (vcpu->vm->debug.open && !vcpu->debug.step_over)
        (void)report_step(vcpu);
}

/* The guest's own #DB. KVM delivers it, but leaves DR6 as it was: the reason is for us to write there (SDM volume 3,
 * 17.2.3). */
static int give_back_db(struct vmm_vcpu *vcpu, uint64_t dr6)
{
    struct kvm_debugregs registers = {0};
    int rc = vmm_engine_get(vcpu->engine, VMM_STATE_DEBUGREGS, &registers);
    registers.dr6 |= dr6 & DR6_WHY;
    rc = rc ? rc : vmm_engine_set(vcpu->engine, VMM_STATE_DEBUGREGS, &registers);
    return rc ? rc : set_guest_debug(vcpu, KVM_GUESTDBG_INJECT_DB);
}

int vmm_debug_exit(struct vmm_vcpu *vcpu)
{
    const struct vmm_debug *debug = &vcpu->vm->debug;
    const struct kvm_debug_exit_arch *arch = &vcpu->run->debug.arch;
    if (!debug->open)
        return 0;
    if (arch->exception == VECTOR_BP) /* the guest's own: it gets it */
        return report_planted(vcpu) || set_guest_debug(vcpu, KVM_GUESTDBG_INJECT_BP) == 0;
    for (uint32_t i = debug->reserved; i < VMM_DEBUG_REGISTERS; i++)
        if (arch->dr6 >> i & 1 && debug->points[i].kind) {
            report(vcpu, debug->points[i].kind, debug->points[i].linear);
            return 1;
        }
    if (arch->dr6 & DR6_BS && report_step(vcpu))
        return 1;
    return give_back_db(vcpu, arch->dr6) == 0;
}
