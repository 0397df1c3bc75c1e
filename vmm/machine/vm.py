"""The native virtual machine: its handle, its pauses, and the reason why it stopped."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from vmm._ffi import PYTHON_SAY, check, ffi, lib, pause
from vmm.errors import StateError, kvm_refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vm

KVM_PATH = "/dev/kvm"


class Stopped(NamedTuple):
    """Why the native machine stopped: an ``enum vmm_stop_reason``, its code, and the number of the vCPU that ended it
    (beyond the last one where none did)."""

    reason: int
    code: int
    vcpu: int


class Vm:
    """A native machine on the KVM at ``path``; ``say`` takes what native code tells the user.

    Raises :class:`~vmm.errors.HostError` where KVM refuses.
    """

    def __init__(self, path: str, flags: int, say: Callable[[str], None]) -> None:
        out = ffi.new("vmm_vm **")
        code = lib.vmm_vm_create(path.encode(), flags, out)
        if code < 0:
            raise kvm_refused(path, code, ffi.string(lib.vmm_error_text()).decode())
        self._handle: vmm_vm | None = out[0]
        self._say = ffi.new_handle(say)  # native code holds the only other reference
        lib.vmm_vm_on_message(self._handle, PYTHON_SAY, self._say)
        self._pauses = 0
        self._lock = threading.Lock()

    @property
    def handle(self) -> vmm_vm:
        """The ``vmm_vm *``. Raises :class:`~vmm.errors.StateError` once the machine is closed."""
        if self._handle is None:
            raise StateError("the machine is closed: make a new one")
        return self._handle

    @property
    def is_open(self) -> bool:
        """Whether there is a native machine."""
        return self._handle is not None

    def extension(self, capability: int) -> int:
        """KVM's value for a ``KVM_CAP_*``; 0 where it lacks it."""
        return int(lib.vmm_vm_check_extension(self.handle, capability))

    # ---- stopping ----

    @property
    def stop_fd(self) -> int:
        """A file descriptor that is readable once the machine has stopped."""
        return int(lib.vmm_vm_stop_fd(self.handle))

    def stop(self, reason: int, code: int = 0) -> None:
        """Ask every vCPU to stop, for an ``enum vmm_stop_reason``; the first reason counts. Does not wait."""
        lib.vmm_vm_stop(self.handle, reason, code)

    def stopped(self) -> Stopped:
        """Return why it stopped."""
        code, number = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        reason = int(lib.vmm_vm_stop_reason(self.handle, code, number))
        return Stopped(reason, int(code[0]), int(number[0]))

    def rearm(self) -> None:
        """Let a machine that has stopped run again."""
        check(lib.vmm_vm_rearm(self.handle))

    # ---- pausing ----

    def pause(self) -> None:
        """Hold every vCPU between two instructions. Nests."""
        pause(self.handle)
        with self._lock:
            self._pauses += 1

    def resume(self) -> None:
        """Undo one :meth:`pause`."""
        check(lib.vmm_vm_resume(self.handle))
        with self._lock:
            self._pauses -= 1

    @property
    def paused(self) -> bool:
        """Whether a :meth:`pause` is in force."""
        return self._pauses > 0

    def close(self) -> None:
        """Destroy the native machine, which must not run. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.vmm_vm_destroy(handle)
