/* SPDX-License-Identifier: Apache-2.0 */
/* The KVM engine's two files: kvm.c has the machine, kvm_vcpu.c a vCPU. */
#ifndef VMM_ENGINE_KVM_H
#define VMM_ENGINE_KVM_H

#include "base/error.h"
#include "engine/engine.h"

#include <sys/ioctl.h>
#include <sys/types.h>

struct kvm_machine {
    struct vmm_engine base;
    int kvm_fd, fd;    /* /dev/kvm; the machine */
    uint32_t run_size; /* of a vCPU's page */
    uint64_t moved_to; /* where kvm_forget_page_tables has put its slot; 0: nowhere yet */
};

struct kvm_vcpu {
    struct vmm_engine_vcpu base;
    int fd;
    uint32_t run_size;
    pid_t thread; /* the attached one */
};

/* An ioctl's result, or -errno with `what` as the error's text. */
static inline int kvm_ioctl(int fd, unsigned long request, const void *argument, const char *what)
{
    const int result = ioctl(fd, request, argument);
    return result < 0 ? vmm_error_errno(what) : result;
}

int kvm_create_vcpu(struct vmm_engine *engine, uint32_t id, struct vmm_engine_vcpu **out);
void kvm_destroy_vcpu(struct vmm_engine_vcpu *vcpu);
void kvm_attach_thread(struct vmm_engine_vcpu *vcpu);
int kvm_run(struct vmm_engine_vcpu *vcpu);
void kvm_kick(struct vmm_engine_vcpu *vcpu);
int kvm_get_state(struct vmm_engine_vcpu *vcpu, enum vmm_state part, void *value);
int kvm_set_state(struct vmm_engine_vcpu *vcpu, enum vmm_state part, const void *value);
int kvm_get_msrs(struct vmm_engine_vcpu *vcpu, struct kvm_msrs *list);
int kvm_set_msrs(struct vmm_engine_vcpu *vcpu, const struct kvm_msrs *list);
int kvm_get_cpuid(struct vmm_engine_vcpu *vcpu, struct kvm_cpuid2 *list);
int kvm_set_cpuid(struct vmm_engine_vcpu *vcpu, const struct kvm_cpuid2 *list);
int kvm_translate(struct vmm_engine_vcpu *vcpu, struct kvm_translation *translation);
int kvm_guest_debug(struct vmm_engine_vcpu *vcpu, const struct kvm_guest_debug *debug);
uint32_t kvm_tsc_khz(struct vmm_engine_vcpu *vcpu);
int kvm_set_tsc_khz(struct vmm_engine_vcpu *vcpu, uint32_t khz);
int kvm_get_tsc_offset(struct vmm_engine_vcpu *vcpu, uint64_t *offset);
int kvm_set_tsc_offset(struct vmm_engine_vcpu *vcpu, uint64_t offset);
void kvm_guest_was_stopped(struct vmm_engine_vcpu *vcpu);
int kvm_stats_fd(struct vmm_engine_vcpu *vcpu);

#endif
