"""Where a machine comes from that is not booted: what it is, the state it takes up, the memory under it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.config import FIELDS, MachineConfig
from vmm.errors import ConfigError, SnapshotError
from vmm.snapshot import description as descriptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmm.cpu.cpuid import CpuidTable
    from vmm.devices.device import State
    from vmm.parts import Disk
    from vmm.snapshot.subject import Bootable

VERSION = 2

# How a person uses a machine, not what the guest sees of it: whoever takes it up says so anew.
USES = (
    "timeout", "stall", "console", "gdb", "symbols", "control", "huge_pages",
    "checkpoint_dir", "checkpoint_every", "retain", "standby", "screen", "reboot",
)  # fmt: skip
# Where a part of it is on the host, which no record says; the number and kind of parts stay.
PLACES = ("disks", "nets", "vsock")


class Origin:
    """What a new machine becomes. ``description`` is :func:`describe`'s, ``state`` :meth:`vmm.Machine.save`'s.

    ``files``, one ``(fd, offset)`` for each region, is the memory (:class:`vmm.memory.GuestMemory`). Without
    ``state`` the machine is made, with memory of its own, and whoever made it fills that and calls
    :meth:`vmm.Machine.load_state`. ``arriving``: it is made as far as it can be before anybody lets go of its
    disks and networks; :meth:`vmm.Machine.arrive` makes the rest. ``clock`` is what :meth:`vmm.Machine.load_state`
    takes with ``state``. Raises :class:`~vmm.errors.SnapshotError` for a
    description that cannot be.
    """

    def __init__(
        self,
        description: State,
        state: State | None = None,
        files: Sequence[tuple[int, int]] | None = None,
        *,
        arriving: bool = False,
        clock: str = "advanced",
    ) -> None:
        self.state = state
        self.clock = clock
        self.files = files
        self.arriving = arriving
        self.symbols: str | None = None
        """Where the image's own symbols are; of a clone, whose original knows."""
        try:
            self._read(description)
        except (KeyError, TypeError, AttributeError, ValueError, ConfigError) as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(f"that describes no machine ({error or repr(error)})") from None

    def _read(self, description: State) -> None:
        from vmm.cpu.cpuid import rows

        version = description["version"]
        keys = {"version", "kind", "merge_ticks", "command_line", "mode", "cpuid"}
        if version == 1:  # had the places of everything in it, which are not looked at
            keys |= {"config", "symbols"}
            described = descriptions.without_places(description["config"])
        elif version == VERSION:
            keys |= {"config", "disks", "nets", "vsock"}
            described = description
        else:
            raise SnapshotError(f"the machine is described in version {version}: this pyvmm knows {VERSION}")
        if description.keys() != keys:
            raise ValueError(f"there are other fields than {', '.join(sorted(keys))}")
        self.described = descriptions.Described(described)
        self._was = MachineConfig(**self.described.fields)
        self.kind = _text(description["kind"])
        self.merge_ticks = bool(description["merge_ticks"])
        self.command_line = _text(description["command_line"])
        self.mode = _text(description["mode"])
        self.cpuid: object = rows(description["cpuid"])

    def config(
        self,
        given: Mapping[str, Any],
        *,
        ready: Mapping[int, Disk] | None = None,
        based: Mapping[int, tuple[str, Callable[[Disk], Disk]]] | None = None,
        why: str = "is not in the record",
    ) -> MachineConfig:
        """The configuration here: what the record describes, with the fields of :data:`USES` and :data:`PLACES` that
        are ``given``. For the others see :meth:`vmm.snapshot.description.Described.place`.

        Raises :class:`~vmm.errors.ConfigError` for any other field, and for a place that nobody gives.
        """
        for name in given:
            if name not in FIELDS:
                raise ConfigError(f"a machine has no field {name!r}: it has {', '.join(FIELDS)}")
            if name not in USES and name not in PLACES:
                raise ConfigError(
                    f"{name} is what the machine was made with: only {', '.join((*USES, *PLACES))} can be given anew"
                )
        return self._was.with_(**{**given, **self.described.place(given, ready or {}, based or {}, why)})


def describe(config: MachineConfig, booted: Bootable, disk_sizes: list[int], cpuid: CpuidTable) -> State:
    """Return what must be the same for the guest wherever the machine goes on, as a plain value.

    ``disk_sizes`` are in bytes. An image that is not loaded yet is loaded: the command line is known only then.
    """
    entry = booted.load()
    return {
        "version": VERSION,
        **descriptions.describe(config, disk_sizes),
        "kind": booted.kind,
        "merge_ticks": booted.merge_ticks,
        "command_line": booted.command_line,
        "mode": entry.mode,
        "cpuid": cpuid.value(),
    }


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
