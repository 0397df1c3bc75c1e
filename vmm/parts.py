"""Parts of a machine: disks, networks, shared directories, host sockets. Immutable values, checked when created.

Each is written as text on a command line or in a machine file, and as an object in Python; they are the same::

    Disk("root.img", readonly=True, serial="root")      "root.img,ro,serial=root"
    Net("user", hostfwd=("tcp::8080-:80",))             "user,hostfwd=tcp::8080-:80"
    Share("src", "work")                                "src:work"

A comma within a value is written twice (:func:`vmm.fields.split_commas`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError
from vmm.fields import Field, parse_size, read_count, read_flag, read_one_of, read_text, split_commas

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CACHES = ("writeback", "none")
_FLAGS = {"ro": ("readonly", True), "rw": ("readonly", False), "temporary": ("temporary", True)}
_QUEUES = read_count(1, 16, "a number of queues")


def _rate(value: Any) -> int:
    """Read bytes per second: ``"10M"``, ``"512K"`` or a number of bytes; 0 is no limit."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    try:
        size = parse_size(value)
    except ConfigError:
        size = -1
    if not 0 <= size < 1 << 62:
        raise ConfigError(f"{value!r} is not a rate: write 10M, 512K or a number of bytes a second")
    return size


def _file(value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{value!r} is not the path of a file")
    return os.fspath(value)


def _file_or_none(value: Any) -> str | None:
    return None if value is None else _file(value)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise ConfigError(f"{value!r} is not a list of strings")
    return tuple(value)


def _serial(value: Any) -> str:
    text = read_text(value)
    if len(text.encode()) > 20 or not text.isascii() or not text.isprintable():
        raise ConfigError(f"{text!r} is not a disk's serial: give up to 20 printable ASCII characters")
    return text


def _tag(value: Any) -> str:
    text = read_text(value)
    if not 1 <= len(text.encode()) <= 36 or "\0" in text:
        raise ConfigError(f"{text!r} is not the tag of a share: give 1 to 36 bytes")
    return text


def _mac(value: Any) -> str | None:
    if value is None:
        return None
    text = read_text(value).lower()
    octets = text.split(":")
    if len(octets) != 6 or not all(len(o) == 2 and set(o) <= set("0123456789abcdef") for o in octets):
        raise ConfigError(f"{value!r} is not a MAC address: write 52:54:00:12:34:56")
    if int(octets[0], 16) & 1:
        raise ConfigError(f"{value!r} is a multicast address: a MAC's first byte is even, as in 52:54:00:12:34:56")
    return text


class Part:
    """Base of the parts: immutable, made from keyword fields or from text."""

    fields: dict[str, Field] = {}
    kind: str = ""
    __slots__ = ("_values", "said")

    said: frozenset[str]
    """The fields that were given, whatever their values: the others have their defaults."""

    def __init__(self, *positional: Any, **given: Any) -> None:
        names = list(self.fields)
        if len(positional) > len(names):
            raise ConfigError(f"a {self.kind} has the fields {', '.join(names)}")
        given = {**dict(zip(names, positional, strict=False)), **given}
        for name in given:
            if name not in self.fields:
                raise ConfigError(f"a {self.kind} has no field {name!r}: it has {', '.join(names)}")
        values = {name: field.read(given.get(name, field.default)) for name, field in self.fields.items()}
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "said", frozenset(given))
        self.check()

    def check(self) -> None:
        """Raise :class:`~vmm.errors.ConfigError` for fields that exclude each other."""

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"a {self.kind} has no field {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a {self.kind} does not change: make another one")

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self), {name: self._values[name] for name in self.said})

    def as_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return dict(self._values)

    def with_(self, **fields: Any) -> Any:
        """Return a copy with some fields changed."""
        return self.over({}, **fields)

    def over(self, defaults: Mapping[str, Any], **fields: Any) -> Any:
        """Return a copy with ``defaults`` for the fields that were not given, and some fields changed."""
        return type(self)(**{**defaults, **{name: self._values[name] for name in self.said}, **fields})

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash((self.kind, *self._values.values()))

    def __repr__(self) -> str:
        given = (f"{n}={v!r}" for n, v in self._values.items() if v != self.fields[n].default)
        return f"{type(self).__name__}({', '.join(given)})"

    @classmethod
    def parse(cls, text: str) -> Any:
        """Return the part that ``text`` describes. Raises :class:`~vmm.errors.ConfigError`."""
        first, *options = split_commas(text)
        given: dict[str, Any] = cls.first(first)
        for option in options:
            name, equals, value = option.partition("=")
            if not equals and name in _FLAGS:
                field, value_of_flag = _FLAGS[name]
                given[field] = value_of_flag
            elif not equals:
                raise ConfigError(f"{option!r} in {cls.kind} {text!r} means nothing: write it as name=value")
            elif isinstance(cls.fields.get(name, _NONE).default, tuple):
                given[name] = (*given.get(name, ()), value)
            else:
                given[name] = value
        return cls(**given)

    @classmethod
    def first(cls, text: str) -> dict[str, Any]:
        """Return the fields that the text before the first comma sets."""
        return {next(iter(cls.fields)): text}

    def within(self, folder: str) -> Any:
        """Return a copy with paths resolved relative to ``folder``."""
        paths = {
            n: os.path.join(folder, v) for n, v in self._values.items() if n in _PATHS and isinstance(v, str) and v
        }
        lists = {n: [os.path.join(folder, path) for path in v] for n, v in self._values.items() if n in _PATH_LISTS}
        return self.with_(**paths, **lists)


def _make(kind: type[Part], fields: dict[str, Any]) -> Part:
    return kind(**fields)


_NONE = Field(read_text, None, "")
_PATHS = frozenset({"path", "overlay", "directory", "socket"})
_PATH_LISTS = frozenset({"layers"})


class Disk(Part):
    """A disk: ``path`` is a raw image or a block device.

    ``overlay`` is a file that takes all writes, so that ``path`` is only read; ``temporary`` is such a file without a
    name, which disappears with the machine. ``layers`` are read-only overlays between the two, the lowest first.
    ``cache`` is ``writeback`` (the host's page cache) or ``none`` (O_DIRECT); with either, a completed flush has
    reached the disk. ``iops`` and ``bps`` limit operations and bytes per second (0: no limit).
    """

    kind = "disk"
    fields = {
        "path": Field(_file, None, "raw disk image or block device"),
        "readonly": Field(read_flag, False, "the guest cannot write (ro)"),
        "serial": Field(_serial, "", "what the guest reads as the disk's serial"),
        "cache": Field(read_one_of(*CACHES), "writeback", "writeback, or none for O_DIRECT"),
        "overlay": Field(_file_or_none, None, "file that takes all writes"),
        "layers": Field(_texts, (), "overlay between path and what takes the writes; again for the next above it"),
        "temporary": Field(read_flag, False, "what the guest writes goes with the machine"),
        "sector": Field(read_count(512, 4096, "a sector size"), 512, "logical sector size: 512 or 4096"),
        "queues": Field(_QUEUES, 1, "number of queues"),
        "iops": Field(read_count(0, 1 << 40, "a limit of operations a second"), 0, "operations a second"),
        "bps": Field(_rate, 0, "bytes a second"),
    }

    def check(self) -> None:
        """Check the sector size, and that writes have exactly one destination, or none if readonly."""
        if self.sector not in (512, 4096):
            raise ConfigError(f"a sector of {self.sector} bytes: give 512 or 4096")
        if self.readonly and (self.overlay or self.temporary):
            raise ConfigError(f"disk {self.path} is read-only and has an overlay for writes: give one of the two")
        if self.overlay and self.temporary:
            raise ConfigError(f"disk {self.path} has an overlay and is temporary: give one of the two")
        if self.layers and not (self.overlay or self.temporary):
            raise ConfigError(f"disk {self.path} has layers that are only read: give it overlay=FILE, or temporary")


class Net(Part):
    """A network interface. ``backend`` says what is at its other end:

    ``user``: the host's own connections, through ``passt``, without privilege; ``tap``: the tap device ``tap``;
    ``socket``: another machine that names the same UNIX socket path ``socket``.
    """

    kind = "net"
    fields = {
        "backend": Field(read_one_of("user", "tap", "socket"), "user", "user, tap or socket"),
        "tap": Field(_file_or_none, None, "name of the tap device"),
        "socket": Field(_file_or_none, None, "path of the UNIX socket two machines share"),
        "mac": Field(_mac, None, "hardware address; default: derived from the machine and the interface's number"),
        "mtu": Field(lambda v: None if v is None else read_count(68, 65535, "an MTU")(v), None, "largest packet"),
        "hostfwd": Field(_texts, (), "forwarded ports (user): tcp::HOSTPORT-:GUESTPORT, udp::HOSTPORT-:GUESTPORT"),
        "queues": Field(_QUEUES, 1, "pairs of queues"),
        "pps": Field(read_count(0, 1 << 40, "a limit of packets a second"), 0, "packets a second, each way"),
        "bps": Field(_rate, 0, "bytes a second, each way"),
    }

    @classmethod
    def first(cls, text: str) -> dict[str, Any]:
        """``user``, ``tap=NAME`` or ``socket=PATH``."""
        backend, equals, value = text.partition("=")
        if (backend == "user" and not equals) or (backend in ("tap", "socket") and value):
            return {"backend": backend, **({backend: value} if value else {})}
        raise ConfigError(f"{text!r} is not a network: write user, tap=NAME or socket=PATH")

    def check(self) -> None:
        """Check that each field belongs to the chosen backend."""
        for name in ("tap", "socket"):
            if (self.backend == name) != (getattr(self, name) is not None):
                raise ConfigError(f"net {self.backend}: {name}= goes with the backend {name} and with no other")
        if self.hostfwd and self.backend != "user":
            raise ConfigError(f"hostfwd is for --net user: a {self.backend} network has no forwarded ports")
        for rule in self.hostfwd:
            parse_hostfwd(rule)


def parse_hostfwd(rule: str) -> tuple[str, str, int, int]:
    """Parse ``tcp:[HOSTADDR]:HOSTPORT-:GUESTPORT`` to (protocol, host address or "", host port, guest port)."""
    protocol, _, rest = rule.partition(":")
    host, dash, guest = rest.rpartition("-:")
    address, colon, port = host.rpartition(":")
    numbers = [int(p) if p.isascii() and p.isdigit() and len(p) < 6 else 0 for p in (port, guest)]
    if protocol not in ("tcp", "udp") or not dash or not colon or not all(0 < n < 65536 for n in numbers):
        raise ConfigError(f"{rule!r} forwards no port: write tcp::8080-:80 (host port 8080 to the guest's port 80)")
    return protocol, address, numbers[0], numbers[1]


class Share(Part):
    """A directory of the host that the guest mounts by ``tag``."""

    kind = "share"
    fields = {
        "directory": Field(_file, None, "directory of the host"),
        "tag": Field(_tag, "host", "what the guest mounts it by"),
        "readonly": Field(read_flag, False, "the guest cannot write (ro)"),
    }

    @classmethod
    def first(cls, text: str) -> dict[str, Any]:
        """``DIR:TAG``."""
        directory, colon, tag = text.rpartition(":")
        if not colon or not directory:
            raise ConfigError(f"{text!r} is not a share: write DIR:TAG, as in src:work")
        return {"directory": directory, "tag": tag}


class Vsock(Part):
    """Stream sockets between guest ports and UNIX sockets of the host. A host process connects to ``path`` and sends
    ``CONNECT port``; a guest that connects to the host's port n reaches the socket ``path_n``."""

    kind = "vsock"
    fields = {
        "path": Field(_file, None, "UNIX socket on which the host connects to guest ports"),
        "cid": Field(read_count(3, 0xFFFFFFFE, "a context id"), 3, "the guest's context id"),
    }


def _reader(part: type[Part]) -> Callable[..., tuple[Any, ...]]:
    """Return a reader of several parts of a kind: one or a list of objects, texts and tables (of a machine file)."""

    def read(value: Any, folder: str | None = None) -> tuple[Any, ...]:
        entries = value if isinstance(value, list | tuple) else () if value is None else (value,)
        found = tuple(_one(part, entry) for entry in entries)
        return found if folder is None else tuple(p.within(folder) for p in found)

    return read


def _one(part: type[Part], entry: Any) -> Any:
    if isinstance(entry, part):
        return entry
    if isinstance(entry, dict):
        return part(**entry)
    if isinstance(entry, str):
        return part.parse(entry)
    if isinstance(entry, os.PathLike):
        return part.parse(os.fspath(entry).replace(",", ",,"))
    raise ConfigError(f"{entry!r} is not a {part.kind}: give {part.__name__}(...) or its text")


def read_vsock(value: Any, folder: str | None = None) -> Vsock | None:
    """Read one :class:`Vsock`, its text, or ``None``."""
    if value is None:
        return None
    one: Vsock = _one(Vsock, value)
    return one if folder is None else one.within(folder)


def read_shares(value: Any, folder: str | None = None) -> tuple[Share, ...]:
    """Read shares as :func:`_reader` does, and check that their tags differ: the guest mounts by tag."""
    shares = _read_shares(value, folder)
    tags = [share.tag for share in shares]
    for tag in tags:
        if tags.count(tag) > 1:
            raise ConfigError(f"two shares have the tag {tag!r}: give each its own, as in DIR:TAG")
    return shares


read_disks = _reader(Disk)
read_nets = _reader(Net)
_read_shares = _reader(Share)
READERS: dict[str, Callable[..., Any]] = {
    "disks": read_disks, "nets": read_nets, "shares": read_shares, "vsock": read_vsock,
}  # fmt: skip
