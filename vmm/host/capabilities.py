"""What KVM can do, by its capabilities."""

from __future__ import annotations

from typing import Any

from vmm._ffi import lib
from vmm.errors import HostError

# The capabilities a machine is built on (linux/kvm.h), and what each is for.
NEEDED = {
    0: ("KVM_CAP_IRQCHIP", "in-kernel interrupt controllers"),
    3: ("KVM_CAP_USER_MEMORY", "guest memory from this process"),
    7: ("KVM_CAP_EXT_CPUID", "CPUID leaves for the guest"),
    14: ("KVM_CAP_MP_STATE", "several vCPUs"),
    33: ("KVM_CAP_PIT2", "in-kernel timer"),
    136: ("KVM_CAP_IMMEDIATE_EXIT", "stopping a vCPU without a race"),
}
USED = {
    9: ("KVM_CAP_NR_VCPUS", "recommended number of vCPUs"),
    66: ("KVM_CAP_MAX_VCPUS", "most vCPUs"),
    10: ("KVM_CAP_NR_MEMSLOTS", "memory slots"),
    32: ("KVM_CAP_IRQFD", "interrupts from an eventfd"),
    36: ("KVM_CAP_IOEVENTFD", "doorbells to an eventfd"),
    74: ("KVM_CAP_SYNC_REGS", "registers without an ioctl"),
    188: ("KVM_CAP_X86_USER_SPACE_MSR", "MSR accesses to this process"),
    189: ("KVM_CAP_X86_MSR_FILTER", "choice of which MSRs"),
    203: ("KVM_CAP_BINARY_STATS_FD", "KVM's own counts, which the probes read"),
    204: ("KVM_CAP_EXIT_ON_EMULATION_FAILURE", "bytes of what KVM cannot emulate"),
}


def require_capabilities(vm: Any) -> None:
    """Raise :class:`~vmm.errors.HostError` naming each needed capability that this KVM lacks."""
    absent = [
        f"{name} ({what})" for number, (name, what) in NEEDED.items() if not lib.vmm_vm_check_extension(vm, number)
    ]
    if absent:
        raise HostError(f"this host's KVM lacks {', '.join(absent)}: a newer kernel has it")


def capabilities(vm: Any) -> dict[str, tuple[int, str]]:
    """Every capability pyvmm knows how to use: KVM's number for it (0: absent) and what it is for."""
    return {
        name: (int(lib.vmm_vm_check_extension(vm, number)), purpose)
        for number, (name, purpose) in sorted({**NEEDED, **USED}.items())
    }
