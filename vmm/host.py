"""What this host's KVM is and can do, found by asking it and by running tiny guests, never by the host's name.

:func:`check` is on the way of every start: it reads the findings of an earlier probe on the same running kernel, or
probes. :mod:`vmm.cli.doctor` prints the whole examination.
"""

from __future__ import annotations

import errno as errno_names
import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import lib
from vmm.errors import HostError, VmmError

if TYPE_CHECKING:
    from vmm.config import MachineConfig

COMPLETE, SYSCALL, SHADOW = 1, 2, 4  # enum vmm_compat_flags

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
    192: ("KVM_CAP_DIRTY_LOG_RING", "dirty pages by ring"),
    204: ("KVM_CAP_EXIT_ON_EMULATION_FAILURE", "bytes of what KVM cannot emulate"),
}


class Findings:
    """What the probes found. ``remedies`` is what a machine switches on because of it.

    ``native``: guest kernel code runs on the processor (False: KVM emulates it, instruction by instruction).
    ``missing``: instructions KVM cannot execute at CPL 0. ``syscall_broken``: SYSCALL from CPL 3 stays at CPL 3.
    ``vmcall_loops``: a hypercall never returns. ``cpuid_forced``: feature names the guest sees although hidden.
    ``tsc_fixed``: the guest's TSC is the host's, whatever is written to it. ``shadowed``: KVM goes on with page tables
    as they were before the host wrote them.
    """

    __slots__ = (
        "cpuid_forced",
        "instruction_ns",
        "missing",
        "native",
        "pio_us",
        "shadowed",
        "syscall_broken",
        "tsc_fixed",
        "vmcall_loops",
    )

    def __init__(self) -> None:
        self.native = True
        self.instruction_ns = 0.0
        self.pio_us = 0.0
        self.missing: list[str] = []
        self.syscall_broken = False
        self.vmcall_loops = False
        self.tsc_fixed = False
        self.shadowed = False
        self.cpuid_forced: list[str] = []

    @property
    def departs(self) -> bool:
        """Whether this host departs from the architecture in a way that needs a remedy."""
        return bool(self.missing) or self.syscall_broken or self.vmcall_loops

    def as_text(self) -> str:
        """One ``name=value`` a line, for the cache."""
        return "".join(
            f"{name}={','.join(value) if isinstance(value, list) else value}\n"
            for name, value in ((n, getattr(self, n)) for n in self.__slots__)
        )

    @classmethod
    def from_text(cls, text: str) -> Findings:
        """Read :meth:`as_text` back. ``ValueError`` for anything else."""
        found = cls()
        lines = dict(line.split("=", 1) for line in text.splitlines())
        if set(lines) != set(cls.__slots__):
            raise ValueError("not a record of findings")
        for name, value in lines.items():
            kind = type(getattr(found, name))
            if kind is bool:
                setattr(found, name, value == "True")
            elif kind is list:
                setattr(found, name, [part for part in value.split(",") if part])
            else:
                setattr(found, name, float(value))
        return found


class Remedies:
    """What one machine does about its host: native flags, and whether guest kernel code is ``emulated``."""

    __slots__ = ("emulated", "remedies", "tsc_fixed", "vmcall_loops")

    def __init__(self, found: Findings | None, mode: str) -> None:
        forced = mode == "on"
        self.remedies = 0
        self.vmcall_loops = self.emulated = self.tsc_fixed = False
        if mode == "off" or found is None:
            return
        self.emulated = not found.native
        self.vmcall_loops = forced or found.vmcall_loops
        self.tsc_fixed = forced or found.tsc_fixed
        if forced or found.missing:
            self.remedies |= COMPLETE
        if forced or found.syscall_broken:
            self.remedies |= SYSCALL
        if forced or found.shadowed:
            self.remedies |= SHADOW


def check(kvm: str, config: MachineConfig) -> Remedies:
    """The remedies for a machine of this configuration; probes once per boot of the host.

    Raises :class:`~vmm.errors.HostError` when KVM is missing, forbidden or too old.
    """
    if config.compat == "off":
        return Remedies(None, "off")
    return Remedies(findings(kvm), config.compat)


def cache_folder() -> str:
    """``$PYVMM_CACHE``, else ``$XDG_CACHE_HOME/pyvmm``, else ``~/.cache/pyvmm``."""
    root = os.environ.get("PYVMM_CACHE")
    if root:
        return root
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "pyvmm")


def _cache_file(kvm: str) -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    try:
        device = os.stat(kvm)
        tag = f"{device.st_rdev:x}-{int(device.st_ctime)}"
    except OSError:
        tag = "none"
    return os.path.join(cache_folder(), f"host-2-{boot}-{tag}")


_known: dict[str, Findings] = {}


def findings(kvm: str = "/dev/kvm") -> Findings:
    """The probes' findings: of this process, else of this boot of the host, else made now."""
    if kvm not in _known:
        try:
            with open(_cache_file(kvm)) as file:
                _known[kvm] = Findings.from_text(file.read())
        except (OSError, ValueError):
            return probe_now(kvm)
    return _known[kvm]


def probe_now(kvm: str = "/dev/kvm") -> Findings:
    """Probe (a fraction of a second) and remember the findings."""
    from vmm.cpu.probe import probe

    found = _known[kvm] = probe(kvm)
    path = _cache_file(kvm)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w") as file:
            file.write(found.as_text())
        os.replace(f"{path}.{os.getpid()}", path)
    except OSError:
        pass  # a read-only home costs the next start a probe
    return found


def explain_refusal(path: str, code: int, text: str) -> VmmError:
    """The exception for a machine that could not be created: what was refused, and what to do about it."""
    number = -code
    if number == errno_names.ENOENT:
        return HostError(
            f"{path} does not exist: load the module (modprobe kvm_intel or kvm_amd), enable virtualization in the "
            "firmware, or nested virtualization if this is itself a virtual machine",
            number,
        )
    if number in (errno_names.EACCES, errno_names.EPERM):
        return HostError(
            f"no permission to open {path}: add yourself to its group (usermod -aG kvm $USER, then log in again)",
            number,
        )
    if number in (errno_names.ENODEV, errno_names.ENXIO):
        return HostError(f"{path} has no driver behind it: load the module (modprobe kvm_intel or kvm_amd)", number)
    if number == errno_names.EBUSY:
        return HostError(f"{text} says busy: another hypervisor may hold the processor; stop it", number)
    if number in (errno_names.ENOTTY, errno_names.EPROTO):
        return HostError(f"{path} is not KVM, or not its API version 12 ({text}): is it the right device?", number)
    return HostError(f"{text}: {os.strerror(number)}", number)


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


def backend() -> str:
    """VMX, SVM, PVM or unknown: by which module offers /dev/kvm."""
    for module, name in (("kvm_intel", "VMX"), ("kvm_amd", "SVM"), ("kvm_pvm", "PVM")):
        if os.path.isdir(f"/sys/module/{module}"):
            return name
    return "unknown"
