"""Every exception pyvmm raises on purpose, and the one table of native error codes.

There are three kinds of failure: a request of the *user* that cannot be met (``ConfigError`` and its subclasses: the
CLI prints the sentence and exits with status 2), a refusal by the *host* (``HostError``), and a guest that broke the
rules, which is never an exception but an :class:`vmm.outcome.Outcome`.
"""

from __future__ import annotations


class VmmError(Exception):
    """Base of everything pyvmm raises on purpose; its text is one sentence that names the fix."""


class ConfigError(VmmError):
    """The request itself is wrong: a size, a count, a flag, a machine file. ``errno``: native code's, or 0."""

    errno = 0


class ImageError(ConfigError):
    """A kernel, initrd or other image cannot be used: missing, truncated, inconsistent, or of no known kind."""


class SnapshotError(ConfigError):
    """A snapshot cannot be used or made: it is damaged, of another format, or its parent was replaced."""


class MigrationError(VmmError):
    """A migration failed: the destination refused, the link was lost, or it was cancelled.

    The machine continues at the source, unless ``undecided``: then it stays paused at the source, because it may be
    running at the destination (see ``docs/migration.md``).
    """

    undecided = False


class HostError(VmmError):
    """The host refused: /dev/kvm is missing or forbidden, a capability is absent, an ioctl failed.

    ``errno`` is the error number of the system call, or 0 if no system call failed.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class GuestMemoryError(VmmError, IndexError):
    """An access to guest-physical addresses outside every memory region: ``size`` bytes at ``gpa``."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"guest-physical range {gpa:#x}+{size:#x} is not inside guest memory")
        self.gpa = gpa
        self.size = size


class LinearMemoryError(VmmError, IndexError):
    """An access by linear address that the page tables do not map to RAM; ``linear`` is the first such byte."""

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
    """Return the exception for a machine that could not be created, from native code's ``-errno`` and text; it names
    the fix."""
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
