"""LZO kernels: lzop's framing around LZO1X blocks (Linux Documentation/staging/lzo.rst).

In Python because no LZO binding is to be had everywhere, and few kernels need it, each of them once: the
result is cached. Every length is checked before a byte is copied.
"""

from __future__ import annotations

import struct
import zlib

_MAGIC = b"\x89LZO\0\r\n\x1a\n"
_EXTENDED = 0x0940  # the version from which on a level and a 64-bit time are in the header
_ADLER32_D = 0x0001
_CRC32_D = 0x0100
_SUMS_D = (_ADLER32_D, _CRC32_D)
_SUMS_C = (0x0002, 0x0200)
_FILTER = 0x0800
_END_OF_STREAM = 16384  # the distance that no match has (lzo.rst, 0001HLLL)


class LzoError(ValueError):
    """The stream is not what lzop writes, or leaves its bounds."""


def unpack_lzop(data: bytes, size: int) -> bytearray:
    """The content of an lzop file, at most ``size`` bytes of it. LzoError: damaged, or longer than that."""
    try:
        at, flags = _skip_header(data)
        sums = sum(1 for flag in _SUMS_D if flags & flag)
        packed_sums = sum(1 for flag in _SUMS_C if flags & flag)
        content = bytearray()
        # Every round consumes at least the eight bytes of a block's lengths.
        while True:
            (length,) = struct.unpack_from(">I", data, at)
            if length == 0:
                return content
            (packed,) = struct.unpack_from(">I", data, at + 4)
            if not 0 < packed <= length or length > size - len(content):
                raise LzoError(f"block of {packed:#x} bytes for {length:#x} at {at:#x}")
            # A block that did not shrink is stored as it is, and has no sums over its packed form.
            sums_at = at + 8
            at = sums_at + 4 * (sums + (packed_sums if packed < length else 0))
            if at + packed > len(data):
                raise LzoError("the last block is cut off")
            stored = data[at : at + packed]
            block = decompress(stored, length) if packed < length else stored
            if len(block) != length:
                raise LzoError(f"block at {at:#x} unpacks to {len(block):#x} bytes instead of {length:#x}")
            if sums:
                (wanted,) = struct.unpack_from(">I", data, sums_at)
                if (zlib.adler32 if flags & _ADLER32_D else zlib.crc32)(block) != wanted:
                    raise LzoError(f"wrong checksum of the block at {at:#x}")
            content += block
            at += packed
    except (struct.error, IndexError):
        raise LzoError("the stream is cut off") from None


def _skip_header(data: bytes) -> tuple[int, int]:
    """Where the first block begins, and the flags. Fields are big-endian."""
    if not data.startswith(_MAGIC):
        raise LzoError("no lzop header")
    at = len(_MAGIC)
    (version,) = struct.unpack_from(">H", data, at)
    extended = version >= _EXTENDED
    at += 7 + extended  # three versions and the method; the level
    (flags,) = struct.unpack_from(">I", data, at)
    at += 8 if flags & _FILTER else 4
    at += 12 if extended else 8  # mode and time
    return at + 1 + data[at] + 4, flags  # the file's name and the header's checksum


def decompress(data: bytes, size: int) -> bytearray:
    """One LZO1X block (bitstream version 0) of at most ``size`` bytes. LzoError: damaged, or longer."""
    out = bytearray()
    at = 0
    # How many literals the last instruction copied: 0 to 3, or 4 for a run of more.
    state = 0
    try:
        if data[0] > 17:
            count = data[0] - 17
            at = _literals(data, 1, count, out, size)
            state = min(count, 4)
        while True:
            code = data[at]
            at += 1
            if code < 16:
                if state == 0:
                    count, at = _length(data, at, code, 15)
                    at = _literals(data, at, count + 3, out, size)
                    state = 4
                    continue
                distance = (data[at] << 2) + (code >> 2) + (2049 if state == 4 else 1)
                count = 3 if state == 4 else 2
                state = code & 3
                at += 1
            elif code < 64:
                if code < 32:
                    count, at = _length(data, at, code & 7, 7)
                    distance = _END_OF_STREAM + ((code & 8) << 11)
                else:
                    count, at = _length(data, at, code & 31, 31)
                    distance = 1
                count += 2
                word = data[at] | data[at + 1] << 8
                at += 2
                distance += word >> 2
                state = word & 3
                if distance == _END_OF_STREAM and code < 32:
                    return out
            else:
                distance = (data[at] << 3) + ((code >> 2) & 7) + 1
                count = 3 + ((code >> 5) & 1) if code < 128 else 5 + ((code >> 5) & 3)
                state = code & 3
                at += 1
            if distance > len(out) or count > size - len(out):
                raise LzoError(f"match of {count:#x} bytes at distance {distance:#x} leaves the block")
            start = len(out) - distance
            if distance >= count:
                out += out[start : start + count]
            else:
                # The match reaches into what it produces: a repeated pattern.
                out += (out[start:] * (count // distance + 1))[:count]
            if state:
                at = _literals(data, at, state, out, size)
    except IndexError:
        raise LzoError("the block is cut off") from None


def _length(data: bytes, at: int, bits: int, full: int) -> tuple[int, int]:
    """A length whose few ``bits`` are zero continues in the following bytes, 255 for each zero byte."""
    if bits:
        return bits, at
    while data[at] == 0:
        full += 255
        at += 1
    return full + data[at], at + 1


def _literals(data: bytes, at: int, count: int, out: bytearray, size: int) -> int:
    if at + count > len(data) or count > size - len(out):
        raise LzoError(f"{count:#x} literals leave the block")
    out += data[at : at + count]
    return at + count
