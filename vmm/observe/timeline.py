"""A recording for other programs: a page for a browser, and the JSON that Perfetto and chrome://tracing read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError
from vmm.observe.summary import GROUPS, totals
from vmm.printable import printable, printable_lines

if TYPE_CHECKING:
    from vmm.observe.recording import Recording

PAGE_EVENTS = 100_000  # drawn one by one; all of them are in the page's overview and tables
PERFETTO_EVENTS = 1_000_000
TABLE_ROWS = 200
_OVERVIEW_BINS = 800
_DATA = "/*DATA*/"


def write_page(recording: Recording, path: str) -> str:
    """Write one self-contained HTML file; return a sentence about the events that are not in it, or "".

    Raises :class:`~vmm.errors.ConfigError` when it cannot be written.
    """
    import os

    with open(os.path.join(os.path.dirname(__file__), "timeline.html"), encoding="utf-8") as file:
        template = file.read()
    data = page_data(recording)
    # Inside a script element only "<" could end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    _write(path, template.replace(_DATA, text))
    return str(data["cut"])


def page_data(recording: Recording) -> dict[str, Any]:
    """What the page shows: columns of the newest :data:`PAGE_EVENTS` events, tables and overview of all."""
    import numpy as np

    every = recording.events
    events = every[-PAGE_EVENTS:]
    devices = [row.name for row in totals(recording, "device")]
    numbers = {name: number for number, name in enumerate(devices)}
    texts, places = _Strings(), _Strings()
    device = np.zeros(len(events), np.uint16)
    text = np.zeros(len(events), np.uint32)
    place = np.zeros(len(events), np.uint32)
    for n, event in enumerate(recording.plain(events)):
        device[n] = numbers[recording.device(event) or "(no device)"]
        text[n] = texts.number(f"{recording.reason(event)}\n{recording.describe(event)}")
        place[n] = places.number(_place(recording, event))
    began = int(every["time"][0]) if len(every) else 0
    cut = f"of {len(every)} events the newest {len(events)} are drawn" if len(every) > len(events) else ""
    tables = {by: [[printable(row.name), *row[1:]] for row in totals(recording, by)[:TABLE_ROWS]] for by in GROUPS}
    return {
        "note": printable(recording.note),
        "began": recording.began,
        "count": len(every),
        "span": int(every["time"][-1]) - began if len(every) else 0,
        "missing": recording.missing,
        "cut": cut,
        "rows": [f"vCPU {n}" for n in range(_vcpus(recording))] + ["I/O and devices"],
        "devices": [printable(name) for name in devices],
        "texts": texts.all,
        "places": places.all,
        "time": _column(events["time"] - began, "<f8"),
        "duration": _column(events["duration"], "<f4"),
        # -1, the I/O thread, is the last row
        "row": _column(np.where(events["vcpu"] < 0, _vcpus(recording), events["vcpu"]), "<u2"),
        "device": _column(device, "<u2"),
        "text": _column(text, "<u4"),
        "place": _column(place, "<u4"),
        "overview": _overview(every),
        "tables": tables,
    }


def _overview(events: Any) -> list[int]:
    import numpy as np

    if not len(events):
        return []
    times = events["time"]
    return [int(n) for n in np.histogram(times, _OVERVIEW_BINS, (times[0], max(times[-1], times[0] + 1)))[0]]


def _vcpus(recording: Recording) -> int:
    events = recording.events
    return max(recording.vcpus if recording.vcpus < 1 << 15 else 1, int(events["vcpu"].max()) + 1 if len(events) else 1)


def _place(recording: Recording, event: Any) -> str:
    rip = int(event["rip"])
    if not rip:
        return ""
    symbol = recording.symbol(event)
    return f"{rip:#x}{f' <{symbol}>' if symbol else ''}\n{recording.instruction(event)}"


def _column(values: Any, kind: str) -> str:
    import base64

    return base64.b64encode(values.astype(kind).tobytes()).decode()


class _Strings:
    """Each string once, by number."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        found = self._numbers.get(text)
        if found is None:
            found = self._numbers[text] = len(self.all)
            self.all.append(printable_lines(text))
        return found


def write_perfetto(recording: Recording, path: str) -> str:
    """Write Chrome's trace event JSON ("Trace Event Format", complete events), a track a vCPU and one for the I/O
    thread; return a sentence about the events that are not in it, or "". Raises :class:`~vmm.errors.ConfigError`."""
    every = recording.events
    events = every[-PERFETTO_EVENTS:]
    cut = f"of {len(every)} events the newest {len(events)} are in {path}" if len(every) > len(events) else ""
    io = _vcpus(recording)
    try:
        with open(path, "w", encoding="utf-8") as file:
            other = {"missing": recording.missing, "cut": cut, "note": printable(recording.note)}
            file.write(f'{{"displayTimeUnit":"ns","otherData":{json.dumps(other)},"traceEvents":[\n')
            names = [f"vCPU {n}" for n in range(io)] + ["I/O and devices"]
            lines = [
                {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
                for tid, name in enumerate(names)
            ]
            file.write(",\n".join(map(json.dumps, lines)))
            for event in recording.plain(events):
                file.write(",\n" + json.dumps(_chrome_event(recording, event, io), separators=(",", ":")))
            file.write("\n]}\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error
    return cut


def _chrome_event(recording: Recording, event: Any, io: int) -> dict[str, Any]:
    vcpu = int(event["vcpu"])
    made: dict[str, Any] = {
        "name": printable(recording.describe(event) or recording.reason(event)),
        "cat": recording.reason(event),
        "pid": 1,
        "tid": io if vcpu < 0 else vcpu,
        "ts": int(event["time"]) / 1000,  # microseconds
    }
    if event["duration"]:
        made |= {"ph": "X", "dur": int(event["duration"]) / 1000}
    else:
        made |= {"ph": "i", "s": "t"}
    if event["rip"]:
        where, instruction = (printable(part) for part in _place(recording, event).split("\n")[:2])
        made["args"] = {"rip": where, "instruction": instruction}
    return made


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error
