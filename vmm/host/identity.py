"""Identity of this host's KVM: its modules, their parameters, the kernel."""

from __future__ import annotations

import os

BACKENDS = {"kvm_intel": "VMX", "kvm_amd": "SVM", "kvm_pvm": "PVM"}  # the module that offers /dev/kvm
_MODULES = ("kvm", *BACKENDS)


def identity(sysfs: str = "/sys/module") -> str:
    """Return, in one line, what the findings are valid for: the kernel, and KVM's modules with version and parameters.

    A module can be reloaded with other parameters while the host runs. Unreadable attributes are left out.
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


def backend() -> str:
    """Return VMX, SVM, PVM or unknown, by the module that provides /dev/kvm."""
    return next((name for module, name in BACKENDS.items() if os.path.isdir(f"/sys/module/{module}")), "unknown")
