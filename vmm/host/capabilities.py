"""Capabilities of KVM: those that are required, and those that pyvmm uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm._ffi import lib
from vmm.errors import HostError

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm

# The required capabilities (linux/kvm.h), and their purpose.
NEEDED: dict[int, tuple[str, str]] = {
    lib.KVM_CAP_IRQCHIP: ("KVM_CAP_IRQCHIP", "in-kernel interrupt controllers"),
    lib.KVM_CAP_USER_MEMORY: ("KVM_CAP_USER_MEMORY", "guest memory from this process"),
    lib.KVM_CAP_EXT_CPUID: ("KVM_CAP_EXT_CPUID", "CPUID leaves for the guest"),
    lib.KVM_CAP_MP_STATE: ("KVM_CAP_MP_STATE", "several vCPUs"),
    lib.KVM_CAP_PIT2: ("KVM_CAP_PIT2", "in-kernel timer"),
    lib.KVM_CAP_IMMEDIATE_EXIT: ("KVM_CAP_IMMEDIATE_EXIT", "stopping a vCPU without a race"),
}
USED: dict[int, tuple[str, str]] = {
    lib.KVM_CAP_NR_VCPUS: ("KVM_CAP_NR_VCPUS", "recommended number of vCPUs"),
    lib.KVM_CAP_MAX_VCPUS: ("KVM_CAP_MAX_VCPUS", "most vCPUs"),
    lib.KVM_CAP_NR_MEMSLOTS: ("KVM_CAP_NR_MEMSLOTS", "memory slots"),
    lib.KVM_CAP_IRQFD: ("KVM_CAP_IRQFD", "interrupts from an eventfd"),
    lib.KVM_CAP_IOEVENTFD: ("KVM_CAP_IOEVENTFD", "doorbells to an eventfd"),
    lib.KVM_CAP_SYNC_REGS: ("KVM_CAP_SYNC_REGS", "registers without an ioctl"),
    lib.KVM_CAP_X86_USER_SPACE_MSR: ("KVM_CAP_X86_USER_SPACE_MSR", "MSR accesses to this process"),
    lib.KVM_CAP_X86_MSR_FILTER: ("KVM_CAP_X86_MSR_FILTER", "choice of which MSRs"),
    lib.KVM_CAP_BINARY_STATS_FD: ("KVM_CAP_BINARY_STATS_FD", "KVM's own counts, which the probes read"),
    lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE: ("KVM_CAP_EXIT_ON_EMULATION_FAILURE", "bytes of what KVM cannot emulate"),
}


def require_capabilities(vm: vmm_vm) -> None:
    """Raise :class:`~vmm.errors.HostError` naming each needed capability that this KVM lacks."""
    absent = [
        f"{name} ({what})" for number, (name, what) in NEEDED.items() if not lib.vmm_vm_check_extension(vm, number)
    ]
    if absent:
        raise HostError(f"this host's KVM lacks {', '.join(absent)}: a newer kernel has it")


def capabilities(vm: vmm_vm) -> dict[str, tuple[int, str]]:
    """Return every capability that pyvmm can use: KVM's value (0: absent) and its purpose."""
    return {
        name: (int(lib.vmm_vm_check_extension(vm, number)), purpose)
        for number, (name, purpose) in sorted({**NEEDED, **USED}.items())
    }
