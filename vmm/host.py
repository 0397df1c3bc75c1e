"""What this host's KVM is and can do, found by asking it and by running tiny guests, never by the host's name.

:func:`check` is on the way of every start: it reads the findings of an earlier probe on the same running kernel, or
probes. :mod:`vmm.cli.doctor` prints the whole examination.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import lib
from vmm.cpu.findings import Findings
from vmm.errors import HostError

if TYPE_CHECKING:
    from vmm.config import MachineConfig

COMPLETE, SYSCALL, SHADOW, HYPERCALL = 1, 2, 4, 8  # enum vmm_compat_flags

_BACKENDS = {"kvm_intel": "VMX", "kvm_amd": "SVM", "kvm_pvm": "PVM"}  # the module that offers /dev/kvm

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


class Remedies:
    """What one machine does about its host: native flags, and whether guest kernel code is ``emulated``."""

    __slots__ = ("emulated", "remedies", "tsc_fixed", "unstopped", "vmcall_loops")

    def __init__(self, found: Findings | None, mode: str) -> None:
        forced = mode == "on"
        self.remedies = 0
        self.vmcall_loops = self.emulated = self.tsc_fixed = False
        self.unstopped: list[str] = found.unstopped if found else []
        if mode == "off" or found is None:
            return
        self.emulated = not found.native
        self.vmcall_loops = forced or found.vmcall_loops
        self.tsc_fixed = forced or found.tsc_fixed
        if forced or found.missing:
            self.remedies |= COMPLETE
        if forced or found.syscall_broken:
            self.remedies |= SYSCALL
        if self.vmcall_loops:
            self.remedies |= HYPERCALL
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
    return os.path.join(cache_folder(), f"host-4-{boot}-{tag}")


_MODULES = ("kvm", *_BACKENDS)


def identity(sysfs: str = "/sys/module") -> str:
    """What the findings hold for, in one line: the kernel, and each of KVM's modules with version and parameters.

    A module may be loaded anew, with others, while the host runs. What cannot be read is left out.
    """
    kernel = os.uname()
    words = [kernel.release, kernel.version]
    for module in _MODULES:
        folder = f"{sysfs}/{module}"
        if not os.path.isdir(folder):
            continue
        words.append(module)
        for name in ("srcversion", "version"):
            words += _attribute(f"{folder}/{name}", name)
        try:
            parameters = sorted(os.listdir(f"{folder}/parameters"))
        except OSError:
            continue
        for name in parameters:
            words += _attribute(f"{folder}/parameters/{name}", name)
    return " ".join(words)


def _attribute(path: str, name: str) -> list[str]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return [f"{name}={' '.join(os.read(file, 4096).decode(errors='replace').split())}"]
    except OSError:
        return []
    finally:
        os.close(file)


_known: dict[str, Findings] = {}


def findings(kvm: str = "/dev/kvm") -> Findings:
    """The probes' findings: of this process, else of this boot of the host and this KVM, else made now."""
    if kvm not in _known:
        try:
            with open(_cache_file(kvm)) as file:
                first, _, text = file.read().partition("\n")
            if first != identity():
                return probe_now(kvm)
            _known[kvm] = Findings.from_text(text)
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
            file.write(f"{identity()}\n{found.as_text()}")
        os.replace(f"{path}.{os.getpid()}", path)
    except OSError:
        pass  # a read-only home costs the next start a probe
    return found


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
    return next((name for module, name in _BACKENDS.items() if os.path.isdir(f"/sys/module/{module}")), "unknown")
