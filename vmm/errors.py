"""Every exception pyvmm raises on purpose, and the one table of native error codes.

Three kinds of failure are kept apart: what the *user* asked for cannot be (``ConfigError`` and below: the CLI
prints the sentence and exits with status 2), what the *host* refused (``HostError``), and a guest that broke
the rules, which is never an exception but an :class:`vmm.outcome.Outcome`.
"""

from __future__ import annotations


class VmmError(Exception):
    """Base of everything pyvmm raises on purpose; its text is one sentence that names the fix."""


class ConfigError(VmmError):
    """The request itself is wrong: a size, a count, a flag, a machine file. ``errno``: native code's, or 0."""

    errno = 0


class ImageError(ConfigError):
    """A kernel, initrd or other image cannot be used: missing, truncated, lying, or of no known kind."""


class SnapshotError(ConfigError):
    """A snapshot cannot be used or made: damaged, of another format, its parent another one than it was."""


class MigrationError(VmmError):
    """A machine did not move: the other side refused, the link was lost, it was cancelled.

    It runs where it ran, unless ``undecided``: then it is held here, and nobody knows here whether it runs there (see
    ``docs/migration.md``).
    """

    undecided = False


class HostError(VmmError):
    """The host said no: /dev/kvm missing or forbidden, a capability absent, an ioctl refused.

    ``errno`` is the host's error number, or 0 when the refusal was not a system call's.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class GuestMemoryError(VmmError, IndexError):
    """An access by guest-physical address that no memory region holds. ``gpa`` and ``size`` say which."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"guest-physical range {gpa:#x}+{size:#x} is not inside guest memory")
        self.gpa = gpa
        self.size = size


class LinearMemoryError(VmmError, IndexError):
    """An access by linear address where the page tables lead to no RAM; ``linear`` is the first such byte."""

    def __init__(self, linear: int, sentence: str) -> None:
        super().__init__(sentence)
        self.linear = linear


class BusError(ConfigError):
    """A device range overlaps another one, is empty, or leaves the address space."""


class StateError(VmmError):
    """The machine is not in a state that allows this call (running, stopped, closed). ``errno``: as above."""

    errno = 0


class ConsoleTimeout(VmmError, TimeoutError):
    """``console.expect`` ran out of time. ``transcript`` holds what the guest printed until then."""

    def __init__(self, message: str, transcript: bytes = b"") -> None:
        super().__init__(message)
        self.transcript = transcript


# errno of a system call -> what the user can do about it
FIXES = {
    11: ": too many processes or threads; raise the limit (ulimit -u)",  # EAGAIN
    12: ": give the host more memory, or the guest less",  # ENOMEM
    24: ": too many open files; raise the limit (ulimit -n)",  # EMFILE
    27: ": raise the limit (ulimit -f)",  # EFBIG
    28: ": make room on the host's disk",  # ENOSPC
    122: ": the quota is used up; make room",  # EDQUOT
}


def kvm_refused(path: str, code: int, text: str) -> VmmError:
    """The exception for a machine that could not be created: what was refused (``-errno``, and the text that came with
    it), and what to do about it."""
    import errno
    import os

    number = -code
    if number == errno.ENOENT:
        return HostError(
            f"{path} does not exist: load the module (modprobe kvm_intel or kvm_amd), enable virtualization in the "
            "firmware, or nested virtualization if this is itself a virtual machine",
            number,
        )
    if number in (errno.EACCES, errno.EPERM):
        return HostError(
            f"no permission to open {path}: add yourself to its group (usermod -aG kvm $USER, then log in again)",
            number,
        )
    if number in (errno.ENODEV, errno.ENXIO):
        return HostError(f"{path} has no driver behind it: load the module (modprobe kvm_intel or kvm_amd)", number)
    if number == errno.EBUSY:
        return HostError(f"{text} says busy: another hypervisor may hold the processor; stop it", number)
    if number in (errno.ENOTTY, errno.EPROTO):
        return HostError(f"{path} is not KVM, or not its API version 12 ({text}): is it the right device?", number)
    return HostError(f"{text}: {os.strerror(number)}", number)
