"""What a recording amounts to: how often and how long, by reason, device, register and symbol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.observe.recording import in_words
from vmm.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.observe.recording import Recording

ROWS = 16  # of a table as text; the rest is summed up
NAMED = 2000  # groups with names of their own: a guest can touch any number of addresses
GROUPS = ("reason", "device", "register", "symbol")


class Total(NamedTuple):
    """Events of one name: how many, and nanoseconds of handling in all."""

    name: str
    events: int
    time: int


def totals(recording: Recording, by: str) -> list[Total]:
    """All events grouped ``by`` one of :data:`GROUPS`, the most frequent first. Names are given once a group, and to
    the :data:`NAMED` greatest: a million events take no longer than their sorting does."""
    import numpy as np

    events = recording.events
    columns, name = _GROUPS[by](recording, events)
    group = np.zeros(len(events), np.int64)
    for column in columns:
        values, index = np.unique(column, return_inverse=True)
        group = group * len(values) + index.reshape(-1)
        _, group = np.unique(group, return_inverse=True)
        group = group.reshape(-1)
    _, first, index = np.unique(group, return_index=True, return_inverse=True)
    counts = np.bincount(index, minlength=len(first))
    times = np.bincount(index, weights=events["duration"].astype(float), minlength=len(first))
    merged: dict[str, tuple[int, int]] = {}
    often = np.argsort(-counts, kind="stable")
    shown = zip(first[often].tolist(), counts[often].tolist(), times[often].tolist(), strict=True)
    for n, (at, count, time) in enumerate(shown):
        called = name(events[at]) if n < NAMED else "(others)"
        before = merged.get(called, (0, 0))
        merged[called] = before[0] + count, before[1] + int(time)
    return sorted((Total(key, *value) for key, value in merged.items()), key=lambda row: (-row.events, row.name))


def _by_reason(recording: Recording, events: Any) -> tuple[list[Any], Callable[[Any], str]]:
    return [events["reason"]], recording.reason


def _by_device(recording: Recording, events: Any) -> tuple[list[Any], Callable[[Any], str]]:
    def name(event: Any) -> str:
        return recording.device(event) or "(no device)"

    return [events["reason"], events["device"], events["claimed"]], name


def _by_register(recording: Recording, events: Any) -> tuple[list[Any], Callable[[Any], str]]:
    import numpy as np

    def name(event: Any) -> str:
        words = (recording.device(event), recording.register(event))
        return " ".join(word for word in words if word) or recording.reason(event)

    address = np.where(events["register"] >= 0, 0, events["address"])
    kept = (events["reason"], events["device"], events["claimed"], events["register"], events["write"], address)
    return list(kept), name


def _by_symbol(recording: Recording, events: Any) -> tuple[list[Any], Callable[[Any], str]]:
    def name(event: Any) -> str:
        rip = int(event["rip"])
        return recording.symbol(event).partition("+")[0] or (f"{rip:#x}" if rip else "(host)")

    return [events["rip"]], name


_GROUPS = {"reason": _by_reason, "device": _by_device, "register": _by_register, "symbol": _by_symbol}


def table(recording: Recording) -> str:
    """All four groupings as text that ends in a newline."""
    events = recording.events
    span = int(events["time"][-1] - events["time"][0]) / 1e9 if len(events) else 0.0
    rate = f", {len(events) / span:.3g} a second" if span else ""
    lines = [f"{len(events)} events in {span:.3g} s{rate}"]
    if recording.missing:
        lines.append(recording.missing)
    for by in GROUPS:
        rows = totals(recording, by)
        shown, rest = rows[:ROWS], rows[ROWS:]
        if rest:
            shown.append(Total(f"({len(rest)} more)", sum(r.events for r in rest), sum(r.time for r in rest)))
        lines += ["", f"{by:40} {'events':>9} {'share':>6} {'time':>10} {'mean':>10}"]
        for row in shown:
            mean = in_words(row.time // row.events) if row.time else ""
            share = f"{100 * row.events / len(events):.1f}%"
            lines.append(f"{printable(row.name):40} {row.events:9} {share:>6} {in_words(row.time):>10} {mean:>10}")
    return "\n".join(lines) + "\n"
