"""New machines that continue another one: restored from a snapshot, or cloned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from vmm.errors import ConfigError

if TYPE_CHECKING:
    import os
    import socket
    from collections.abc import Callable

    from vmm.config import MachineConfig
    from vmm.machine.parts import Parts
    from vmm.snapshot.origin import Origin

    M = TypeVar("M", bound=Parts)
    Make = Callable[[MachineConfig, Origin], M]


def restore(
    make: Make[M],
    source: str | os.PathLike[str] | socket.socket,
    fields: dict[str, Any],
    *,
    identity: str,
    clock: str,
    check: bool,
    later: bool,
) -> M:
    """Return a machine that continues from a snapshot: see :meth:`vmm.Machine.restore`."""
    from vmm.snapshot import clock as clocks
    from vmm.snapshot import identity as identities
    from vmm.snapshot.restoring import prepare

    renewed = identities.asked(identity)
    clocks.advances(clock)
    if fields.get("huge_pages"):
        raise ConfigError("a restored machine's memory is a snapshot's file: leave out --huge-pages (huge_pages)")
    with prepare(source, check=check, later=later) as prepared:
        config = prepared.config(fields)
        if renewed:
            config = identities.another(config, fields)
        machine = make(config, prepared.origin)
        machine.lazy = prepared.finish(machine, clock)
        if task := prepared.attend(machine.lazy, machine.log.add):
            machine.background.add(task)
        if renewed:
            identities.renew(machine)
        else:
            machine.board.announce()
        return machine


def clone(
    machine: Parts,
    make: Make[M],
    n: int,
    *,
    prepare: Callable[[M, int], object] | None,
    fields: Callable[[int], dict[str, Any]] | None,
    clock: str,
) -> list[M]:
    """Return ``n`` machines that continue from where ``machine`` is: see :meth:`vmm.Machine.clone`."""
    from vmm.snapshot.clones import CloneSource, make_together

    machine.timeline.complete_memory()
    with machine.hold.still():
        source = CloneSource(machine.timeline, machine.symbols_file, n, clock)
    with source:
        configs = [source.config(fields(index) if fields else {}) for index in range(n)]

        def make_one(index: int) -> M:
            made = make(configs[index], source.origin)
            source.finish(made)
            return made

        clones = make_together(make_one, n)
    try:
        for index, made in enumerate(clones):
            if prepare:
                prepare(made, index)
    except BaseException:
        for made in clones:
            made.close()
        raise
    return clones
