"""Validated configuration of a machine: the one place that knows its fields, their units and defaults."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm import layout, parts
from vmm.errors import ConfigError
from vmm.fields import Field, PathLike, parse_size, read_count, read_flag, read_one_of, read_path, read_paths, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

CONSOLES = ("stdio", "pty", "none", "file:PATH", "unix:PATH")
COMPAT = ("auto", "on", "off")
KINDS = ("auto", "bzimage", "linux64", "pvh", "multiboot", "elf", "flat")
LINUX_KINDS = frozenset({"bzimage", "linux64"})  # of those, what the Linux boot protocol starts
MODES = ("real", "protected", "long")
UNPACK = ("auto", "host", "guest")
TRANSPORTS = ("pci", "mmio")
CONSOLE_DEVICES = ("uart", "virtio")


def _memory(value: Any) -> int:
    size = parse_size(value)
    if not layout.MEMORY_MIN <= size <= layout.MEMORY_MAX:
        raise ConfigError(f"memory of {size:#x} bytes is out of range: give 1M to {layout.MEMORY_MAX >> 40}T")
    return -(-size // layout.PAGE) * layout.PAGE


def _cpus(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"cpus is {value!r}: a machine has 1 or more vCPUs")
    return value


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise ConfigError(f"timeout is {value!r}: give seconds greater than 0")
    return float(value)


def _stall(value: Any) -> float | None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0.1 <= value < 1e9):
        raise ConfigError(f"stall is {value!r}: give seconds from 0.1 on")
    return None if value is None else float(value)


def _period(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.01 <= value < 1e9:
        raise ConfigError(f"checkpoint_every is {value!r}: give seconds from 0.01 on")
    return float(value)


def _address(value: Any) -> int | None:
    if value is None:
        return None
    try:
        address = value if isinstance(value, int) and not isinstance(value, bool) else int(str(value), 0)
    except ValueError:
        address = -1
    if not 0 <= address < 1 << 52:
        raise ConfigError(f"{value!r} is not a guest-physical address: write 0x7c00 or 31744")
    return address


def _console(value: Any) -> str:
    text = read_text(value)
    kind, colon, path = text.partition(":")
    if (kind in ("file", "unix") and path) or (kind in ("stdio", "pty", "none") and not colon):
        return text
    raise ConfigError(f"{text!r} is not a console: choose {', '.join(CONSOLES)}")


FIELDS: dict[str, Field] = {
    "kernel": Field(read_path, None, "image to boot: bzImage, vmlinux, PVH or multiboot ELF, flat binary"),
    "memory": Field(_memory, 256 * layout.MIB, "guest RAM, e.g. 512M or 4G (a bare number is MiB)"),
    "cpus": Field(_cpus, 1, "number of vCPUs"),
    "initrd": Field(read_paths, (), "initrd file, or several separated by commas (multiboot modules)"),
    "append": Field(read_text, "", "kernel command line"),
    "timeout": Field(_seconds, None, "seconds after which the run ends with status 124"),
    "stall": Field(_stall, None, "seconds without progress (output, device I/O, RIP) that end the run with status 26"),
    "console": Field(_console, "none", f"where the serial console goes: {', '.join(CONSOLES)}"),
    "kind": Field(read_one_of(*KINDS), "auto", f"kind of the image: {', '.join(KINDS)}"),
    "mode": Field(read_one_of(*MODES), "real", f"CPU mode a flat binary starts in: {', '.join(MODES)}"),
    "address": Field(_address, None, "guest-physical address a flat binary is loaded and entered at"),
    "unpack": Field(
        read_one_of(*UNPACK), "auto", "where a bzImage is unpacked: on the host (fast), in the guest, or automatic"
    ),
    "compat": Field(
        read_one_of(*COMPAT), "auto", "remedies for what this host's KVM lacks: as probed, forced, or none"
    ),
    "gdb": Field(
        read_text,
        "",
        "listen for gdb: PORT, HOST:PORT or a path; the guest waits for it unless ,nowait; ,arch=i386|x86-64",
    ),
    "huge_pages": Field(read_flag, False, "back guest RAM with 2 MiB pages from the host's pool"),
    "disks": Field(parts.read_disks, (), "disk image: FILE[,ro][,serial=S][,cache=none][,overlay=FILE]..."),
    "nets": Field(parts.read_nets, (), "network: user, tap=NAME or socket=PATH, [,mac=..][,hostfwd=..]..."),
    "shares": Field(parts.read_shares, (), "host directory that the guest can mount: DIR:TAG[,ro]"),
    "vsock": Field(parts.read_vsock, None, "sockets between host and guest: UNIX-SOCKET-PATH[,cid=N]"),
    "rng": Field(read_flag, True, "give the guest random numbers (virtio-rng)"),
    "balloon": Field(read_flag, False, "device that returns guest memory to the host (virtio-balloon)"),
    "console_device": Field(
        read_one_of(*CONSOLE_DEVICES), "uart", "device of the console: uart (ttyS0) or virtio (hvc0)"
    ),
    "virtio": Field(read_one_of(*TRANSPORTS), "pci", f"transport of virtio devices: {', '.join(TRANSPORTS)}"),
    "symbols": Field(read_path, None, "symbols of the guest: a vmlinux that is not stripped, or System.map"),
    "control": Field(read_path, None, "UNIX socket through which pyvmm migrate and pyvmm snapshot control the machine"),
    "checkpoint_dir": Field(read_path, None, "directory for periodic snapshots"),
    "checkpoint_every": Field(_period, 60.0, "seconds between snapshots, and between states sent to a standby"),
    "retain": Field(read_count(1, 1000, "a number of snapshots"), 8, "how many of the last snapshots to keep"),
    "standby": Field(read_text, "", "address where pyvmm standby listens: unix:PATH, or tcp:HOST:PORT,fence=FILE"),
    "screen": Field(read_flag, False, "at every end show the text screen at 0xb8000"),
    "reboot": Field(read_flag, False, "boot again when the guest requests a reset, instead of ending"),
}


class MachineConfig:
    """An immutable machine description. Fields and defaults are :data:`FIELDS`; unknown names are refused.

    >>> MachineConfig(memory="512M", cpus=2).memory
    536870912
    """

    __slots__ = tuple(FIELDS)

    kernel: str | None
    memory: int
    cpus: int
    initrd: tuple[str, ...]
    append: str
    timeout: float | None
    stall: float | None
    console: str
    kind: str
    mode: str
    address: int | None
    unpack: str
    compat: str
    gdb: str
    huge_pages: bool
    disks: tuple[parts.Disk, ...]
    nets: tuple[parts.Net, ...]
    shares: tuple[parts.Share, ...]
    vsock: parts.Vsock | None
    rng: bool
    balloon: bool
    console_device: str
    virtio: str
    symbols: str | None
    control: str | None
    checkpoint_dir: str | None
    checkpoint_every: float
    retain: int
    standby: str
    screen: bool
    reboot: bool

    def __init__(self, **fields: Any) -> None:
        for name in fields:
            if name not in FIELDS:
                raise ConfigError(f"a machine has no field {name!r}: it has {', '.join(FIELDS)}")
        for name, field in FIELDS.items():
            object.__setattr__(self, name, field.read(fields.get(name, field.default)))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a machine's configuration does not change: use with_({name}=...)")

    def with_(self, **fields: Any) -> MachineConfig:
        """Return a copy with some fields changed."""
        return MachineConfig(**{**self.as_dict(), **fields})

    def as_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MachineConfig) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().items()))

    def __repr__(self) -> str:
        given = (f"{n}={v!r}" for n, v in self.as_dict().items() if v != FIELDS[n].default)
        return f"MachineConfig({', '.join(given)})"


def read_file(path: PathLike) -> Mapping[str, Any]:
    """Read the fields of a machine file: TOML, or JSON when the name ends in ``.json``; paths are relative to the file.

    Raises :class:`~vmm.errors.ConfigError` when it cannot be read or parsed, or has unknown fields.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read machine file {name}: {error.strerror}") from error
    fields = _parse(name, raw)
    for field in fields:
        if field not in FIELDS:
            raise ConfigError(f"{name}: a machine has no field {field!r}: it has {', '.join(FIELDS)}")
    folder = os.path.dirname(os.path.abspath(name))
    for field in ("kernel", "symbols"):
        if isinstance(fields.get(field), str):
            fields[field] = os.path.join(folder, fields[field])
    if "initrd" in fields:
        fields["initrd"] = [os.path.join(folder, part) for part in read_paths(fields["initrd"])]
    for field, read in parts.READERS.items():
        if field in fields:
            fields[field] = read(fields[field], folder)
    return fields


def _parse(name: str, raw: bytes) -> dict[str, Any]:
    try:
        if name.endswith(".json"):
            import json

            fields = json.loads(raw)
        else:
            import tomllib

            fields = tomllib.loads(raw.decode())
    except ValueError as error:  # both parsers' errors, and bad UTF-8, are ValueErrors
        raise ConfigError(f"{name} is not a machine file: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{name} is not a machine file: it must hold fields such as memory and kernel")
    return fields
