"""Clones: machines that continue from the state of another one and share its memory and disks copy-on-write.

The memory of the original is frozen once: it and its clones map the same file privately. Pages that the original has
written since are not in the file. Later clones get copies of those pages, or all memory in use is written to a new
file that they share, whichever takes less memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from vmm._ffi import check, ffi, lib
from vmm.errors import ConfigError, StateError
from vmm.memory import runs_of
from vmm.snapshot import clock as clocks
from vmm.snapshot import identity
from vmm.snapshot.origin import Origin
from vmm.snapshot.regions import PAGE, Ram, bitmap_size, checksums_size, pages_not_zero, words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from vmm.config import MachineConfig
    from vmm.memory import GuestMemory
    from vmm.parts import Net
    from vmm.snapshot.subject import Restorable, Stateful

if TYPE_CHECKING:
    M = TypeVar("M", bound=Restorable)

# Settings that a clone inherits; the debugger's port and the console stay the original's.
_USES = ("timeout", "stall", "symbols", "screen", "reboot")

_AT_ONCE = 4  # more gain nothing, since Python loads a machine's state under the GIL


class CloneSource:
    """The state of a paused machine for ``n`` clones. Create each from ``origin`` and :meth:`config`, call
    :meth:`finish` on it, and :meth:`close` this afterwards. Raises StateError for a machine that cannot be cloned."""

    def __init__(self, machine: Stateful, symbols: str | None, n: int, clock: str) -> None:
        clocks.advances(clock)
        self._clock = clock
        if n < 1:
            raise ConfigError(f"{n} clones: ask for one at least")
        if machine.config.huge_pages:
            raise StateError("memory on huge pages is not shared with clones: leave huge_pages off")
        self._fds: list[int] = []
        self._disks: Any = None
        self._config = machine.config
        self._state = machine.save()  # before memory: quiescing devices completes requests, which writes it
        try:
            files, self._changed = self._share(machine.memory, n)
            self.origin = Origin(machine.describe(), files=files)
            self.origin.symbols = symbols
            if machine.config.disks:
                from vmm.snapshot.disks import FrozenDisks

                self._disks = FrozenDisks(machine.config.disks, machine.disks)
        except BaseException:
            self.close()
            raise

    def config(self, given: Mapping[str, Any]) -> MachineConfig:
        """Return a clone's configuration, with the fields ``given`` for it. Raises :class:`~vmm.errors.ConfigError`."""
        places: dict[str, Any] = {name: getattr(self._config, name) for name in _USES}
        places["vsock"] = self._config.vsock
        if self._disks is not None:
            places["disks"] = self._disks.disks
        if "nets" not in given:
            places["nets"] = tuple(_apart(index, net) for index, net in enumerate(self._config.nets))
        config = identity.another(self.origin.config({**places, **given}), given)
        if config.vsock is not None and "vsock" not in given:
            config = config.with_(vsock=config.vsock.with_(path=f"{config.vsock.path}.{config.vsock.cid}"))
        return config

    def finish(self, clone: Restorable, *, renew: bool = True) -> None:
        """Load the rest of the state into a machine created with ``origin``; on an error it is closed. ``renew`` gives
        it a new identity (:mod:`vmm.snapshot.identity`)."""
        try:
            for gpa, data in self._changed:
                clone.memory.write(gpa, data)
            clone.timeline.load(self._state, clock=self._clock)
            if renew:
                identity.renew(clone)
        except ValueError as error:
            clone.close()
            raise StateError(f"devices that were added to a machine are not cloned with it ({error})") from None
        except BaseException:
            clone.close()
            raise
        for index, (was, net) in enumerate(zip(self._config.nets, clone.config.nets, strict=True)):
            if was.hostfwd and not net.hostfwd:
                clone.notes.append(f"net {index}: ports of the host go on leading to the original, not to this clone")

    def _share(self, memory: GuestMemory, n: int) -> tuple[list[tuple[int, int]], list[tuple[int, bytes]]]:
        """Return the files that clones map, and the pages that each copies over them."""
        if not memory.private:
            return memory.freeze(), []
        rams = [Ram(*region) for region in memory.backing()]
        changed = [run for ram in rams for run in _changed(ram)]
        if n * sum(size for _, size in changed) <= sum(map(_held, rams)):
            files = [(self._keep(os.dup(ram.fd)), ram.offset) for ram in rams]
            return files, [(gpa, memory.read(gpa, size)) for gpa, size in changed]
        return [(self._keep(_copied(ram)), 0) for ram in rams], []

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        """Release what only creating clones needs; existing clones do not depend on it."""
        while self._fds:
            os.close(self._fds.pop())
        if self._disks is not None:
            self._disks.close()

    def __enter__(self) -> CloneSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_together(make: Callable[[int], M], n: int) -> list[M]:
    """Create ``n`` machines, several at a time, because creating one mostly waits for RCU grace periods. On an error
    close all of them and raise the first exception of ``make``."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(n, _AT_ONCE)) as pool:
        making = [pool.submit(make, index) for index in range(n)]
    errors = [error for future in making if (error := future.exception())]
    made = [future.result() for future in making if not future.exception()]
    if errors:
        for machine in made:
            machine.close()
        raise errors[0]
    return made


def _apart(index: int, net: Net) -> Net:
    """Return the network for a clone. Raises :class:`~vmm.errors.ConfigError` for a back end that cannot be shared."""
    if net.backend != "user":
        other = f'fields=lambda clone: {{"nets": Net("{net.backend}", {net.backend}=...)}}'
        raise ConfigError(
            f"net {index} is the {net.backend} {getattr(net, net.backend)}, the original's: name others, {other}"
        )
    apart: Net = net.with_(hostfwd=())
    return apart


# ---- memory ----


def _changed(ram: Ram) -> list[tuple[int, int]]:
    """Return the runs ``(gpa, size)`` of pages of a private mapping that this machine has written."""
    own = bytearray(bitmap_size(ram.size))
    check(lib.vmm_pages_own(ffi.from_buffer(ram.view), ram.size, words(own)))
    return [(ram.gpa + first * PAGE, n * PAGE) for first, n in runs_of(int.from_bytes(own, "little"))]


def _held(ram: Ram) -> int:
    """Return the bytes of a region that its file holds (extents, not holes)."""
    held, at, end = 0, ram.offset, ram.offset + ram.size
    while at < end:
        try:
            at = os.lseek(ram.fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no further extent
            break
        hole = min(os.lseek(ram.fd, at, os.SEEK_HOLE), end)
        held += max(hole - at, 0)
        at = hole
    return held


def _copied(ram: Ram) -> int:
    """Copy the content of a region to a new file; return its descriptor."""
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, ram.size)
        sums = ffi.new("uint32_t[]", checksums_size(ram.size) // 4)
        check(lib.vmm_pages_write(fd, 0, ffi.from_buffer(ram.view), ram.size, words(pages_not_zero(ram)), sums))
    except BaseException:
        os.close(fd)
        raise
    return fd
