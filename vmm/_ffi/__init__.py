"""The only door to native code, and the only file that says GIL.

Every function of ``lib`` releases the GIL while it runs: a vCPU thread inside ``vmm_vcpu_run`` holds none. It is
taken again only when a device written in Python is accessed: :class:`Upcall` is what the native bus then calls.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from vmm._native import ffi, lib
from vmm.errors import FIXES, ConfigError, HostError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    # Handles, for annotations; vmm/_native.pyi has every other struct, which is reached through these.
    from vmm._native import vmm_blk as vmm_blk
    from vmm._native import vmm_checkpoint as vmm_checkpoint
    from vmm._native import vmm_console as vmm_console
    from vmm._native import vmm_dirty as vmm_dirty
    from vmm._native import vmm_disk as vmm_disk
    from vmm._native import vmm_lazy as vmm_lazy
    from vmm._native import vmm_line as vmm_line
    from vmm._native import vmm_net as vmm_net
    from vmm._native import vmm_uart as vmm_uart
    from vmm._native import vmm_vcpu as vmm_vcpu
    from vmm._native import vmm_vcpu_state as vmm_vcpu_state
    from vmm._native import vmm_virtio as vmm_virtio
    from vmm._native import vmm_vm as vmm_vm
    from vmm.errors import VmmError

__all__ = [
    "PYTHON_OPS", "PYTHON_SAY", "PYTHON_VIRTIO_OPS", "HookUpcall", "Upcall", "VirtioUpcall", "check", "ffi",
    "from_native", "lib", "pause", "wait",
]  # fmt: skip

_MASK = (1 << 64) - 1
_SLICE_MS = 100  # of a native wait: how late a signal's handler may run on a thread that waits


def from_native(code: int, text: str, source: int) -> VmmError:
    """The exception for a native ``-errno``, the text that came with it (``vmm_error_text``), and where it comes from
    (``vmm_error_source``): the one table of native codes.

    A number means one thing as the host's answer to a system call and another as native code's own refusal: only the
    latter is named here. A device range that is taken is :class:`BusError`, which :mod:`vmm.bus` and
    :mod:`vmm.hooks` raise, as they know that they asked for one.
    """
    import errno
    import os

    if source == lib.VMM_ERROR_REFUSED and -code in (errno.EBUSY, errno.EALREADY, errno.EEXIST, errno.EDEADLK):
        error: StateError | ConfigError | HostError = StateError(
            f"{text}: call it from another thread" if code == -errno.EDEADLK else text
        )
    elif source == lib.VMM_ERROR_REFUSED and code == -errno.ENOSPC:
        error = ConfigError(f"{text}: that is as many as there can be")
    elif source == lib.VMM_ERROR_UNTOLD:
        error = HostError(f"a request to native code failed: {os.strerror(-code)}")
    else:
        error = HostError(f"{text}: {os.strerror(-code)}{FIXES.get(-code, '') if source == lib.VMM_ERROR_HOST else ''}")
    error.errno = -code
    return error


def check(code: int) -> int:
    """Answer a native function's non-negative result, or raise what its ``-errno`` stands for."""
    if code < 0:
        text = ffi.string(lib.vmm_error_text()).decode(errors="replace")
        raise from_native(code, text, lib.vmm_error_source(code))
    return code


def wait(native: Callable[[int], int], timeout: float | None) -> int:
    """Wait ``timeout`` seconds (``None``: as long as it takes) in ``native(milliseconds)``, which returns 0 only
    when its time is up: return its last result.

    Python runs a signal's handler only between two calls, so a wait is made of short ones. What the handler raises
    (``KeyboardInterrupt``, a test's time limit) comes out of here.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _SLICE_MS if end is None else max(0, math.ceil((end - time.monotonic()) * 1000))
        result = native(min(left, _SLICE_MS))
        if result or (end is not None and left <= _SLICE_MS):
            return result


def pause(vm: vmm_vm) -> None:
    """Pause a native machine and wait until all of it stands; ``vmm_vm_resume`` undoes it.

    A device's own code may keep a vCPU for as long as it likes: what a signal's handler raises meanwhile comes out of
    here, and the machine is not paused then.
    """
    check(lib.vmm_vm_request_pause(vm))
    try:
        check(wait(lambda milliseconds: int(lib.vmm_vm_await_pause(vm, milliseconds)), None))
    except BaseException:
        lib.vmm_vm_resume(vm)
        raise


class Upcall:
    """A Python ``read``/``write`` pair as the native bus sees it: ``opaque`` goes beside :data:`PYTHON_OPS`.

    An exception in either is given to ``failed`` (which is to stop the machine and keep the exception); the
    guest's read is then answered with all-ones.
    """

    __slots__ = ("failed", "opaque", "read", "write")

    def __init__(
        self,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.read = read
        self.write = write
        self.failed = failed
        self.opaque: Any = ffi.new_handle(self)


_from_handle = ffi.from_handle


@ffi.def_extern(error=_MASK)
def vmm_py_read(opaque: Any, offset: int, size: int) -> int:
    """Read for a device written in Python."""
    upcall: Upcall = _from_handle(opaque)
    try:
        return upcall.read(offset, size) & _MASK
    except BaseException as error:  # it must not vanish here: the run's caller gets it as itself
        upcall.failed(error)
        return _MASK


@ffi.def_extern()
def vmm_py_write(opaque: Any, offset: int, size: int, value: int) -> None:
    """Write for a device written in Python."""
    upcall: Upcall = _from_handle(opaque)
    try:
        upcall.write(offset, size, value)
    except BaseException as error:
        upcall.failed(error)


PYTHON_OPS = ffi.new("vmm_device_ops *", {"read": lib.vmm_py_read, "write": lib.vmm_py_write})


class HookUpcall:
    """What takes the events of hooks, as native code sees it; on vCPU threads. An exception goes to ``failed``.

    ``access`` gets a native ``vmm_access`` and may change its value; ``exit`` a vCPU's number and an exit record.
    """

    __slots__ = ("access", "exit", "failed", "opaque")

    def __init__(
        self,
        access: Callable[[Any], None],
        exit: Callable[[int, Any], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.access = access
        self.exit = exit
        self.failed = failed
        self.opaque: Any = ffi.new_handle(self)

    def connect(self, vm: vmm_vm) -> None:
        """Have ``vm`` tell it; it must last as long as ``vm``."""
        lib.vmm_vm_on_hook(vm, lib.vmm_py_hook_access, lib.vmm_py_hook_exit, self.opaque)


@ffi.def_extern()
def vmm_py_hook_access(opaque: Any, access: Any) -> None:
    """An access that a hook covers."""
    upcall: HookUpcall = _from_handle(opaque)
    try:
        upcall.access(access)
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_hook_exit(opaque: Any, vcpu: int, record: Any) -> None:
    """An exit of a reason that is hooked."""
    upcall: HookUpcall = _from_handle(opaque)
    try:
        upcall.exit(vcpu, record)
    except BaseException as error:
        upcall.failed(error)


class VirtioUpcall:
    """A Python virtio device as native code sees it: ``opaque`` goes beside :data:`PYTHON_VIRTIO_OPS`.

    All are called with the device's lock held. An exception goes to ``failed``.
    """

    __slots__ = ("failed", "kick", "opaque", "quiesce", "start", "stop")

    def __init__(
        self,
        start: Callable[[], None],
        kick: Callable[[int], None],
        stop: Callable[[], None],
        quiesce: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.start = start
        self.kick = kick
        self.stop = stop
        self.quiesce = quiesce
        self.failed = failed
        self.opaque: Any = ffi.new_handle(self)


@ffi.def_extern()
def vmm_py_virtio_start(opaque: Any) -> None:
    """DRIVER_OK for a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.start()
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_virtio_kick(opaque: Any, queue: int) -> None:
    """A doorbell of a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.kick(queue)
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_virtio_stop(opaque: Any) -> None:
    """The end of a driver, for a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.stop()
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_virtio_quiesce(opaque: Any) -> None:
    """Nothing is to be in flight, for a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.quiesce()
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_say(opaque: Any, text: Any) -> None:
    """A message of the machine: ``opaque`` is a handle of the function that takes it."""
    _from_handle(opaque)(ffi.string(text).decode(errors="replace"))


PYTHON_SAY = lib.vmm_py_say
PYTHON_VIRTIO_OPS = ffi.new(
    "vmm_virtio_ops *",
    {
        "start": lib.vmm_py_virtio_start,
        "kick": lib.vmm_py_virtio_kick,
        "stop": lib.vmm_py_virtio_stop,
        "quiesce": lib.vmm_py_virtio_quiesce,
    },
)
