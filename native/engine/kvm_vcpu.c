/* SPDX-License-Identifier: Apache-2.0 */
/* The KVM engine: a vCPU, its thread and its state. */
#include "base/error.h"
#include "engine/kvm.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef KVM_GET_STATS_FD
#define KVM_GET_STATS_FD _IO(KVMIO, 0xce) /* Linux 5.14 */
#endif

static struct kvm_vcpu *vcpu_of(struct vmm_engine_vcpu *vcpu)
{
    return (struct kvm_vcpu *)vcpu;
}

static int vcpu_ioctl(struct vmm_engine_vcpu *vcpu, unsigned long request, const void *argument,
                      const char *what)
{
    return kvm_ioctl(vcpu_of(vcpu)->fd, request, argument, what);
}

/* ---- life ---- */

int kvm_create_vcpu(struct vmm_engine *engine, uint32_t id, struct vmm_engine_vcpu **out)
{
    const struct kvm_machine *kvm = (const struct kvm_machine *)engine;
    struct kvm_vcpu *vcpu = calloc(1, sizeof(*vcpu));
    if (!vcpu)
        return vmm_error_set(-ENOMEM, "no memory for a KVM vCPU");
    *vcpu = (struct kvm_vcpu){.base = {.ops = engine->ops, .run = MAP_FAILED}, .run_size = kvm->run_size};
    vcpu->fd = ioctl(kvm->fd, KVM_CREATE_VCPU, (unsigned long)id);
    if (vcpu->fd >= 0)
        vcpu->base.run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->base.run == MAP_FAILED) {
        const int rc = vmm_error_errno("KVM_CREATE_VCPU");
        kvm_destroy_vcpu(&vcpu->base);
        return rc;
    }
    *out = &vcpu->base;
    return 0;
}

void kvm_destroy_vcpu(struct vmm_engine_vcpu *base)
{
    struct kvm_vcpu *vcpu = vcpu_of(base);
    if (vcpu->base.run != MAP_FAILED)
        munmap(vcpu->base.run, vcpu->run_size);
    if (vcpu->fd >= 0)
        close(vcpu->fd);
    free(vcpu);
}

/* ---- running ---- */

static int kick_signal(void)
{
    return SIGRTMIN + 4; /* glibc keeps the first few; debuggers and runtimes like the next */
}

static void ignore_kick(int signal)
{
    (void)signal;
}

static void install_kick(void)
{
    struct sigaction action = {.sa_handler = ignore_kick}; /* no SA_RESTART: KVM_RUN must return */
    sigemptyset(&action.sa_mask);
    sigaction(kick_signal(), &action, NULL);
}

void kvm_attach_thread(struct vmm_engine_vcpu *vcpu)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install_kick);
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, kick_signal());
    pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
    vcpu_of(vcpu)->thread = (pid_t)syscall(SYS_gettid);
}

int kvm_run(struct vmm_engine_vcpu *vcpu)
{
    return ioctl(vcpu_of(vcpu)->fd, KVM_RUN, 0) == 0 ? 0 : -errno;
}

void kvm_kick(struct vmm_engine_vcpu *vcpu)
{
    syscall(SYS_tgkill, getpid(), vcpu_of(vcpu)->thread, kick_signal());
}

/* ---- state ---- */

static const struct {
    unsigned long get, set;
    const char *get_name, *set_name;
} parts[] = {
#define PART(part, noun) [part] = {KVM_GET_##noun, KVM_SET_##noun, "KVM_GET_" #noun, "KVM_SET_" #noun}
    PART(VMM_STATE_MP, MP_STATE), PART(VMM_STATE_EVENTS, VCPU_EVENTS),
    PART(VMM_STATE_LAPIC, LAPIC), PART(VMM_STATE_DEBUGREGS, DEBUGREGS),
    PART(VMM_STATE_FPU, FPU),     PART(VMM_STATE_XSAVE, XSAVE),
    PART(VMM_STATE_XCRS, XCRS),   PART(VMM_STATE_REGS, REGS),
    PART(VMM_STATE_SREGS, SREGS),
#undef PART
};

int kvm_get_state(struct vmm_engine_vcpu *vcpu, enum vmm_state part, void *value)
{
    return vcpu_ioctl(vcpu, parts[part].get, value, parts[part].get_name);
}

int kvm_set_state(struct vmm_engine_vcpu *vcpu, enum vmm_state part, const void *value)
{
    return vcpu_ioctl(vcpu, parts[part].set, value, parts[part].set_name);
}

int kvm_get_msrs(struct vmm_engine_vcpu *vcpu, struct kvm_msrs *list)
{
    return vcpu_ioctl(vcpu, KVM_GET_MSRS, list, "KVM_GET_MSRS");
}

int kvm_set_msrs(struct vmm_engine_vcpu *vcpu, const struct kvm_msrs *list)
{
    return vcpu_ioctl(vcpu, KVM_SET_MSRS, list, "KVM_SET_MSRS");
}

int kvm_get_cpuid(struct vmm_engine_vcpu *vcpu, struct kvm_cpuid2 *list)
{
    return vcpu_ioctl(vcpu, KVM_GET_CPUID2, list, "KVM_GET_CPUID2");
}

int kvm_set_cpuid(struct vmm_engine_vcpu *vcpu, const struct kvm_cpuid2 *list)
{
    return vcpu_ioctl(vcpu, KVM_SET_CPUID2, list, "KVM_SET_CPUID2");
}

int kvm_translate(struct vmm_engine_vcpu *vcpu, struct kvm_translation *translation)
{
    return vcpu_ioctl(vcpu, KVM_TRANSLATE, translation, "KVM_TRANSLATE");
}

int kvm_guest_debug(struct vmm_engine_vcpu *vcpu, const struct kvm_guest_debug *debug)
{
    return vcpu_ioctl(vcpu, KVM_SET_GUEST_DEBUG, debug, "KVM_SET_GUEST_DEBUG");
}

/* ---- time ---- */

uint32_t kvm_tsc_khz(struct vmm_engine_vcpu *vcpu)
{
    const int khz = ioctl(vcpu_of(vcpu)->fd, KVM_GET_TSC_KHZ, 0);
    return khz > 0 ? (uint32_t)khz : 0;
}

int kvm_set_tsc_khz(struct vmm_engine_vcpu *vcpu, uint32_t khz)
{
    return vcpu_ioctl(vcpu, KVM_SET_TSC_KHZ, (void *)(uintptr_t)khz, "KVM_SET_TSC_KHZ");
}

/* Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET: Linux 5.16. */
static int tsc_offset(struct vmm_engine_vcpu *vcpu, unsigned long request, uint64_t *offset)
{
    const struct kvm_device_attr attribute = {
        .group = KVM_VCPU_TSC_CTRL,
        .attr = KVM_VCPU_TSC_OFFSET,
        .addr = (uintptr_t)offset,
    };
    return vcpu_ioctl(vcpu, request, &attribute, "KVM_VCPU_TSC_OFFSET");
}

int kvm_get_tsc_offset(struct vmm_engine_vcpu *vcpu, uint64_t *offset)
{
    return tsc_offset(vcpu, KVM_GET_DEVICE_ATTR, offset);
}

int kvm_set_tsc_offset(struct vmm_engine_vcpu *vcpu, uint64_t offset)
{
    return tsc_offset(vcpu, KVM_SET_DEVICE_ATTR, &offset);
}

void kvm_guest_was_stopped(struct vmm_engine_vcpu *vcpu)
{
    ioctl(vcpu_of(vcpu)->fd, KVM_KVMCLOCK_CTRL, 0); /* EINVAL: the guest uses no kvmclock */
}

int kvm_stats_fd(struct vmm_engine_vcpu *vcpu)
{
    return vcpu_ioctl(vcpu, KVM_GET_STATS_FD, 0, "KVM_GET_STATS_FD");
}
