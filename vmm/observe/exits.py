"""Recorded exits in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.bus import MMIO, PIO

if TYPE_CHECKING:
    from vmm.bus import Bus
    from vmm.cpu.vcpu import Exit


def describe_exit(bus: Bus, event: Exit) -> str:
    """One exit in words: ``uart RBR/THR <- 0x48 'H'``."""
    if event.reason not in ("io", "mmio"):
        return f"{event.reason} {event.address:#x}"
    space = PIO if event.reason == "io" else MMIO
    attachment = bus.find(space, event.address)
    where = f"{attachment.name} {attachment.register(event.address)}" if attachment else "(unclaimed)"
    arrow = "<-" if event.write else "->"
    text = f" {chr(event.value)!r}" if event.size == 1 and 32 <= event.value < 127 else ""
    times = f" x{event.count}" if event.count > 1 else ""
    return f"{event.reason:4} {event.address:#x}/{event.size}  {where} {arrow} {event.value:#x}{text}{times}"


def folded(events: list[str]) -> list[str]:
    """Runs of the same line as one, with how often."""
    lines: list[tuple[str, int]] = []
    for line in events:
        if lines and lines[-1][0] == line:
            lines[-1] = (line, lines[-1][1] + 1)
        else:
            lines.append((line, 1))
    return [line if n == 1 else f"{line}  ({n} times)" for line, n in lines]
