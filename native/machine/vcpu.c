/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a vCPU; its registers are in registers.c, running it in run.c. */
#include "core/core.h"
#include "time/clocks.h"

#include <errno.h>
#include <stdlib.h>

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
        return vmm_error_set(-ENOMEM, "no memory for a vCPU");
    vcpu->vm = vm;
    vcpu->id = id;
    rc = vm->engine->ops->create_vcpu(vm->engine, id, &vcpu->engine);
    if (rc == 0) {
        vcpu->run = vcpu->engine->run;
        rc = vmm_clocks_created(vcpu);
    }
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
    if (vcpu->engine)
        vcpu->engine->ops->destroy_vcpu(vcpu->engine);
    free(vcpu);
}

int vmm_vcpu_stats_fd(vmm_vcpu *vcpu)
{
    return vcpu->engine->ops->stats_fd(vcpu->engine);
}
