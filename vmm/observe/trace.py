"""The exit trace of a machine, as it runs.

    with machine.trace() as trace:
        machine.run(timeout=5)
    for event in trace.events: print(trace.line(event))

Nothing runs beside the guest: the rings are read by :meth:`Trace.collect`, by iterating, and by :meth:`Trace.stop`.
"""

from __future__ import annotations

import select
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmm.errors import StateError, VmmError
from vmm.observe.recording import IO, MMIO, Code, Recording, TracedDevice, event_type

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from vmm.observe.subject import Traced
    from vmm.trace_rings import TraceRings

_NONE = (1 << 64) - 1  # register -1
INTERVAL = 0.05  # seconds between two looks into the rings while iterating
CODE_MAX = 1 << 16  # places whose instruction is remembered
_BEFORE, _AT = 15, 15  # an instruction has at most 15 bytes


class Trace(Recording):
    """A recording that grows. Made by ``machine.trace()``; begun already.

    ``keep``: how many events are kept here, the newest. ``instructions``: read the guest's code at each place that
    traps; the machine is paused for that moment, once a place.
    """

    def __init__(self, machine: Traced, rings: TraceRings, *, capacity: int, keep: int, instructions: bool) -> None:
        super().__init__()
        self._machine = machine
        self._rings = rings
        self._keep = keep
        self._look = instructions
        self._chunks: list[Any] = []
        self._n = 0
        self._reading = threading.Lock()
        self.vcpus = len(machine.vcpus)
        self.note = machine.config.kernel or ""
        self.began = time.time()
        self._first = self._last = rings.clock()
        rings.start(capacity)
        self.on = True
        self._closed = False
        self._searched = False

    # ---- life ----

    def stop(self) -> None:
        """Stop tracing, and read the remaining events. Idempotent."""
        if self.on:
            self.on = False
            self._rings.stop()
            self._let_exits_end()
            self.collect()
            self._searched = False  # a kernel that had no names yet may have them now

    def finish(self) -> None:
        """Stop, and leave the machine alone from now on: it is about to be closed."""
        self.stop()
        self._closed = True

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Trace of {self._n} events, {self.lost + self.dropped} missing, {'on' if self.on else 'stopped'}>"

    # ---- events ----

    @property
    def events(self) -> Any:
        """All events collected so far, by time (:func:`vmm.observe.recording.event_type`)."""
        import numpy as np

        if self._kept is None or len(self._kept) != self._n or self.on:
            found = np.concatenate(self._chunks) if self._chunks else np.zeros(0, event_type())
            self._kept = self._in_nanoseconds(found[np.argsort(found["time"], kind="stable")])
        return self._kept

    def __iter__(self) -> Iterator[Any]:
        """Events as they come, until the machine has ended or the trace is stopped; sleeps in between.

        In order of time, except that one which took long may come later than one which began after it.
        """
        while True:
            going = self.on and not self._wait()
            if not going:
                self._let_exits_end()
            yield from self.collect()
            if not going:
                return

    def _wait(self) -> bool:
        """Sleep a little; whether the machine has ended."""
        try:
            return bool(select.select([self._machine.stop_fd], [], [], INTERVAL)[0])
        except (StateError, ValueError, OSError):  # closed meanwhile
            return True

    def _let_exits_end(self) -> None:
        """An exit is in its ring once it was handled: a pause makes sure of the last ones."""
        with suppress(VmmError):
            self._machine.pause()
            self._machine.resume()

    def collect(self) -> Any:
        """Read the events in the rings, and return them in order of time."""
        import numpy as np

        if self._closed:
            return np.zeros(0, event_type())
        with self._reading:
            raw, lost = self._rings.read()
            self.lost += lost
            self._last = self._rings.clock()
            native = np.frombuffer(raw, np.dtype(self._rings.event_layout()))
            native = native[np.argsort(native["tsc"], kind="stable")]
            events = self._translated(native)
            self._add(events)
        self._read_code(events)  # pauses: a device that collects must not wait for us then
        return self._in_nanoseconds(events)

    def _translated(self, native: Any) -> Any:
        """Native events as ours, but for times, which stay ticks of the TSC until they are asked for."""
        import numpy as np

        events = np.zeros(len(native), event_type())
        for ours in ("rip", "address", "value", "duration", "count", "vcpu", "size", "write", "claimed"):
            events[ours] = native[ours]
        events["device"], events["reason"] = native["tag"], native["kind"]
        events["time"] = native["tsc"].astype(np.int64) - self._first[0]
        events["register"] = -1
        attachments = self._machine.bus.attachments
        for tag in np.unique(events["device"]).tolist():
            attachment = attachments.get(tag)
            if attachment is None:
                continue
            device = attachment.device
            self.devices.setdefault(tag, TracedDevice(attachment.name, device.registers))
            mine = (events["device"] == tag) & np.isin(events["reason"], (IO, MMIO))
            # Where a BAR is, is the guest's to say: holds() looks it up.
            attachment.holds(attachment.space, 0)
            offset = events["address"][mine] - np.uint64(attachment.base)  # below the base: wraps, and is too far
            inside = offset < attachment.size
            found = np.where(inside, offset + np.uint64(attachment.first), np.uint64(_NONE))
            events["register"][mine] = found.view(np.int64)
        return events

    def _add(self, events: Any) -> None:
        if not len(events):
            return
        self._chunks.append(events)
        self._n += len(events)
        while self._n - len(self._chunks[0]) >= self._keep:
            gone = len(self._chunks.pop(0))
            self._n -= gone
            self.dropped += gone

    def _in_nanoseconds(self, events: Any) -> Any:
        """A copy of events whose times are ticks, scaled by the longest span of both clocks there is."""
        events = events.copy()
        ticks, ns = (last - first for first, last in zip(self._first, self._last, strict=True))
        scale = ns / ticks if ticks > 0 else 1.0
        for field in ("time", "duration"):
            events[field] = (events[field] * scale).astype(events[field].dtype)
        return events

    # ---- code ----

    def _read_code(self, events: Any) -> None:
        """Remember the code at places that were not met before."""
        import numpy as np

        if not self._look:
            return
        rips, first = np.unique(events["rip"], return_index=True)
        vcpus = events["vcpu"][first]
        new = [(rip, vcpu) for rip, vcpu in zip(rips.tolist(), vcpus.tolist(), strict=True)
               if rip and vcpu >= 0 and rip not in self.code]  # fmt: skip
        if not new or len(self.code) + len(new) > CODE_MAX:
            return
        try:
            self._machine.pause()
        except VmmError:  # asked for on a vCPU's own thread
            return
        try:
            readers = {vcpu: _CodeReader(self._machine, vcpu) for vcpu in {vcpu for _, vcpu in new}}
            for rip, vcpu in new:
                self.code[rip] = readers[vcpu].code(rip)
        finally:
            self._machine.resume()

    # ---- symbols ----

    def symbol_of(self, rip: int) -> str:
        """``symbol+offset`` of an address, by the machine's symbols unless :meth:`use_symbols` gave others.

        They are looked for when first needed, and again once the trace is stopped: a Linux kernel's own are in its
        memory only some way into the boot, and no more once the machine is closed.
        """
        if rip and self.symbols is None and not self._searched:
            self._searched = True
            if found := self._machine.symbols:
                self.use_symbols(found)
        return super().symbol_of(rip)


class _CodeReader:
    """Reads a paused vCPU's code; its registers and page tables are looked at once."""

    def __init__(self, machine: Traced, number: int) -> None:
        from vmm.cpu.paging import LinearMemory

        vcpu = machine.vcpus[number]
        paging = vcpu.paging()
        self._memory = LinearMemory(machine.memory, lambda: paging)
        self._bits = vcpu.bits
        self._base = 0 if self._bits == 64 else vcpu.registers()["cs_base"]

    def code(self, rip: int) -> Code:
        linear = (rip + self._base) & ((1 << 64) - 1)
        at = self._memory.read(linear, self._memory.readable(linear, _AT))
        before = min(_BEFORE, linear)
        try:
            earlier = self._memory.read(linear - before, before)
        except LookupError:
            earlier = b""
        return Code(linear, earlier, at, self._bits)
