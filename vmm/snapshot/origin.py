"""Origin of a machine that is not booted: its description, its state and its memory."""

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

# Settings that the guest does not see: the user who restores the machine gives them again.
USES = (
    "timeout", "stall", "console", "gdb", "symbols", "control", "huge_pages",
    "checkpoint_dir", "checkpoint_every", "retain", "standby", "screen", "reboot",
)  # fmt: skip
# Places of parts on the host, which no record has; the number and kind of parts stay.
PLACES = ("disks", "nets", "vsock")


class Origin:
    """Origin of a new machine: ``description`` from :func:`describe`, ``state`` from :meth:`vmm.Machine.save`.

    ``files``, one ``(fd, offset)`` for each region, is the memory (:class:`vmm.memory.GuestMemory`). Without ``state``
    the machine gets memory of its own, which the caller fills before it calls :meth:`vmm.Machine.load_state`.
    ``arriving``: build the machine only as far as possible while the source still owns its disks and networks;
    :meth:`vmm.Machine.arrive` builds the rest. ``clock`` is passed to :meth:`vmm.Machine.load_state` with ``state``.
    Raises :class:`~vmm.errors.SnapshotError` for an invalid description.
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
        """Path of the image's own symbols; set for a clone, from its original."""
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
        if version == 1:  # it had places, which are ignored
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
        """Return the configuration on this host: the description, with the fields of :data:`USES` and :data:`PLACES`
        that are ``given``. For the others see :meth:`vmm.snapshot.description.Described.place`.

        Raises :class:`~vmm.errors.ConfigError` for any other field, and for a place that is missing.
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
    """Return, as a plain value, what must stay the same for the guest on every host.

    ``disk_sizes`` are in bytes. It loads the image if necessary, since the command line is known only then.
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
