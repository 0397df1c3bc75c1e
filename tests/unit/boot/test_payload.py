"""Kernel payloads: every format, the bound on what they unpack to, and damage."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest

from vmm.boot import payload
from vmm.errors import ImageError

CONTENT = b"\x7fELF" + random.Random(1).randbytes(3000) + bytes(70_000) + b"startup_64" * 3000


def with_size(packed: bytes, size: int = len(CONTENT)) -> bytes:
    return packed + struct.pack("<I", size)


def lz4_legacy(content: bytes, block: int = 8 << 20) -> bytes:
    lz4_block = pytest.importorskip("lz4.block")
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(content), block):
        piece = lz4_block.compress(content[at : at + block], store_size=False)
        out += struct.pack("<I", len(piece)) + piece
    return out


def zstd(content: bytes) -> bytes:
    # No content size in the frame, as when zstd reads from a pipe.
    packer = pytest.importorskip("zstandard").ZstdCompressor(write_content_size=False)
    return bytes(packer.compress(content))


def lzop(content: bytes) -> bytes:
    if shutil.which("lzop") is None:
        pytest.skip("needs the lzop program")
    return subprocess.run(["lzop", "-9"], input=content, stdout=subprocess.PIPE, check=True).stdout


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda content: lzma.compress(content, check=lzma.CHECK_CRC32),
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": zstd,
    "lzo": lzop,
}


def pack(kind: str, content: bytes = CONTENT, size: int | None = None) -> bytes:
    """As the kernel's build does it: all but gzip get the size appended."""
    packed = PACKERS[kind](content)
    size = len(content) if size is None else size
    return packed[:-4] + struct.pack("<I", size) if kind == "gzip" else with_size(packed, size)


@pytest.mark.parametrize("kind", PACKERS)
def test_every_format_the_kernel_can_be_built_with_unpacks(kind: str) -> None:
    assert payload.unpack(pack(kind), len(CONTENT), "k") == (kind, CONTENT)


@pytest.mark.parametrize("kind", PACKERS)
def test_a_size_beyond_the_bound_is_refused_before_unpacking(kind: str) -> None:
    with pytest.raises(ImageError, match=f"claims to unpack to {len(CONTENT):#x}"):
        payload.unpack(pack(kind), len(CONTENT) - 1, "k")


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("lie", [-1, -1000, 1, 1000])
def test_a_payload_that_lies_about_its_size_is_damaged(kind: str, lie: int) -> None:
    with pytest.raises(ImageError, match="damaged"):
        payload.unpack(pack(kind, size=len(CONTENT) + lie), 1 << 30, "k")


@pytest.mark.parametrize("kind", PACKERS)
def test_a_bomb_is_given_no_more_memory_than_it_promised(kind: str) -> None:
    import tracemalloc

    bomb = pack(kind, bytes(64 << 20), size=4096)
    tracemalloc.start()
    with pytest.raises(ImageError, match="damaged"):
        payload.unpack(bomb, 1 << 30, "k")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # lz4 hands over a block at a time, which is 8 MiB at most.
    assert peak < 16 << 20


@pytest.mark.parametrize("kind", PACKERS)
def test_a_cut_off_stream_is_damaged(kind: str) -> None:
    packed = pack(kind)
    for keep in (20, len(packed) // 2, len(packed) - 20):
        with pytest.raises(ImageError, match="damaged"):
            payload.unpack(packed[:keep] + packed[-4:], len(CONTENT), "k")


@pytest.mark.parametrize("kind", PACKERS)
def test_flipped_bits_never_unpack_to_a_wrong_length_or_another_error(kind: str) -> None:
    packed = pack(kind)
    dice = random.Random(2)
    for _ in range(150):
        damaged = bytearray(packed)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(6, len(packed) - 4)] ^= 1 << dice.randrange(8)
        try:
            _, content = payload.unpack(bytes(damaged), len(CONTENT), "k")
        except (ImageError, payload.CannotUnpack):
            continue
        assert len(content) == len(CONTENT)


def test_an_unknown_format_is_left_to_the_guest() -> None:
    with pytest.raises(payload.CannotUnpack, match="de ad be ef"):
        payload.unpack(bytes.fromhex("deadbeef") + bytes(100), 1 << 20, "k")


@pytest.mark.parametrize(("kind", "module"), [("lz4", "lz4.block"), ("zstd", "zstandard")])
def test_a_missing_decompressor_is_left_to_the_guest(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(kind)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(payload.CannotUnpack, match="needed to unpack"):
        payload.unpack(packed, 1 << 20, "k")


def test_lz4_kernels_of_more_than_one_block_unpack() -> None:
    content = CONTENT * 3
    packed = with_size(lz4_legacy(content, block=100_000), len(content))
    assert payload.unpack(packed, len(content), "k") == ("lz4", content)
