/* SPDX-License-Identifier: Apache-2.0 */
#include "core/eventfd.h"

#include <errno.h>

int vmm_vm_ioeventfd(struct vmm_vm *vm, int space, uint64_t address, uint32_t size, bool match,
                     uint64_t value, int fd, bool assign)
{
    if ((space != VMM_PIO && space != VMM_MMIO) || (match && !size))
        return vmm_error_set(-EINVAL, "an ioeventfd at %#llx needs a space, and a size to match a value",
                             (unsigned long long)address);
    const struct kvm_ioeventfd request = {
        .addr = address,
        .len = size,
        .datamatch = value,
        .fd = fd,
        .flags = (space == VMM_PIO ? KVM_IOEVENTFD_FLAG_PIO : 0) |
                 (match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) | (assign ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN),
    };
    return vm->engine->ops->ioeventfd(vm->engine, &request);
}
