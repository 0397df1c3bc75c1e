"""The only module that imports native code, and the only one concerned with the GIL.

Every function of ``lib`` releases the GIL while it runs, so a vCPU thread inside ``vmm_vcpu_run`` does not hold it. An
access to a device written in Python takes it again: the native bus calls :class:`Upcall`.
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
_SLICE_MS = 100  # of one native wait: the longest delay of a signal handler on a waiting thread


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
    """Return a native function's non-negative result, or raise the exception for its ``-errno``."""
    if code < 0:
        text = ffi.string(lib.vmm_error_text()).decode(errors="replace")
        raise from_native(code, text, lib.vmm_error_source(code))
    return code


def wait(native: Callable[[int], int], timeout: float | None) -> int:
    """Wait ``timeout`` seconds (``None``: without a limit) in ``native(milliseconds)``, which returns 0 only when its
    time is up; return its last result.

    Python runs signal handlers only between two native calls, so a wait consists of short ones. It raises what a
    handler raises (``KeyboardInterrupt``, a test's time limit).
    """
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _SLICE_MS if end is None else max(0, math.ceil((end - time.monotonic()) * 1000))
        result = native(min(left, _SLICE_MS))
        if result or (end is not None and left <= _SLICE_MS):
            return result


def pause(vm: vmm_vm) -> None:
    """Pause a native machine and wait until all of it stands; ``vmm_vm_resume`` undoes it.

    Code of a device can delay a vCPU without limit. If a signal handler raises meanwhile, this raises the same
    exception, and the machine is not paused.
    """
    check(lib.vmm_vm_request_pause(vm))
    try:
        check(wait(lambda milliseconds: int(lib.vmm_vm_await_pause(vm, milliseconds)), None))
    except BaseException:
        lib.vmm_vm_resume(vm)
        raise


class Upcall:
    """A Python ``read``/``write`` pair for the native bus: pass ``opaque`` with :data:`PYTHON_OPS`.

    An exception in either is passed to ``failed`` (which must stop the machine and keep the exception); the guest's
    read then returns all-ones.
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
    except BaseException as error:  # must not be lost: wait() raises it to the caller
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
    """Receiver of hook events for native code, called on vCPU threads. An exception is passed to ``failed``.

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
        """Connect it to ``vm``; it must live as long as ``vm``."""
        lib.vmm_vm_on_hook(vm, lib.vmm_py_hook_access, lib.vmm_py_hook_exit, self.opaque)


@ffi.def_extern()
def vmm_py_hook_access(opaque: Any, access: Any) -> None:
    """Report an access that a hook covers."""
    upcall: HookUpcall = _from_handle(opaque)
    try:
        upcall.access(access)
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_hook_exit(opaque: Any, vcpu: int, record: Any) -> None:
    """Report an exit with a hooked reason."""
    upcall: HookUpcall = _from_handle(opaque)
    try:
        upcall.exit(vcpu, record)
    except BaseException as error:
        upcall.failed(error)


class VirtioUpcall:
    """A Python virtio device for native code: pass ``opaque`` with :data:`PYTHON_VIRTIO_OPS`.

    All functions are called with the device's lock held. An exception is passed to ``failed``.
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
    """Handle DRIVER_OK for a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.start()
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_virtio_kick(opaque: Any, queue: int) -> None:
    """Handle a notification of a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.kick(queue)
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_virtio_stop(opaque: Any) -> None:
    """Handle a reset of a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.stop()
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_virtio_quiesce(opaque: Any) -> None:
    """Complete all requests in flight of a virtio device written in Python."""
    upcall: VirtioUpcall = _from_handle(opaque)
    try:
        upcall.quiesce()
    except BaseException as error:
        upcall.failed(error)


@ffi.def_extern()
def vmm_py_say(opaque: Any, text: Any) -> None:
    """Pass a message of the machine to the function of which ``opaque`` is a handle."""
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
