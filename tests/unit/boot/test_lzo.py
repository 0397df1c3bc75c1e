"""LZO1X by its instructions, from hand-assembled streams (Linux Documentation/staging/lzo.rst)."""

from __future__ import annotations

import struct
import zlib

import pytest

from vmm.boot import lzo

END = b"\x11\0\0"


def test_a_first_byte_above_17_is_a_literal_run() -> None:
    assert lzo.decompress(bytes([17 + 5]) + b"hello" + END, 5) == b"hello"


def test_a_match_copies_from_the_past_and_may_overlap_itself() -> None:
    # 1LLDDDSS H: length 5 + LL, distance (H << 3) + DDD + 1.
    assert lzo.decompress(bytes([17 + 4]) + b"abcd" + bytes([0b1_11_000_00, 0]) + END, 12) == b"abcd" + b"d" * 8
    assert lzo.decompress(bytes([17 + 4]) + b"abcd" + bytes([0b1_00_011_00, 0]) + END, 9) == b"abcdabcda"


def test_a_long_literal_run_counts_zero_bytes_as_255() -> None:
    text = bytes(range(256)) + bytes(62)
    # After a match without literals, 0000LLLL with L = 0: 3 + 15 + 255 * zeros + the next byte.
    stream = bytes([17 + 4]) + b"abcd" + bytes([0b1_00_000_00, 0]) + bytes([0, 0, len(text) - 18 - 255]) + text + END
    assert lzo.decompress(stream, 9 + len(text)) == b"abcd" + b"d" * 5 + text


def test_short_codes_mean_what_the_literals_before_them_say() -> None:
    # After one to three literals: two bytes from a distance up to 1 KiB.
    assert lzo.decompress(bytes([17 + 3]) + b"abc" + bytes([0b0000_10_00, 0]) + END, 5) == b"abcab"
    # After four or more: three bytes from 2 KiB away and further.
    far = bytes(range(256)) * 9
    head = bytes([0, 0, 0, 0, 0, 0, 0, 0, 0, len(far) - 18 - 255 * 8])
    assert lzo.decompress(head + far + bytes([0b0000_00_00, 0]) + END, len(far) + 3) == far + far[-2049:][:3]


def test_literals_ride_on_the_low_bits_of_a_match() -> None:
    stream = bytes([17 + 4]) + b"abcd" + bytes([0b001_00001]) + struct.pack("<H", 3 << 2 | 2) + b"XY" + END
    assert lzo.decompress(stream, 9) == b"abcdabcXY"


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        bytes([17 + 5]) + b"hell",
        bytes([17 + 4]) + b"abcd",
        bytes([17 + 4]) + b"abcd" + bytes([0b1_00_111_00, 0]) + END,
        bytes([17 + 9]) + b"ninebytes" + END,
        bytes([17 + 4]) + b"abcd" + bytes([0b1_00_000_00, 0]) + END,
        bytes([0, 0, 0, 0, 0]),
        bytes([17, 1]) + END,
    ],
    ids=[
        "empty",
        "literals cut",
        "no end",
        "distance before start",
        "too long",
        "match too long",
        "endless length",
        "version 1",
    ],
)
def test_a_stream_that_leaves_its_bounds_is_refused(stream: bytes) -> None:
    with pytest.raises(lzo.LzoError):
        lzo.decompress(stream, 8)


def lzop_file(*blocks: tuple[int, bytes, int], version: int = 0x1030) -> bytes:
    """(unpacked length, stored bytes, adler32 of the content) as the lzop program frames them."""
    head = b"\x89LZO\0\r\n\x1a\n" + struct.pack(">HHHBB", version, 0x20A0, 0x0940, 3, 9)
    head += struct.pack(">IIIIB", 1, 0o100644, 0, 0, 1) + b"x" + bytes(4)
    body = b"".join(struct.pack(">III", length, len(data), check) + data for length, data, check in blocks)
    return head + body + bytes(4)


def test_lzop_blocks_are_stored_or_packed() -> None:
    packed = bytes([17 + 4]) + b"abcd" + bytes([0b1_11_000_00, 0]) + END
    data = lzop_file((12, packed, zlib.adler32(b"abcd" + b"d" * 8)), (3, b"raw", zlib.adler32(b"raw")))
    assert lzo.unpack_lzop(data, 15) == b"abcdddddddddraw"


def test_an_lzop_block_with_a_wrong_checksum_is_refused() -> None:
    with pytest.raises(lzo.LzoError, match="checksum"):
        lzo.unpack_lzop(lzop_file((3, b"raw", 1)), 3)


def test_an_lzop_file_longer_than_allowed_is_refused() -> None:
    with pytest.raises(lzo.LzoError, match="block of"):
        lzo.unpack_lzop(lzop_file((3, b"raw", zlib.adler32(b"raw"))), 2)
