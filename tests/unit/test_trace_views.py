"""What is made of a recording: totals, the page for a browser, the JSON for Perfetto; bounded, and saying so."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from vmm.errors import ConfigError
from vmm.observe import timeline
from vmm.observe.recording import DOORBELL, IO, MMIO, Code, Recording, TracedDevice, event_type
from vmm.observe.summary import GROUPS, NAMED, ROWS, table, totals
from vmm.observe.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Iterator


def sample(times: int = 1) -> Recording:
    """``times`` times: two bytes to a UART from vCPU 0, a doorbell, an access of vCPU 1 that nobody answers."""
    made = Recording()
    made.devices = {1: TracedDevice("uart", {0: "RBR/THR"}), 2: TracedDevice("virtio-blk0", {})}
    made.vcpus, made.note = 2, "</script><b>&kernel"
    made.code[0x1010] = Code(0x1010, b"\xee", b"\xc3", 64)
    made.use_symbols(Symbols([(0x1000, 0x20, "print"), (0x2000, 0x20, "<probe>")], "test"))
    one = [
        {"reason": IO, "device": 1, "register": 0, "size": 1, "write": True, "value": 0x48, "rip": 0x1010,
         "duration": 100, "claimed": True},
        {"reason": IO, "device": 1, "register": 0, "size": 1, "write": True, "value": 0x49, "rip": 0x1010,
         "duration": 300, "claimed": True},
        {"reason": DOORBELL, "device": 2, "register": -1, "vcpu": -1, "claimed": True},
        {"reason": MMIO, "register": -1, "address": 0xD0000000, "size": 4, "rip": 0x2004, "vcpu": 1, "duration": 50},
    ]  # fmt: skip
    made._kept = np.zeros(4 * times, event_type())
    for n, fields in enumerate(one):
        for name, value in {"count": 1, **fields}.items():
            made._kept[name][n::4] = value
    made._kept["time"] = np.arange(4 * times) * 1000
    return made


# ---- totals ----


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        ("reason", [("io", 2, 400), ("doorbell", 1, 0), ("mmio", 1, 50)]),
        ("device", [("uart", 2, 400), ("(unclaimed)", 1, 50), ("virtio-blk0", 1, 0)]),
        ("register", [("uart THR", 2, 400), ("(unclaimed) 0xd0000000", 1, 50), ("virtio-blk0 queue 0", 1, 0)]),
        ("symbol", [("print", 2, 400), ("(host)", 1, 0), ("<probe>", 1, 50)]),
    ],
)
def test_totals_count_and_add_up_by_name(by: str, rows: list[tuple[str, int, int]]) -> None:
    assert sorted(totals(sample(), by)) == sorted(rows)
    assert totals(sample(), by)[0] == rows[0]
    assert [row.events for row in totals(sample(1000), by)] == [1000 * row.events for row in totals(sample(), by)]


def test_totals_of_nothing_are_nothing() -> None:
    assert [totals(Recording(), by) for by in GROUPS] == [[]] * 4
    assert table(Recording()).startswith("0 events")


def test_the_table_has_every_grouping_its_shares_and_what_is_missing() -> None:
    made = sample()
    made.lost = 7
    text = table(made)
    assert "4 events" in text and "7 events were lost" in text
    for by in GROUPS:
        assert any(line.startswith(by + " ") for line in text.splitlines())
    assert re.search(r"^uart THR +2 +50\.0% +400 ns +200 ns$", text, re.MULTILINE)


def test_the_table_sums_up_what_is_too_much() -> None:
    made = sample(100)
    made._kept["rip"] = np.arange(400) * 0x10000 + 0x100000
    rows = table(made).split("\nsymbol ")[1].splitlines()
    assert len(rows) == 1 + ROWS + 1
    assert rows[-1].startswith(f"({400 - ROWS} more)") and f" {400 - ROWS} " in rows[-1]


def test_groups_without_number_are_named_up_to_a_bound() -> None:
    made = sample(1000)
    made._kept["register"], made._kept["reason"], made._kept["device"] = -1, MMIO, 0
    made._kept["address"] = np.arange(4000) * 4
    rows = totals(made, "register")
    assert rows[0].name == "(others)" and rows[0].events == 4000 - NAMED
    assert len(rows) == NAMED + 1 and sum(row.events for row in rows) == 4000


# ---- the page ----


class Page(HTMLParser):
    """Start tags that were not closed, everything that points elsewhere, and the data."""

    VOID = {"meta", "input", "br", "link", "img", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pointers: list[str] = []
        self.data = ""
        self.in_data = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.pointers += [str(given[name]) for name in ("src", "href", "action", "data") if name in given]
        self.in_data = given.get("id") == "data"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.in_data = False

    def handle_data(self, data: str) -> None:
        if self.in_data:
            self.data += data


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[Page, str]]:
    path = tmp_path / "page.html"
    assert timeline.write_page(sample(), str(path)) == ""
    text = path.read_text()
    yield Page(text), text


def test_the_page_is_well_formed_and_needs_no_other_file(page: tuple[Page, str]) -> None:
    parsed, text = page
    assert parsed.open == [] and parsed.pointers == []
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_has_every_event_with_its_names(page: tuple[Page, str]) -> None:
    data = json.loads(page[0].data)
    assert data["note"] == "</script><b>&kernel" and data["count"] == 4 and data["span"] == 3000
    assert data["rows"] == ["vCPU 0", "vCPU 1", "I/O and devices"]

    def column(name: str, kind: str) -> list[Any]:
        return list(np.frombuffer(base64.b64decode(data[name]), kind))

    assert column("time", "<f8") == [0, 1000, 2000, 3000]
    assert column("duration", "<f4") == [100, 300, 0, 50]
    assert column("row", "<u2") == [0, 0, 2, 1]
    assert [data["devices"][n] for n in column("device", "<u2")] == ["uart", "uart", "virtio-blk0", "(unclaimed)"]
    assert [data["texts"][n] for n in column("text", "<u4")] == [
        "io\nuart THR <- 0x48 'H'", "io\nuart THR <- 0x49 'I'", "doorbell\nvirtio-blk0 QueueNotify 0",
        "mmio\n(unclaimed) 0xd0000000 -> 0x0",
    ]  # fmt: skip
    assert [data["places"][n] for n in column("place", "<u4")] == [
        "0x1010 <print+0x10>\nout dx, al", "0x1010 <print+0x10>\nout dx, al", "", "0x2004 <<probe>+0x4>\n",
    ]  # fmt: skip
    assert sum(data["overview"]) == 4
    assert data["tables"]["device"][0] == ["uart", 2, 400]


def test_a_page_of_too_many_events_draws_the_newest_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timeline, "PAGE_EVENTS", 100)
    path = tmp_path / "page.html"
    assert timeline.write_page(sample(1000), str(path)) == "of 4000 events the newest 100 are drawn"
    data = json.loads(Page(path.read_text()).data)
    times = np.frombuffer(base64.b64decode(data["time"]), "<f8")
    assert (len(times), times[-1]) == (100, 3999 * 1000)
    assert sum(data["overview"]) == 4000 == sum(row[1] for row in data["tables"]["reason"])
    assert data["cut"] == "of 4000 events the newest 100 are drawn"


def test_a_page_of_no_events_can_be_written(tmp_path: Path) -> None:
    timeline.write_page(Recording(), str(tmp_path / "page.html"))
    assert json.loads(Page((tmp_path / "page.html").read_text()).data)["count"] == 0


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")


def in_browser(path: Path) -> str:
    """The document as it is once its scripts have run."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
               f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
               path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-drawn="yes"' in done.stdout, done.stderr  # the script's last statement
    return done.stdout


@needs_browser
@pytest.mark.parametrize("times", [0, 1, 1000])
def test_a_browser_draws_the_page(tmp_path: Path, times: int) -> None:
    path = tmp_path / "page.html"
    timeline.write_page(sample(times) if times else Recording(), str(path))
    document = in_browser(path)
    if times:
        assert document.count('class="chip"') == 3
        assert re.search(rf"<td[^>]*>uart THR</td><td>{2 * times:,}</td>", document)


# Zoom into the first event by the wheel, point at it, switch a device off, look for a word.
ACTIONS = """
<script>
const on = (kind, Event, more) => {
  const box = $("rows").getBoundingClientRect(), at = { clientX: box.left + LEFT, clientY: box.top + 20 };
  $("rows").dispatchEvent(new Event(kind, { ...at, bubbles: true, cancelable: true, ...more }));
};
const said = {};
for (let n = 0; n < 40; n++) on("wheel", WheelEvent, { deltaY: -100 });
said.view = [from, to];
on("pointermove", PointerEvent, {});
said.tip = $("tip").innerText;
document.querySelector(".chip").click();
said.hidden = perRow.flat().filter(shown).length;
document.querySelector(".chip").click();
$("find").value = "queuenotify"; $("find").dispatchEvent(new Event("input"));
said.found = perRow.flat().filter(shown).length;
document.body.dataset.said = JSON.stringify(said);
</script>
"""


@needs_browser
def test_the_page_zooms_points_hides_and_finds(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    timeline.write_page(sample(100), str(path))
    path.write_text(path.read_text().replace("</body>", ACTIONS + "</body>"))
    answer = re.search('data-said="([^"]*)"', in_browser(path))
    assert answer
    said = json.loads(unescape(answer[1]))
    start, end = said["view"]
    assert 0 <= start < 100 and end - start == 200  # nanoseconds: the closest there is
    assert said["tip"].splitlines()[:2] == ["0.000000 ms · vCPU 0 · io · 100 ns", "uart THR <- 0x48 'H'"]
    assert "0x1010 <print+0x10>" in said["tip"] and "out dx, al" in said["tip"]
    assert (said["hidden"], said["found"]) == (200, 100)


# ---- Perfetto ----


def test_perfetto_s_file_has_a_track_a_thread_and_an_event_each(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert timeline.write_perfetto(sample(), str(path)) == ""
    made = json.loads(path.read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in made["traceEvents"] if e["ph"] == "M"}
    assert tracks == {0: "vCPU 0", 1: "vCPU 1", 2: "I/O and devices"}
    events = [e for e in made["traceEvents"] if e["ph"] != "M"]
    assert [(e["ph"], e["tid"], e["ts"], e.get("dur"), e["name"]) for e in events] == [
        ("X", 0, 0, 0.1, "uart THR <- 0x48 'H'"), ("X", 0, 1, 0.3, "uart THR <- 0x49 'I'"),
        ("i", 2, 2, None, "virtio-blk0 QueueNotify 0"), ("X", 1, 3, 0.05, "(unclaimed) 0xd0000000 -> 0x0"),
    ]  # fmt: skip
    assert events[0]["args"] == {"rip": "0x1010 <print+0x10>", "instruction": "out dx, al"}


def test_perfetto_s_file_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timeline, "PERFETTO_EVENTS", 10)
    path = tmp_path / "trace.json"
    assert "of 40 events the newest 10" in timeline.write_perfetto(sample(10), str(path))
    made = json.loads(path.read_text())
    assert len([e for e in made["traceEvents"] if e["ph"] != "M"]) == 10
    assert "the newest 10" in made["otherData"]["cut"]


@pytest.mark.parametrize("write", [timeline.write_page, timeline.write_perfetto])
def test_a_file_that_cannot_be_written_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another file"):
        write(sample(), str(tmp_path))
