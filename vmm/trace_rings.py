"""The native exit trace (``native/include/vmmtrace.h``) as Python reads it: switching it, its clock, its raw events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm._ffi import vmm_vm

CAPACITY_MIN, CAPACITY_MAX = 64, 1 << 24
EVENT_BYTES = ffi.sizeof("vmm_trace_event")
_IO_THREAD = (1 << 32) - 1
_BATCH = 4096


class TraceRings:
    """The rings of one machine's threads: its vCPUs, by number, and the I/O thread. One reader."""

    def __init__(self, vm: vmm_vm, vcpus: Iterable[int]) -> None:
        self._vm = vm
        self._positions = {number: ffi.new("uint64_t *") for number in (*vcpus, _IO_THREAD)}
        self._lost = ffi.new("uint64_t *")
        self._events = ffi.new("vmm_trace_event[]", _BATCH)
        self._capacity = 0

    def start(self, capacity: int) -> None:
        """Start tracing; rings keep the ``capacity`` of the first call, in events. Raises
        :class:`~vmm.errors.ConfigError` unless that is a power of two, 64 to 2^24."""
        if not CAPACITY_MIN <= capacity <= CAPACITY_MAX or capacity & (capacity - 1):
            raise ConfigError(f"a ring of {capacity} events: give a power of two, {CAPACITY_MIN} to {CAPACITY_MAX}")
        if self._capacity:
            self.read()  # drop what an earlier trace left
        self._capacity = self._capacity or capacity
        check(lib.vmm_trace_start(self._vm, capacity))

    def stop(self) -> None:
        """Stop tracing; recorded events can still be read."""
        lib.vmm_trace_stop(self._vm)

    def read(self) -> tuple[bytes, int]:
        """Return the events since the last call, thread after thread, as ``vmm_trace_event`` records of
        :data:`EVENT_BYTES` each, and the number of events that were overwritten before they could be read.

        It reads at most two rings' worth per thread, so that a guest which exits without end cannot hold the caller.
        """
        parts: list[bytes] = []
        self._lost[0] = 0
        for number, position in self._positions.items():
            for _ in range(max(2 * self._capacity // _BATCH, 1)):
                n = lib.vmm_trace_read(self._vm, number, position, self._events, _BATCH, self._lost)
                parts.append(bytes(ffi.buffer(self._events, n * EVENT_BYTES)))
                if n < _BATCH:
                    break
        return b"".join(parts), int(self._lost[0])

    @staticmethod
    def event_layout() -> Any:
        """Return the layout of a ``vmm_trace_event`` as numpy's dtype takes it: names, formats, offsets, size."""
        fields = ffi.typeof("vmm_trace_event").fields
        plain = [(name, field) for name, field in fields if field.type.kind == "primitive"]
        return {
            "names": [name for name, _ in plain],
            "formats": [
                ("i" if int(ffi.cast(field.type, -1)) < 0 else "u") + str(ffi.sizeof(field.type)) for _, field in plain
            ],
            "offsets": [field.offset for _, field in plain],
            "itemsize": EVENT_BYTES,
        }

    @staticmethod
    def clock() -> tuple[int, int]:
        """Return the TSC and CLOCK_MONOTONIC in nanoseconds, sampled at one moment."""
        tsc, ns = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.vmm_trace_clock(tsc, ns)
        return int(tsc[0]), int(ns[0])
