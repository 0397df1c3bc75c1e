"""Hooks: Python callables that are called for the guest's accesses and exits, whichever device handles them.

They run on the vCPU's thread, which waits for them. Accesses that KVM handles itself cause no call: RAM (use
``machine.watch``), the in-kernel interrupt controllers and timer, virtio doorbells (they are ioeventfds).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from vmm._ffi import HookUpcall, check, ffi, lib
from vmm.bus import MMIO, PIO
from vmm.cpu.vcpu import EXIT_REASONS, Exit
from vmm.errors import BusError, ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from vmm._ffi import vmm_vm

_EXIT_NUMBERS = {name: number for number, name in EXIT_REASONS.items()}
_MASK = (1 << 64) - 1


class Access:
    """One access of a vCPU to a port or a device register, as passed to a hook.

    ``vcpu`` is the vCPU's number, ``address`` the port or guest-physical address, ``size`` 1 to 8 bytes. ``value`` is
    what the guest writes if ``write`` is true, else what it reads (all-ones where no device is attached).
    """

    __slots__ = ("address", "size", "value", "vcpu", "write")

    def __init__(self, vcpu: int, address: int, size: int, write: bool, value: int) -> None:
        self.vcpu = vcpu
        self.address = address
        self.size = size
        self.write = write
        self.value = value

    def __repr__(self) -> str:
        arrow = "<-" if self.write else "->"
        return f"<vCPU {self.vcpu} {self.address:#x}/{self.size} {arrow} {self.value:#x}>"


class Hook:
    """An installed hook. As a context manager it removes itself at the end of the block."""

    __slots__ = ("_remove",)

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove: Callable[[], None] | None = remove

    def remove(self) -> None:
        """Remove the hook. Idempotent. On return the callable is not running, unless it is the caller."""
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()

    def __enter__(self) -> Hook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Hooks:
    """All hooks of a machine. ``failed`` is called with an exception that a callable raises."""

    def __init__(self, vm: vmm_vm, failed: Callable[[BaseException], None]) -> None:
        self._vm: vmm_vm | None = vm
        self._accesses: dict[int, Callable[[Access], int | None]] = {}
        self._exits: dict[int, tuple[frozenset[int], Callable[[int, Exit], object]]] = {}
        self._next_tag = 1
        self._lock = threading.Lock()
        # The handle lives as long as the machine: a vCPU that is late finds an unused tag, not a freed object.
        self._upcall = HookUpcall(self._access, self._exit, failed)
        self._upcall.connect(vm)

    def close(self) -> None:
        """Mark the machine as closed: removing a hook does nothing from now on."""
        self._vm = None

    def __bool__(self) -> bool:
        return bool(self._accesses or self._exits)

    def _tag(self) -> int:
        with self._lock:
            tag, self._next_tag = self._next_tag, self._next_tag + 1
        return tag

    # ports and addresses

    def access(self, space: int, where: int | range, callback: Callable[[Access], int | None]) -> Hook:
        """Call ``callback`` for accesses that touch ``where``, a port or address or a ``range`` of them."""
        addresses = range(where, where + 1) if isinstance(where, int) else where
        shown = f"{addresses.start:#x} to {addresses.stop:#x}"
        if addresses.step != 1 or not addresses or addresses.start < 0 or addresses.stop > _MASK + 1:
            raise ConfigError(f"a hook needs a range of ascending addresses: {shown} is none")
        tag = self._tag()
        self._accesses[tag] = callback
        if self._vm is None:
            raise StateError("the machine is closed: make a new one")
        code = lib.vmm_hook_attach(self._vm, space, addresses.start, len(addresses), tag)
        if code < 0:
            del self._accesses[tag]
            why = ffi.string(lib.vmm_error_text()).decode()
            hint = "; use watch() for memory" if space == MMIO else "; ports are 0 to 0xffff" if space == PIO else ""
            raise BusError(f"cannot hook {shown}: {why}{hint}")

        def remove() -> None:
            if self._vm is not None:
                check(lib.vmm_hook_detach(self._vm, space, tag))
            del self._accesses[tag]

        return Hook(remove)

    def _access(self, native: Any) -> None:
        callback = self._accesses.get(native.tag)
        if callback is None:
            return
        answer = callback(Access(native.vcpu, native.address, native.size, bool(native.write), native.value))
        if answer is not None:
            if not isinstance(answer, int):
                raise TypeError(f"a hook returned {answer!r}: return a number, or None to leave the value as it is")
            native.value = answer & _MASK

    # exits

    def exits(self, reasons: str | Iterable[str], callback: Callable[[int, Exit], object]) -> Hook:
        """Call ``callback`` for exits with these reasons, named as in :data:`vmm.cpu.vcpu.EXIT_REASONS`."""
        names = [reasons] if isinstance(reasons, str) else list(reasons)
        for name in names:
            if name not in _EXIT_NUMBERS:
                raise ConfigError(f"there is no exit reason {name!r}: it is one of {', '.join(_EXIT_NUMBERS)}")
        tag = self._tag()
        with self._lock:
            self._exits = {**self._exits, tag: (frozenset(_EXIT_NUMBERS[name] for name in names), callback)}
            self._set_reasons()

        def remove() -> None:
            with self._lock:
                self._exits = {other: hook for other, hook in self._exits.items() if other != tag}
                self._set_reasons()

        return Hook(remove)

    def _set_reasons(self) -> None:
        if self._vm is not None:
            numbers = {number for reasons, _ in self._exits.values() for number in reasons}
            lib.vmm_hook_exits(self._vm, sum(1 << number for number in numbers))

    def _exit(self, vcpu: int, record: Any) -> None:
        reason = record.reason
        for reasons, callback in self._exits.values():
            if reason in reasons:
                callback(vcpu, Exit(record))
