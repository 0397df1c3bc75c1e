"""Where a machine comes from that is not booted: what it is, the state it takes up, the memory under it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.config import FIELDS, MachineConfig
from vmm.errors import ConfigError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.devices.device import State
    from vmm.machine import Machine

VERSION = 1

# How a person uses a machine, not what the guest sees of it: whoever takes it up says so anew.
USES = (
    "timeout", "stall", "console", "gdb", "symbols", "control",
    "checkpoint_dir", "checkpoint_every", "retain", "standby", "reboot",
)  # fmt: skip
# Where a part of it is on the host; the number and kind of parts stay.
PLACES = ("disks", "nets", "vsock")


class Origin:
    """What a new machine becomes. ``description`` is :func:`describe`'s, ``state`` :meth:`vmm.Machine.save`'s.

    ``files``, one ``(fd, offset)`` for each region, is the memory (:class:`vmm.memory.GuestMemory`). Without
    ``state`` the machine is made, with memory of its own, and whoever made it fills that and calls
    :meth:`vmm.Machine.load_state`. ``arriving``: it is made as far as it can be before anybody lets go of its
    disks and networks; :meth:`vmm.Machine.arrive` makes the rest. Raises :class:`~vmm.errors.SnapshotError` for a
    description that cannot be.
    """

    def __init__(
        self,
        description: State,
        state: State | None = None,
        files: Sequence[tuple[int, int]] | None = None,
        *,
        arriving: bool = False,
    ) -> None:
        self.state = state
        self.files = files
        self.arriving = arriving
        try:
            self._read(description)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SnapshotError(f"that describes no machine ({error!r})") from None

    def _read(self, description: State) -> None:
        from vmm.cpu.cpuid import rows

        if description["version"] != VERSION:
            raise SnapshotError(
                f"the machine is described in version {description['version']}: this pyvmm knows {VERSION}"
            )
        self._fields: dict[str, Any] = dict(description["config"])
        self.kind = _text(description["kind"])
        self.merge_ticks = bool(description["merge_ticks"])
        self.command_line = _text(description["command_line"])
        self.mode = _text(description["mode"])
        self.symbols = description["symbols"] and _text(description["symbols"])
        self.cpuid: object = rows(description["cpuid"])

    def config(self, **fields: Any) -> MachineConfig:
        """The configuration with the fields of :data:`USES` and :data:`PLACES` given anew.

        Raises :class:`~vmm.errors.ConfigError` for any other.
        """
        for name in fields:
            if name not in FIELDS:
                raise ConfigError(f"a machine has no field {name!r}: it has {', '.join(FIELDS)}")
            if name not in USES and name not in PLACES:
                raise ConfigError(
                    f"{name} is what the machine was made with: only {', '.join((*USES, *PLACES))} can be given anew"
                )
        try:
            was = MachineConfig(**self._fields)
        except (ConfigError, TypeError) as error:  # a key of a part that is no name
            raise SnapshotError(f"that describes no machine: {error}") from None
        config = was.with_(**fields)
        for name in PLACES:
            before, after = getattr(was, name), getattr(config, name)
            if (len(before) != len(after)) if isinstance(before, tuple) else ((before is None) != (after is None)):
                raise ConfigError(f"the machine has {_count(before)} {name}: give as many, or none to keep them")
        return config


def describe(machine: Machine) -> State:
    """What must be the same for the guest wherever the machine goes on, as a plain value."""
    machine.load()
    assert machine.entry is not None
    config = {name: _plain(value) for name, value in machine.config.as_dict().items() if name not in USES}
    return {
        "version": VERSION,
        "config": config,
        "kind": machine.kind,
        "merge_ticks": machine.merge_ticks,
        "command_line": machine.command_line,
        "mode": machine.entry.mode,
        "symbols": machine.config.symbols or machine.entry.symbols,
        "cpuid": machine.cpuid.value(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "as_dict"):
        return {name: _plain(item) for name, item in value.as_dict().items()}
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _count(parts: Any) -> str:
    return str(len(parts)) if isinstance(parts, tuple) else "a" if parts is not None else "no"
