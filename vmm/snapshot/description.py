"""The description of a machine in a record: its properties, never a place on the host.

Snapshots and migration streams are untrusted. So no path, socket, interface, port, address or command is ever taken
from one: an allow-list of descriptive fields is written, and a record must have exactly these. The user who restores or
receives the machine names the places of disks, networks and sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError
from vmm.parts import Disk, Net, Vsock, read_disks, read_nets, read_vsock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmm.config import MachineConfig
    from vmm.devices.device import State
    from vmm.parts import Part

FIELDS = (
    "memory", "cpus", "append", "kind", "mode", "address", "unpack", "compat", "rng", "balloon", "console_device",
    "virtio",
)  # fmt: skip
DISK = ("readonly", "serial", "cache", "sector", "queues", "iops", "bps")
NET = ("backend", "mac", "mtu", "queues", "pps", "bps")
PARTS_MAX = 64  # of a kind: the PCI bus has fewer slots

_NOWHERE = "-"  # placeholder for the place of a part, while a record is checked
_NEEDS = {
    "tap": ("is a tap interface", "--net tap=NAME"),
    "socket": ("is a link to another machine", "--net socket=PATH"),
    "user": ("had ports of the host forwarded to it", "--net user,hostfwd=..., or --net user without any"),
}


def describe(config: MachineConfig, sizes: Sequence[int]) -> State:
    """Return the description of ``config`` for a record; ``sizes`` are those of its disks in bytes."""
    vsock = config.vsock
    return {
        "config": {name: getattr(config, name) for name in FIELDS},
        "disks": [{"size": size, **_some(disk, DISK)} for disk, size in zip(config.disks, sizes, strict=True)],
        "nets": [{"forwards": len(net.hostfwd), **_some(net, NET)} for net in config.nets],
        "vsock": None if vsock is None else {"cid": vsock.cid},
    }


def without_places(config: Mapping[str, Any]) -> State:
    """Convert the configuration of a description of version 1, which had places in it, to the present form.

    Raises ``KeyError``, ``TypeError`` or ``ValueError``.
    """
    if config["shares"]:
        raise ValueError("a machine with a share is in no record")
    vsock = config["vsock"]
    return {
        "config": {name: config[name] for name in FIELDS},
        "disks": [{"size": 0, **{name: disk[name] for name in DISK}} for disk in config["disks"]],
        "nets": [{"forwards": len(net["hostfwd"]), **{name: net[name] for name in NET}} for net in config["nets"]],
        "vsock": None if vsock is None else {"cid": vsock["cid"]},
    }


def _some(part: Part, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(part, name) for name in names}


class Described:
    """A description, read and checked. Raises ``ValueError``, ``TypeError``, ``KeyError`` or
    :class:`~vmm.errors.ConfigError` for any field that :func:`describe` does not write, such as a place."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.fields: dict[str, Any] = dict(_exactly(value["config"], FIELDS))
        self.disks = [_exactly(disk, ("size", *DISK)) for disk in _list(value["disks"])]
        self._nets = [_exactly(net, ("forwards", *NET)) for net in _list(value["nets"])]
        self._vsock = None if value["vsock"] is None else _exactly(value["vsock"], ("cid",))
        for number in range(len(self.disks)):
            self.disk(number, Disk(_NOWHERE))
        for net in self._nets:
            _net(net, Net(net["backend"], **{} if net["backend"] == "user" else {net["backend"]: _NOWHERE}))
        if self._vsock is not None:
            Vsock(_NOWHERE, **self._vsock)

    def disk(self, number: int, given: Disk) -> Disk:
        """Return the disk at the place ``given``, with the described values for fields that ``given`` does not set."""
        fields = {name: self.disks[number][name] for name in DISK}
        if given.overlay or given.temporary:
            fields["readonly"] = False
        merged: Disk = given.over(fields)
        return merged

    def place(
        self,
        given: Mapping[str, Any],
        ready: Mapping[int, Disk],
        based: Mapping[int, tuple[str, Callable[[Disk], Disk]]],
        why: str,
    ) -> dict[str, Any]:
        """Return the fields ``disks``, ``nets`` and ``vsock`` of the machine on this host.

        ``given`` are the user's values. ``ready`` are disks that need no place. ``based`` are disks that need their
        base, with the reason and a function that creates the disk from it. ``why`` is the reason for the others.
        Raises :class:`~vmm.errors.ConfigError` naming the option that is missing.
        """
        return {
            "disks": self._place_disks(read_disks(given.get("disks")), ready, based, why),
            "nets": self._place_nets(read_nets(given.get("nets"))),
            "vsock": self._place_vsock(read_vsock(given.get("vsock"))),
        }

    def _place_disks(
        self,
        given: tuple[Disk, ...],
        ready: Mapping[int, Disk],
        based: Mapping[int, tuple[str, Callable[[Disk], Disk]]],
        why: str,
    ) -> list[Disk]:
        needing = {
            number: (based[number][0] if number in based else why, "--disk FILE")
            for number in range(len(self.disks))
            if number not in ready
        }
        said: dict[int, Disk] = _assign("disk", given, len(self.disks), needing)
        disks = []
        for number in range(len(self.disks)):
            disk = said.get(number)
            if disk is None:
                disks.append(ready[number])
            elif number in based and not (disk.overlay or disk.temporary):
                disks.append(based[number][1](disk))
            else:
                disks.append(self.disk(number, disk))
        return disks

    def _place_nets(self, given: tuple[Net, ...]) -> list[Net]:
        needing = {
            number: _NEEDS[net["backend"]]
            for number, net in enumerate(self._nets)
            if net["backend"] != "user" or net["forwards"]
        }
        said: dict[int, Net] = _assign("net", given, len(self._nets), needing)
        return [_net(net, said.get(number) or Net(net["backend"])) for number, net in enumerate(self._nets)]

    def _place_vsock(self, given: Vsock | None) -> Vsock | None:
        if (given is None) != (self._vsock is None):
            raise ConfigError(
                "the machine has a socket device (vsock), and its record says no place: give --vsock PATH"
                if given is None
                else "the machine has no socket device: leave out --vsock"
            )
        merged: Vsock | None = given.over(self._vsock) if given is not None and self._vsock is not None else None
        return merged


def _net(described: Mapping[str, Any], given: Net) -> Net:
    merged: Net = given.over({name: described[name] for name in NET if name != "backend"})
    return merged


def _assign(kind: str, given: Sequence[Any], total: int, needing: Mapping[int, tuple[str, str]]) -> dict[int, Any]:
    """Assign the given places by number, in order: one for each part, or one for each that needs one.

    ``needing`` maps each number that needs a place to the reason and the fix.
    """
    if len(given) == total:
        return dict(enumerate(given))
    if len(given) == len(needing):
        return dict(zip(needing, given, strict=True))
    if not given:
        number, (why, fix) = next(iter(needing.items()))
        raise ConfigError(f"{kind} {number} {why}, and its record says no place: give {fix}")
    if not total:
        raise ConfigError(f"the machine has no {kind}: leave out --{kind}")
    those = f", or for {', '.join(map(str, needing))} alone, which need one" if 0 < len(needing) < total else ""
    none = "" if needing else ", or none"
    raise ConfigError(f"--{kind} is given {len(given)} times, for {total}: give one for each{those}{none}")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > PARTS_MAX:
        raise ValueError(f"parts are no list of at most {PARTS_MAX}")
    return value


def _exactly(value: Any, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise ValueError(f"there are other fields than {', '.join(names)}")
    return value
