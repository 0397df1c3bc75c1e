"""Try an installed wheel: the package comes from site-packages, and the hello guest boots from it.

Run by ``make try-wheel`` as ``python tests/bare_wheel.py GUEST``, with the Python of a bare virtual environment. Where
/dev/kvm is missing, only the import and the version are tried, and the last line says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(guest: str) -> None:
    """Import the package, compare the command's version with it, and boot the guest."""
    import vmm
    from vmm._ffi import lib

    home = Path(vmm.__file__).resolve().parent
    assert Path(sys.prefix).resolve() in home.parents, f"{home} is not in {sys.prefix}: the checkout is imported"
    assert lib.KVM_CAP_MAX_VCPUS == 66
    command = str(Path(sys.prefix, "bin", "pyvmm"))
    printed = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert printed == f"pyvmm {vmm.__version__}\n", printed
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print(f"{printed.strip()}: imported from {home}; no /dev/kvm, so nothing was booted")
        return
    done = subprocess.run([command, "boot", "--kernel", guest], capture_output=True, text=True, timeout=120)
    print(done.stdout, done.stderr, sep="", end="")
    assert "hello" in done.stdout.lower(), "the guest printed no greeting"
    assert done.returncode == 33, f"the guest ended with status {done.returncode}, not with 0x10 at the debug-exit port"
    print(f"{printed.strip()}: booted from {home}, exit status {done.returncode}")


if __name__ == "__main__":
    main(sys.argv[1])
