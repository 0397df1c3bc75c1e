"""What a trace recorded: the events as a numpy array, what is needed to name them, and the file that keeps both.

An event is one record of :data:`FIELDS`:

========== ==== =================================================================================================
time       i8   nanoseconds since the trace began
rip        u8   of the guest; 0: none. After a write, KVM may have moved it behind the instruction already
address    u8   port or guest-physical address; MSR; queue of a doorbell, a request, an interrupt
value      u8   the value written or read; requests served at a doorbell
duration   u8   nanoseconds from the exit to the end of its handling; 0: an event without duration
register   i8   the offset in the device; -1: none
device     u4   key into ``devices``; 0: none
count      u4   accesses of a string instruction, else 1
vcpu       i2   -1: the I/O thread, or a device
reason     u2   KVM's exit reason, or :data:`DOORBELL`, :data:`INTERRUPT`, :data:`REQUESTS`
size       u2   bytes of the access
write      ?    the guest wrote
claimed    ?    a device (or, for an MSR or an emulation failure, pyvmm) handled it
========== ==== =================================================================================================

The file, little-endian: ``pyvmmtrc``, u32 version (1), u32 length of a JSON header, that header, zeroes up to a
multiple of 64, then the events as above, 64 bytes each, to the end. The header's keys are those of
:meth:`Recording._header`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.cpu.vcpu import EXIT_REASONS
from vmm.errors import ConfigError
from vmm.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.observe.symbols import Symbols

FIELDS = [
    ("time", "<i8"), ("rip", "<u8"), ("address", "<u8"), ("value", "<u8"), ("duration", "<u8"), ("register", "<i8"),
    ("device", "<u4"), ("count", "<u4"), ("vcpu", "<i2"), ("reason", "<u2"), ("size", "<u2"), ("write", "?"),
    ("claimed", "?"),
]  # fmt: skip
EVENT_BYTES = 64

IO, HLT, MMIO, SHUTDOWN, INTERNAL_ERROR, RDMSR, WRMSR = 2, 5, 6, 8, 17, 29, 30
DOORBELL, INTERRUPT, REQUESTS = 64, 65, 66  # enum vmm_trace_kind
REASONS = {**EXIT_REASONS, DOORBELL: "doorbell", INTERRUPT: "interrupt", REQUESTS: "requests"}
NO_QUEUE = (1 << 64) - 1  # an interrupt of the configuration

MAGIC, VERSION = b"pyvmmtrc", 1
_HEADER_MAX = 64 << 20
_PRINTABLE = range(32, 127)
_PLAIN = 4096  # events made plain at once


def event_type() -> Any:
    """The numpy dtype of an event."""
    import numpy as np

    return np.dtype(FIELDS)


class TracedDevice:
    """What a device was called, and its registers by offset."""

    __slots__ = ("name", "registers")

    def __init__(self, name: str, registers: dict[int, str]) -> None:
        self.name = name
        self.registers = registers

    def register(self, offset: int, write: bool) -> str:
        """A register's name. One called ``RBR/THR`` is the first when read, the second when written."""
        name = self.registers.get(offset)
        if name is None:
            return f"+{offset:#x}"
        read, _, written = name.partition("/")
        return written if written and write else read


class Code:
    """The bytes around one RIP, as they were when they were read: ``before`` end where it points, ``at`` begin."""

    __slots__ = ("at", "before", "bits", "linear")

    def __init__(self, linear: int, before: bytes, at: bytes, bits: int) -> None:
        self.linear = linear
        self.before = before
        self.at = at
        self.bits = bits


class Recording:
    """Events in order of time, and their names.

    ``events``: the array; ``devices``: by the events' ``device``; ``code``: by RIP; ``lost``: events that were
    overwritten in the rings before they were read; ``dropped``: read, and then discarded as the oldest, for
    more than were to be kept; ``vcpus``: how many there were; ``note``: what was traced.
    """

    def __init__(self) -> None:
        self._kept: Any = None
        self.devices: dict[int, TracedDevice] = {}
        self.code: dict[int, Code] = {}
        self.lost = 0
        self.dropped = 0
        self.vcpus = 1
        self.note = ""
        self.began = 0.0  # UNIX time
        self.symbols: Symbols | None = None
        self._names: dict[int, str | None] = {}
        self._instructions: dict[tuple[int, int, int, bool], str] = {}
        self._symbol_source: dict[str, str] = {}

    @property
    def events(self) -> Any:
        """All of them, one dimension, :func:`event_type`, by time."""
        import numpy as np

        return np.zeros(0, event_type()) if self._kept is None else self._kept

    def __len__(self) -> int:
        return len(self.events)

    @property
    def missing(self) -> str:
        """A sentence about events that are not here, or an empty one."""
        parts = []
        if self.lost:
            parts.append(f"{self.lost} events were lost (the rings were full: give them more capacity)")
        if self.dropped:
            parts.append(f"{self.dropped} older events were dropped (only so many are kept)")
        return "; ".join(parts)

    @staticmethod
    def plain(events: Any) -> Iterator[dict[str, Any]]:
        """Each event as a dict of plain values, which every method here takes as well: where all are gone through
        one by one, that is several times faster than numpy's records."""
        names = events.dtype.names
        for at in range(0, len(events), _PLAIN):
            for values in events[at : at + _PLAIN].tolist():
                yield dict(zip(names, values, strict=True))

    # ---- names ----

    def reason(self, event: Any) -> str:
        """``io``, ``mmio``, ``doorbell`` ..."""
        reason = int(event["reason"])
        return REASONS.get(reason, f"exit-{reason}")

    def thread(self, event: Any) -> str:
        """Whose event: ``vcpu0``, or ``io`` for the I/O thread and the devices."""
        vcpu = int(event["vcpu"])
        return "io" if vcpu < 0 else f"vcpu{vcpu}"

    def device(self, event: Any) -> str:
        """Return the device's name, ``(unclaimed)`` for an access without a device, or an empty string."""
        tag = int(event["device"])
        if tag and tag in self.devices:
            return self.devices[tag].name
        if int(event["reason"]) in (IO, MMIO):
            return f"device {tag}" if tag and event["claimed"] else "(unclaimed)"
        return f"device {tag}" if tag else ""

    def register(self, event: Any) -> str:
        """The register's name, or where there is none the offset or address; a queue for virtio's events."""
        reason, address = int(event["reason"]), int(event["address"])
        if reason in (DOORBELL, REQUESTS, INTERRUPT):
            return "configuration" if address == NO_QUEUE else f"queue {address}"
        if reason in (RDMSR, WRMSR):
            return f"MSR {address:#x}"
        if reason not in (IO, MMIO):
            return ""
        offset, known = int(event["register"]), self.devices.get(int(event["device"]))
        return known.register(offset, bool(event["write"])) if known and offset >= 0 else f"{address:#x}"

    def symbol(self, event: Any) -> str:
        """``symbol+offset`` of RIP, or an empty string."""
        return self.symbol_of(int(event["rip"]))

    def symbol_of(self, rip: int) -> str:
        """``symbol+offset`` of an address, or an empty string."""
        if rip not in self._names:
            self._names[rip] = self.symbols.name(rip) if self.symbols and rip else None
        return self._names[rip] or ""

    def use_symbols(self, symbols: Symbols) -> None:
        """Name RIPs by these from now on, where they have a name."""
        self.symbols = symbols
        self._names = {rip: name for rip, name in self._names.items() if name and not symbols.name(rip)}
        self._symbol_source = {"origin": symbols.origin, "path": symbols.path or "", "build_id": symbols.build_id.hex()}

    def instruction(self, event: Any) -> str:
        """The guest's instruction, disassembled, or an empty string where its code could not be read.

        KVM leaves RIP at an instruction that reads, and may leave it behind one that wrote: then it is found by its
        effect, an access of that size that ends at RIP.
        """
        rip, write = int(event["rip"]), bool(event["write"])
        key = (rip, int(event["reason"]), int(event["size"]), write)
        if key not in self._instructions:
            from vmm.observe.disassembly import accessing

            code = self.code.get(rip)
            text = ""
            if code is not None:
                access = {IO: "port", MMIO: "memory"}.get(key[1], "")
                text = accessing(code.before, code.at, code.linear, code.bits, access, key[2], write=write)
            self._instructions[key] = text
        return self._instructions[key]

    def describe(self, event: Any) -> str:
        """What happened, in words: ``uart THR <- 0x48 'H'``, ``virtio-blk0 QueueNotify 0``."""
        reason, value, address = int(event["reason"]), int(event["value"]), int(event["address"])
        device, register = self.device(event), self.register(event)
        if reason in (IO, MMIO, RDMSR, WRMSR):
            return f"{device} {register} {_access(event)}".lstrip()
        if reason == DOORBELL:
            return f"{device} QueueNotify {address}"
        if reason == REQUESTS:
            return f"{device} served {value} request{'s' * (value != 1)} of queue {address}"
        if reason == INTERRUPT:
            return f"{device} interrupt {register}"
        if reason == INTERNAL_ERROR:
            return "completed by pyvmm" if event["claimed"] else f"emulation failed, suberror {address}"
        return {HLT: "halted", SHUTDOWN: "triple fault"}.get(reason, f"{address:#x}" if address else "")

    def line(self, event: Any) -> str:
        """One line for a person: time, thread, reason, what happened, how long it took, where, the instruction."""
        duration, rip = int(event["duration"]), int(event["rip"])
        took = in_words(duration) if duration else ""
        symbol = self.symbol(event)
        where = f"{rip:#x}" + (f" <{symbol}>" if symbol else "") if rip else ""
        return printable(
            f"{int(event['time']) / 1e9:12.6f} {self.thread(event):6} {self.reason(event):9} "
            f"{self.describe(event):44} {took:>8}  {where:30} {self.instruction(event)}"
        ).rstrip()

    # ---- the file ----

    def _header(self, events: Any) -> dict[str, Any]:
        import numpy as np

        rips = [int(rip) for rip in np.unique(events["rip"])]
        pairs = np.unique(events[["device", "register"]])
        seen: dict[int, set[int]] = {}
        for device, register in pairs.tolist():
            seen.setdefault(device, set()).add(register)
        return {
            "vcpus": self.vcpus,
            "note": self.note,
            "began": self.began,
            "lost": self.lost,
            "dropped": self.dropped,
            "devices": {
                str(tag): {
                    "name": device.name,
                    "registers": {str(at): device.registers[at] for at in sorted(seen[tag] & device.registers.keys())},
                }
                for tag, device in self.devices.items()
                if tag in seen
            },
            "names": {f"{rip:#x}": name for rip in rips if (name := self.symbol_of(rip))},
            "symbols": self._symbol_source,
            "code": {
                f"{rip:#x}": [f"{code.linear:#x}", code.before.hex(), code.at.hex(), code.bits]
                for rip in rips
                if (code := self.code.get(rip))
            },
        }

    def save(self, path: str) -> None:
        """Write the file described above. Raises :class:`~vmm.errors.ConfigError` when it cannot be written."""
        import json

        events = self.events
        header = json.dumps(self._header(events)).encode()
        start = MAGIC + VERSION.to_bytes(4, "little") + len(header).to_bytes(4, "little") + header
        try:
            with open(path, "wb") as file:
                file.write(start + bytes(-len(start) % EVENT_BYTES))
                file.write(events.data)
        except OSError as error:
            raise ConfigError(f"cannot write the trace to {path}: {error.strerror}; choose another file") from error

    @classmethod
    def load(cls, path: str) -> Recording:
        """Read a file of :meth:`save`. Raises :class:`~vmm.errors.ConfigError` for any other."""
        try:
            with open(path, "rb") as file:
                return cls._read(file)
        except OSError as error:
            raise ConfigError(f"cannot read trace {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{path} is not a trace of pyvmm, or is damaged: {error}") from error

    @classmethod
    def _read(cls, file: Any) -> Recording:
        import json
        import os

        import numpy as np

        start = file.read(16)
        if len(start) < 16 or start[:8] != MAGIC:
            raise ValueError("it does not begin as one")
        version, length = (int.from_bytes(start[at : at + 4], "little") for at in (8, 12))
        if version != VERSION:
            raise ValueError(f"its version is {version}, this pyvmm reads {VERSION}")
        size = os.fstat(file.fileno()).st_size
        first = (16 + length + EVENT_BYTES - 1) // EVENT_BYTES * EVENT_BYTES
        if length > _HEADER_MAX or first > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
        if (size - first) % EVENT_BYTES:
            raise ValueError("it ends within an event")
        recording = cls()
        recording._take(header)
        file.seek(first)
        recording._kept = np.frombuffer(bytearray(file.read(size - first)), event_type())
        for flag in ("write", "claimed"):
            if (recording._kept[flag].view(np.uint8) > 1).any():
                raise ValueError(f"{flag} is neither true nor false")
        return recording

    def _take(self, header: dict[str, Any]) -> None:
        self.vcpus, self.lost, self.dropped = (int(header[key]) for key in ("vcpus", "lost", "dropped"))
        self.note, self.began = str(header["note"]), float(header["began"])
        for tag, device in header["devices"].items():
            registers = {int(at): str(name) for at, name in device["registers"].items()}
            self.devices[int(tag)] = TracedDevice(str(device["name"]), registers)
        self._names = {_address(rip): str(name) for rip, name in header["names"].items()}
        self._symbol_source = {str(key): str(value) for key, value in header["symbols"].items()}
        for rip, (linear, before, at, bits) in header["code"].items():
            if bits not in (16, 32, 64):
                raise ValueError(f"{bits}-bit code")
            code = Code(_address(linear), bytes.fromhex(before), bytes.fromhex(at), bits)
            self.code[_address(rip)] = code


def _address(text: str) -> int:
    value = int(text, 16)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{text} is not an address")
    return value


def _access(event: Any) -> str:
    value, count = int(event["value"]), int(event["count"])
    text = f" {chr(value)!r}" if event["size"] == 1 and value in _PRINTABLE else ""
    return f"{'<-' if event['write'] else '->'} {value:#x}{text}{f' x{count}' if count > 1 else ''}"


def in_words(ns: int) -> str:
    """Nanoseconds with the unit that fits, e.g. ``1.25 us``."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns} ns"
