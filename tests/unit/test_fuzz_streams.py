"""Records, frames and headers that anybody may have written: read or refused, within limits of memory and time.

``make fuzz`` runs each a hundred times as often.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import zlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from mutation import mutated, replaced, run

from vmm.config import MachineConfig
from vmm.disk import overlay
from vmm.disk.image import OVERLAY_MAGIC
from vmm.errors import ConfigError, MigrationError, SnapshotError
from vmm.migrate import destination, wire
from vmm.migrate.wire import Channel, Kind
from vmm.snapshot import cbor, disks, reading, records, serving
from vmm.snapshot.description import describe
from vmm.snapshot.origin import Origin
from vmm.snapshot.regions import PAGE, Region, bitmap_size, checksums_size

if TYPE_CHECKING:
    import random

pytestmark = pytest.mark.hypothesis  # of those that `make fuzz` runs

TIMES = 1000
SIZE = 64 * PAGE
DESCRIPTION = {
    "version": 2,
    **describe(MachineConfig(disks=["a", "b,ro"], nets=["user", "tap=t"], vsock="v"), [SIZE, SIZE]),
    "kind": "flat",
    "merge_ticks": False,
    "command_line": "console=ttyS0",
    "mode": "long",
    "cpuid": [[0, 0, 0, 13, 1, 2, 3], [1, 0, 0, 1, 2, 3, 4]],
}
RECORD = {
    "state": {
        "version": 1,
        "description": DESCRIPTION,
        "machine": {"version": 1, "input": b"typed", "devices": {"rtc": {"version": 1}}, "processors": [1 << 64, -1]},
        "disks": [
            {
                "version": 2,
                "readonly": readonly,
                "options": {"serial": "", "cache": "writeback", "sector": 512, "queues": 1, "iops": 0, "bps": 0},
                "files": [file],
            }
            for readonly, file in ((0, {"held": 1}), (1, {"held": 0, "size": SIZE, "mtime_ns": 1}))
        ],
    },
    "memory": [
        {
            "gpa": 0,
            "size": SIZE,
            "offset": 0,
            "held": b"\xff" * bitmap_size(SIZE),
            "checksums": bytes(checksums_size(SIZE)),
        }
    ],
    "files": {"disk0-0.img": {"size": SIZE, "crc32c": 5}},
    "parent": {"id": bytes(32)},
    "nonce": bytes(16),
}
OTHERS: list[Any] = [
    None, True, 0, -1, 1 << 31, 1 << 63, 1 << 64, -(1 << 70), b"", b"\xff" * 8, "", "x", "../x", "/etc/passwd", "a\0b",
    [], [[]], [1, 2], {}, {"path": "/etc/passwd"}, {1: 2}, "x" * 300, [0] * 100,
]  # fmt: skip
HELLO = {
    "version": wire.VERSION, "description": DESCRIPTION, "regions": [[0, SIZE]], "how": "precopy", "token": bytes(16),
    "fence": False, "disks": [SIZE, 0],
}  # fmt: skip


def read_record(content: bytes) -> None:
    """What a restore does with a record file, up to the first file that it would open."""
    with contextlib.suppress(SnapshotError):
        found, _ = records.unpack("fuzzed", content)
        try:
            found = reading._exactly(found, state=object, memory=list, files=dict, parent=object, nonce=bytes)
            reading._regions(found["memory"])
            reading._files(found["files"])
            reading._parent(found["parent"])
        except ValueError as error:
            raise SnapshotError(str(error)) from None
        state = found["state"]
        if isinstance(state, dict) and {"description", "disks"} <= state.keys():
            for index, disk in enumerate(state["disks"] if isinstance(state["disks"], list) else []):
                with contextlib.suppress(ValueError):
                    disks._parsed(index, disk)
            with contextlib.suppress(ConfigError):
                Origin(state["description"]).config({})


def test_any_record_is_read_or_refused() -> None:
    good = cbor.encode(RECORD)
    bomb = b"\x9a\x01\x00\x00\x00" + b"\x80" * 4000
    corpus = [good, cbor.encode(DESCRIPTION), bomb, b"\x81" * 200]
    read_record(records.pack(RECORD))

    def once(chance: random.Random) -> None:
        if chance.random() < 0.5:
            read_record(records.pack(replaced(chance, RECORD, OTHERS)))
            return
        payload = mutated(chance, corpus)
        content = records.MAGIC + records.VERSION.to_bytes(4, "little") + len(payload).to_bytes(8, "little") + payload
        if chance.random() < 0.1:
            content = mutated(chance, [content])
        read_record(content + records.digest(content))

    run(examples(TIMES), 1, once)


def framed(kind: int, payload: bytes, address: int = 0, disk: int = 0) -> bytes:
    head = struct.pack("<HHIQ", kind, disk, len(payload), address)
    return head + struct.pack("<II", wire._crc(wire._crc(0, head), payload), 0) + payload


def test_any_bytes_are_frames_or_refused() -> None:
    values = [cbor.encode(value) for value in (HELLO, "a reason", {"machine": {}, "later": [bytes(8)]}, DESCRIPTION)]
    corpus = [framed(kind, value) for kind in wire._VALUES for value in values]
    corpus += [framed(Kind.PAGES, bytes(64), 4096), framed(Kind.DISK, b"x" * 64, 512, 1), framed(Kind.ROUND, b"")]
    corpus += [framed(Kind.ZEROS, (4096).to_bytes(8, "little")), framed(Kind.YOURS, b"") * 3]

    def once(chance: random.Random) -> None:
        if chance.random() < 0.5:
            kind = chance.choice([*Kind, chance.randrange(1 << 16)])
            payload = mutated(chance, values)
            if kind == Kind.HELLO and chance.random() < 0.5:
                payload = cbor.encode(replaced(chance, HELLO, OTHERS))
            sent = framed(kind, payload, chance.choice([0, 4096, (1 << 64) - 1]), chance.choice([0, 0, 1, 65535]))
        else:
            sent = mutated(chance, corpus)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            theirs.sendall(sent)
            theirs.shutdown(socket.SHUT_WR)
            channel = Channel(ours)
            with contextlib.suppress(MigrationError):
                while True:
                    frame = channel.receive(*Kind)
                    assert len(frame.payload) <= wire._LONGEST[frame.kind]
                    if frame.kind == Kind.HELLO:
                        with contextlib.suppress(SnapshotError, ConfigError):
                            Origin(destination._checked(frame.value)["description"]).config({})

    run(examples(TIMES), 2, once)


def test_any_header_of_an_overlay_is_read_or_refused() -> None:
    def header(*numbers: int) -> bytes:
        packed = struct.pack(overlay._HEADER, OVERLAY_MAGIC, overlay.VERSION, overlay.CLUSTER, *numbers)
        return packed + struct.pack("<I", zlib.crc32(packed)) + bytes(32)

    corpus = [
        header(1 << 20, 4096, 4096, 1 << 20, 1 << 20, 7),
        header(1 << 40, 4096, 1 << 26, 1 << 30, 1 << 20, 7),
        header(1 << 60, 4096, 1 << 46, 1 << 47, 512, 0),
    ]
    for good in corpus:
        overlay.parse(good)

    def once(chance: random.Random) -> None:
        data = bytearray(mutated(chance, corpus))
        if len(data) >= 64 and chance.random() < 0.8:
            data[60:64] = struct.pack("<I", zlib.crc32(data[:60]))
        try:
            layout = overlay.parse(bytes(data))
        except ValueError:
            return
        assert 0 < layout.bitmap_at < layout.bitmap_at + layout.bitmap_size <= layout.data_at < 1 << 62
        assert layout.base_size <= layout.size <= layout.size_max and not layout.data_at % overlay.CLUSTER
        assert overlay._length(layout) < 1 << 62  # a file may be so long

    run(examples(TIMES), 3, once)


def test_any_bytes_are_requests_for_pages_or_end_the_connection() -> None:
    pages, held = SIZE // PAGE, 0b1011
    memory = os.memfd_create("pages")
    os.ftruncate(memory, SIZE)
    os.pwrite(memory, b"".join(bytes([n + 1]) * PAGE for n in range(4)), 0)
    bitmap = held.to_bytes(bitmap_size(SIZE), "little")
    region = Region(gpa=0x100000, size=SIZE, offset=0, held=bitmap, checksums=bytes(checksums_size(SIZE)))
    layer = SimpleNamespace(regions=(region,), memory_fd=memory, path="pages")
    snapshot: Any = SimpleNamespace(layers=(layer,), regions=(region,), state={})
    server = serving.PageServer(snapshot)
    corpus = [struct.pack("<Q", region.gpa + n * PAGE) * (1 + n % 3) for n in range(6)]
    corpus += [struct.pack("<3Q", region.gpa, region.gpa + SIZE - PAGE, region.gpa + SIZE), struct.pack("<Q", 7)]

    def once(chance: random.Random) -> None:
        sent = mutated(chance, corpus)[:512]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            theirs.sendall(sent)
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ValueError):
                serving.answer_requests(ours, server.answer)
            ours.shutdown(socket.SHUT_WR)
            came = b"".join(iter(lambda: theirs.recv(1 << 20), b""))
        asked = [int.from_bytes(sent[at : at + 8], "little") for at in range(0, len(sent) // 8 * 8, 8)]
        numbers = [divmod(gpa - region.gpa, PAGE) for gpa in asked]
        good = all(0 <= number < pages and not rest for number, rest in numbers)
        wanted = b""  # one turn takes all of them, and one that is no page's ends it
        for gpa, (number, _) in zip(asked, numbers, strict=True) if good else ():
            held_here = number < 4 and held >> number & 1
            wanted += serving.answer_with(gpa, bytes([number + 1]) * PAGE if held_here else None)
        assert came == wanted

    try:
        run(examples(300, fuzzing=100_000), 4, once)
    finally:
        os.close(memory)
