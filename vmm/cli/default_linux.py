"""The Linux that ``pyvmm boot`` gets for itself when it is given no kernel."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vmm import layout
from vmm.boot.cmdline import CommandLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from vmm.config import MachineConfig
    from vmm.linux.initramfs import Entry
    from vmm.linux.store import Progress

STOCK_MEMORY = 512 * layout.MIB
SMALL_MEMORY = 128 * layout.MIB  # every page costs about fifty emulated instructions at boot


def find(
    config: MachineConfig, *, memory_given: bool, make: Callable[[Path, list[Entry]], Path] | None = None
) -> MachineConfig:
    """Return ``config`` with a kernel, an initramfs if it has none, and suitable memory if none was requested.

    Its own kernel is kept. ``make`` creates an initramfs from a busybox, drivers and the network setup; it is placed
    above its own ones.

    Where guest kernel code runs natively: Debian's stock cloud kernel, downloaded. Where KVM emulates it: the small
    kernel, built once (minutes). Raises :class:`~vmm.errors.HostError` when neither can be had.
    """
    from vmm import host
    from vmm.linux import debian, initramfs, kernel

    image: str | Path
    drivers: list[Entry] = []
    with progress_display() as progress:
        if config.kernel is not None:
            image, memory = config.kernel, config.memory
        elif host.findings().native:
            from vmm.linux import modules

            stock = debian.stock_kernel("cloud", progress)
            image, memory = stock.vmlinuz, STOCK_MEMORY
            drivers = modules.entries(stock.modules, modules.of_machine(config))
        else:
            if not kernel.is_built():
                print(
                    "pyvmm: this host emulates guest kernel code, so a small Linux is built for it, once",
                    file=sys.stderr,
                )
            image, memory = kernel.small_kernel(progress=progress).bzimage, SMALL_MEMORY
        initrd = config.initrd
        if make or not initrd:
            up = initramfs.network(net.backend == "user" for net in config.nets)
            initrd = (*initrd, str((make or initramfs.default)(debian.busybox(progress), [*drivers, *up])))
    said = CommandLine(config.append)
    quiet = "" if "loglevel" in said or "quiet" in said else "quiet "
    if not memory_given:
        config = config.with_(memory=memory)
    return config.with_(kernel=str(image), initrd=initrd, append=quiet + config.append)


def progress_display() -> AbstractContextManager[Progress]:
    """Return a context manager of a progress callable: bars on a terminal, a line for each stage elsewhere."""
    from contextlib import contextmanager

    @contextmanager
    def bars() -> Iterator[Progress]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as display:

            def finish() -> None:
                for task in tasks.values():  # a step of unknown length ends at 100 %, too
                    display.update(task, completed=1, total=1)

            def show(stage: str, done: int, total: int | None) -> None:
                if stage not in tasks:
                    finish()  # steps come one after another
                    tasks[stage] = display.add_task(stage, total=total)
                display.update(tasks[stage], completed=done, total=total)

            yield show
            finish()

    @contextmanager
    def lines() -> Iterator[Progress]:
        said: set[str] = set()

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in said:
                said.add(stage)
                print(f"pyvmm: {stage} ...", file=sys.stderr)

        yield show

    # Opened by the first call: if everything is cached there is none, and rich is not imported.
    return _Lazy(bars if sys.stderr.isatty() else lines)


class _Lazy:
    """A context manager that opens the real one when progress is first reported."""

    def __init__(self, make: object) -> None:
        self._make = make
        self._open: AbstractContextManager[Progress] | None = None
        self._show: Progress | None = None

    def __enter__(self) -> Progress:
        return self._report

    def _report(self, stage: str, done: int, total: int | None) -> None:
        if self._show is None:
            self._open = self._make()  # type: ignore[operator]
            assert self._open is not None
            self._show = self._open.__enter__()
        self._show(stage, done, total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.__exit__(kind, error, trace)
