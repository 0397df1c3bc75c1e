"""virtio-blk in a machine, seen by its driver: requests against a model, files that change, limits."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overlay_reader import flattened

from vmm import Machine
from vmm.devices.virtio.blk import Blk, DiskUndo
from vmm.errors import ConfigError, HostError, StateError
from vmm.parts import Disk
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from pathlib import Path

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
KIB = 1024
SIZE = 256 * KIB
CAPACITY = SIZE // 512


class Guest:
    """A machine with one disk and the driver of it."""

    def __init__(self, path: Path, **fields: object) -> None:
        self.machine = Machine(memory="64M", rng=False, disks=[Disk(str(path), **fields)])
        blk = self.machine.virtio[0]
        assert isinstance(blk, Blk)
        self.blk = blk
        self.driver = VirtioDriver.of(self.machine, blk)
        self.driver.start()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, queue: int = 0) -> tuple[bytes, bytes]:
        """A request's status and what was read."""
        header = struct.pack("<IIQ", kind, 0, sector)
        answer = self.driver.request(queue, [header, data] if data else [header], [room, 1] if room else [1])
        return answer.data[-1:], answer.data[:-1]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(n * 7 & 0xFF for n in range(4096)) * (SIZE // 4096))
    return path


REQUEST = st.tuples(
    st.sampled_from([IN, OUT, OUT, WRITE_ZEROES, FLUSH]),
    st.one_of(st.integers(0, CAPACITY + 2), st.sampled_from([CAPACITY - 1, (1 << 64) - 1, (1 << 55)])),
    st.integers(0, 24),
    st.integers(0, 255),
)


@pytest.mark.parametrize("fields", [{}, {"overlay": "top.ovl"}, {"overlay": "top.ovl", "cache": "none"}], ids=str)
def test_any_history_of_requests_reads_as_the_model_does(
    image: Path, tmp_path: Path, fields: dict[str, str], request: pytest.FixtureRequest
) -> None:
    if "overlay" in fields:
        fields = {**fields, "overlay": str(tmp_path / fields["overlay"])}
    base, model = image.read_bytes(), bytearray(image.read_bytes())
    with Guest(image, **fields) as guest:

        @settings(max_examples=examples(20), deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(REQUEST, max_size=12))
        def history(requests: list[tuple[int, int, int, int]]) -> None:
            for kind, sector, count, byte in requests:
                at, size = sector * 512, count * 512
                inside = at + size <= SIZE
                if kind == FLUSH:
                    assert guest.ask(FLUSH, sector)[0] == OK
                elif kind == IN:
                    status, data = guest.ask(IN, sector, room=size)
                    assert status == (OK if inside else IOERR)
                    assert not inside or data == model[at : at + size]
                else:
                    ranges = struct.pack("<QII", sector, count, byte & 1)
                    status, _ = guest.ask(kind, sector, bytes([byte]) * size if kind == OUT else ranges)
                    assert status == (OK if inside else IOERR)
                    if inside:
                        model[at : at + size] = bytes([byte if kind == OUT else 0]) * size

        history()
        assert guest.ask(FLUSH)[0] == OK
        on_disk = flattened(image, tmp_path / "top.ovl") if fields else image.read_bytes()
        assert on_disk == model
        assert guest.machine.messages == []
    assert not fields or image.read_bytes() == base


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(header=st.binary(min_size=16, max_size=16), data=st.binary(max_size=600), room=st.integers(0, 600))
def test_any_header_gets_a_status_of_the_specification(shared: Guest, header: bytes, data: bytes, room: int) -> None:
    answer = shared.driver.request(0, [header, data] if data else [header], [room, 1] if room else [1])
    assert answer.data[-1] in (0, 1, 2) and answer.written <= room + 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> object:
    path = tmp_path_factory.mktemp("shared") / "disk.img"
    path.write_bytes(bytes(SIZE))
    with Guest(path) as guest:
        yield guest


def test_an_overlay_is_there_again_in_the_next_machine(image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.ovl"
    for n in range(3):
        with Guest(image, overlay=str(top)) as guest:
            for earlier in range(n):
                assert guest.ask(IN, earlier * 9, room=512)[1] == bytes([earlier + 1]) * 512
            assert guest.ask(OUT, n * 9, bytes([n + 1]) * 512)[0] == OK  # and no flush: closing records it


ODD = SIZE - 512 + 24  # bytes of a file that ends within its last sector


@pytest.mark.parametrize(
    "fields", [{}, {"readonly": True}, {"cache": "none"}, {"sector": 4096}, {"overlay": "top.ovl"}], ids=str
)
def test_a_file_that_ends_within_a_sector_reads_as_zeros_from_there_on(
    image: Path, tmp_path: Path, fields: dict[str, object]
) -> None:
    if "overlay" in fields:
        fields = {**fields, "overlay": str(tmp_path / "top.ovl")}
    with image.open("r+b") as file:
        file.truncate(ODD)
    content = image.read_bytes() + bytes(SIZE - ODD)
    with Guest(image, **fields) as guest:
        assert guest.blk.size == SIZE
        assert guest.ask(IN, CAPACITY - 8, room=4096) == (OK, content[-4096:])
        assert guest.ask(IN, CAPACITY, room=4096)[0] == IOERR
    assert image.stat().st_size == ODD  # nobody wrote


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_write_of_the_last_sector_makes_the_file_whole(image: Path, cache: str) -> None:
    with image.open("r+b") as file:
        file.truncate(ODD)
    content = image.read_bytes()
    with Guest(image, cache=cache) as guest:
        before = guest.blk.checkpoint()
        assert before is not None
        assert guest.ask(WRITE_ZEROES, 0, struct.pack("<QII", CAPACITY - 1, 1, 0))[0] == OK
        assert guest.ask(IN, CAPACITY - 1, room=512) == (OK, bytes(512))
        assert guest.ask(OUT, CAPACITY - 1, b"x" * 512)[0] == OK
        assert guest.ask(IN, CAPACITY - 2, room=1024)[1][512:] == b"x" * 512
        assert image.stat().st_size == SIZE
        before.rollback()
        before.close()
        tail = guest.ask(IN, CAPACITY - 1, room=512)[1]
        assert tail == content[-24:] + bytes(SIZE - ODD)


def test_an_overlay_over_a_file_of_odd_size_copies_its_last_cluster(image: Path, tmp_path: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(ODD)
    before = image.read_bytes()
    for written in (False, True):
        with Guest(image, overlay=str(tmp_path / "top.ovl")) as guest:
            expected = b"x" * 512 if written else before[-536:-24]
            assert guest.ask(IN, CAPACITY - 2, room=512)[1] == expected
            assert guest.ask(OUT, CAPACITY - 2, b"x" * 512)[0] == OK
            assert guest.ask(IN, CAPACITY - 1, room=512)[1] == before[-24:] + bytes(488)
    assert image.read_bytes() == before


def test_two_machines_do_not_write_one_image(image: Path, tmp_path: Path) -> None:
    with Guest(image):
        with pytest.raises(ConfigError, match="is in use by another machine"):
            Guest(image)
        with pytest.raises(ConfigError, match="is being written by another machine"):
            Guest(image, readonly=True)
    with Guest(image, readonly=True), Guest(image, readonly=True), Guest(image, overlay=str(tmp_path / "top.ovl")):
        pass


def test_a_disk_is_resized_while_it_is_used(image: Path) -> None:
    with Guest(image) as guest:
        assert guest.ask(IN, CAPACITY, room=512)[0] == IOERR
        assert guest.blk.resize(2 * SIZE) == 2 * SIZE
        assert guest.driver.transport.interrupts() & 2
        assert guest.blk.config(0, 8) == (2 * CAPACITY).to_bytes(8, "little")
        assert guest.ask(IN, CAPACITY, room=512) == (OK, bytes(512))
        assert image.stat().st_size == 2 * SIZE
        with pytest.raises(ConfigError, match="not whole sectors of 512"):
            guest.blk.resize(1000)
        with image.open("r+b") as file:
            file.truncate(SIZE // 2)
        assert guest.ask(IN, CAPACITY - 1, room=512)[0] == IOERR  # nobody said so yet: the host's error
        assert guest.blk.resize() == SIZE // 2
        assert [("the file ends before it" in text) for text in guest.machine.messages] == [True]


def test_an_overlay_grows_while_it_is_used(image: Path, tmp_path: Path) -> None:
    top = str(tmp_path / "top.ovl")
    with Guest(image, overlay=top) as guest:
        guest.blk.resize(SIZE + 4096)
        assert guest.ask(OUT, CAPACITY + 1, b"z" * 512)[0] == OK
        with pytest.raises(ConfigError, match="cannot shrink"):
            guest.blk.resize(SIZE)
        with pytest.raises(ConfigError, match="which size"):
            guest.blk.resize()
    with Guest(image, overlay=top) as guest:
        assert guest.blk.size == SIZE + 4096
        assert guest.ask(IN, CAPACITY, room=1024) == (OK, bytes(512) + b"z" * 512)


def test_a_file_that_vanishes_serves_on(image: Path) -> None:
    with Guest(image) as guest:
        image.unlink()
        assert guest.ask(OUT, 1, b"x" * 512)[0] == OK
        assert guest.ask(IN, 1, room=512) == (OK, b"x" * 512)


def test_the_serial_is_what_was_given(image: Path) -> None:
    with Guest(image, serial="root-0123456789-abcd") as guest:
        assert guest.ask(GET_ID, room=20) == (OK, b"root-0123456789-abcd")
        assert guest.ask(GET_ID, room=7)[1] == b"root-01"


def test_queues_count_for_themselves(image: Path) -> None:
    with Guest(image, queues=3) as guest:
        assert guest.blk.config(34, 2) == b"\3\0"
        assert guest.ask(OUT, 0, bytes(1024), queue=2)[0] == OK
        assert guest.ask(IN, 0, room=512, queue=1)[0] == OK
        assert guest.ask(FLUSH)[0] == OK
        assert guest.ask(99)[0] == UNSUPP
        statistics = guest.blk.statistics()
        assert [(q["reads"], q["writes"], q["flushes"]) for q in statistics["queues"]] == [
            (0, 0, 1),
            (1, 0, 0),
            (0, 1, 0),
        ]
        assert (statistics["bytes_read"], statistics["bytes_written"], statistics["unsupported"]) == (512, 1024, 1)


def test_bytes_a_second_are_limited(image: Path) -> None:
    with Guest(image, bps=str(100 * KIB)) as guest:
        began = time.monotonic()
        for _ in range(15):  # 120 KiB: a second's worth at once, 20 KiB later than that
            assert guest.ask(IN, 0, room=8 * KIB)[0] == OK
        assert time.monotonic() - began > 0.1
        assert guest.blk.statistics()["throttled"] > 0


def test_the_state_is_what_the_driver_set(image: Path) -> None:
    with Guest(image) as guest:
        state = guest.blk.save()
        assert state == {"version": 1, "size": SIZE}
        guest.driver.transport.set_config(32, b"\0")
        driven = guest.blk.save_driven()
        assert driven["config"][32] == 0
    with Guest(image) as guest:
        guest.blk.load_driven(driven)
        guest.blk.load(state)
        assert guest.driver.transport.config(32, 1) == b"\0"
        for wrong in ({"version": 1, "size": SIZE * 2}, {"version": 1}, {**state, "version": 2}):
            with pytest.raises(ValueError, match="virtio-blk0"):
                guest.blk.load(wrong)


# ---- going back ----

CHANGE = st.tuples(
    st.sampled_from([OUT, OUT, WRITE_ZEROES, DISCARD, FLUSH]),
    st.integers(0, CAPACITY - 24),
    st.integers(1, 24),
    st.integers(0, 255),
)


@pytest.mark.parametrize("fields", [{}, {"overlay": "top.ovl"}, {"overlay": "top.ovl", "cache": "none"}], ids=str)
def test_checkpoints_go_back_to_their_past_in_any_order(image: Path, tmp_path: Path, fields: dict[str, str]) -> None:
    if "overlay" in fields:
        fields = {**fields, "overlay": str(tmp_path / fields["overlay"])}
    model = bytearray(image.read_bytes())
    with Guest(image, **fields) as guest:

        @settings(max_examples=examples(15), deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.tuples(st.lists(CHANGE, max_size=4), st.integers(0, 2)), max_size=6))
        def history(steps: list[tuple[list[tuple[int, int, int, int]], int]]) -> None:
            undos: list[tuple[DiskUndo, bytes]] = []
            for changes, which in steps:
                for kind, sector, sectors, byte in changes:
                    change(guest, model, kind, sector, sectors, byte)
                if which < len(undos):
                    undo, past = undos[which]
                    model[:] = past
                    assert undo.rollback() >= 0
                    assert undo.rollback() == 0
                else:
                    made = guest.blk.checkpoint()
                    assert made is not None
                    undos.append((made, bytes(model)))
                assert guest.ask(IN, 0, room=SIZE) == (OK, bytes(model))
            for undo, _ in undos:
                undo.close()
                undo.close()

        history()


def change(guest: Guest, model: bytearray, kind: int, sector: int, sectors: int, byte: int) -> None:
    """One request that succeeds, and what it makes of the disk. With a checkpoint open, a discard changes nothing."""
    at, size = sector * 512, sectors * 512
    if kind == OUT:
        model[at : at + size] = bytes([byte]) * size
        status, _ = guest.ask(OUT, sector, bytes([byte]) * size)
    elif kind == FLUSH:
        status, _ = guest.ask(FLUSH)
    else:
        status, _ = guest.ask(kind, 0, struct.pack("<QII", sector, sectors, 0))
        if kind == WRITE_ZEROES:
            model[at : at + size] = bytes(size)
        elif not guest.blk.held:
            model[at : at + size] = guest.ask(IN, sector, room=size)[1]
    assert status == OK


def test_a_disk_that_is_read_only_has_nothing_to_go_back_to(image: Path) -> None:
    with Guest(image, readonly=True) as guest:
        assert guest.blk.checkpoint() is None


def test_the_transport_answers_for_its_disk_and_other_devices_have_no_past(image: Path) -> None:
    for transport in ("mmio", "pci"):
        with Machine(memory="64M", virtio=transport, disks=[Disk(str(image))]) as machine:
            devices = {attachment.device for attachment in machine.bus.attachments.values()}
            undos = [undo for device in devices if (undo := device.checkpoint()) is not None]
            assert [type(undo) for undo in undos] == [DiskUndo]


def test_a_disk_keeps_its_size_while_a_checkpoint_is_open(image: Path, tmp_path: Path) -> None:
    with Guest(image, overlay=str(tmp_path / "top.ovl")) as guest:
        undo = guest.blk.checkpoint()
        assert undo is not None
        with pytest.raises(StateError, match="close it first"):
            guest.blk.resize(SIZE * 2)
        undo.close()
        assert guest.blk.resize(SIZE * 2) == SIZE * 2


def test_a_checkpoint_that_is_closed_or_whose_disk_is_gone_does_not_go_back(image: Path) -> None:
    with Guest(image) as guest:
        first, second = guest.blk.checkpoint(), guest.blk.checkpoint()
        assert first is not None and second is not None
        first.close()
        with pytest.raises(StateError, match="is closed"):
            first.rollback()
        assert guest.ask(OUT, 0, b"x" * 512)[0] == OK
        assert second.rollback() == 1
    with pytest.raises(StateError, match="is closed"):
        second.rollback()
    second.close()
    assert image.read_bytes()[:2] == bytes([0, 7])


def test_without_a_directory_for_temporary_files_there_is_no_checkpoint(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Guest(image) as guest:
        monkeypatch.setattr("tempfile.tempdir", str(image.parent / "missing"))
        with pytest.raises(HostError, match="TMPDIR"):
            guest.blk.checkpoint()
        assert guest.ask(OUT, 0, b"x" * 512)[0] == OK
