"""The compressed kernel inside a bzImage: recognised by magic, unpacked within a bound, kept in a cache.

The kernel's build ends every payload with the unpacked size as 32 bits, little-endian (gzip has it as ISIZE,
the other formats get it appended: scripts/Makefile.lib, size_append). That number is checked against the
bound before a byte is unpacked, is all the memory an unpacker may fill, and must be met exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot import cache
from vmm.boot.elf import MAGIC as ELF_MAGIC
from vmm.boot.image import Image
from vmm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

# Dictionaries and windows: xz and zstd kernels use up to 128 MiB (scripts/xz_wrap.sh, zstd -22 --ultra).
WINDOW_MAX = 1 << 27
_LZMA_MEMORY_MAX = WINDOW_MAX + (32 << 20)
# lz4's legacy framing cuts the input into pieces of this size.
_LZ4_BLOCK = 8 << 20


class CannotUnpack(Exception):
    """This host cannot unpack this payload, though nothing says that it is damaged: the guest may."""


class _Corrupt(Exception):
    """The stream breaks its format's rules, or its length is not the promised one."""


def open_unpacked(image: Image, offset: int, length: int, bound: int, notes: list[str]) -> Image:
    """The ELF file (relocations may follow it) that the payload at ``offset`` of ``image`` unpacks to.

    From the cache where it is there; into it otherwise. At most ``bound`` bytes. CannotUnpack: no payload, an
    unknown format, a missing decompressor, or something else than ELF inside. ImageError: damaged or a bomb.
    """
    if length < 16:
        raise CannotUnpack("the image tells of no payload")
    key = cache.key_of_stamp(image)
    data = b""
    if key is None:
        data = image.read(offset, length)
        key = cache.key_of_payload(data)
    unpacked = cache.fetch(key, image.name)
    if unpacked is not None:
        notes.append("payload: found unpacked in the cache")
    else:
        kind, content = unpack(data or image.read(offset, length), bound, image.name)
        notes.append(f"payload: {kind}, {length} bytes unpacked to {len(content)}")
        cache.store(key, content, notes)
        unpacked = Image.of(content, image.name)
    if unpacked.size > bound:
        unpacked.close()
        raise _bomb(image.name, unpacked.size, bound)
    if unpacked.head(4) != ELF_MAGIC:
        unpacked.close()
        raise CannotUnpack("the payload holds no ELF file")
    cache.remember_stamp(image, key)
    return unpacked


def unpack(data: bytes, bound: int, name: str) -> tuple[str, bytes | bytearray]:
    """Unpack ``data``; returns (format, content). Raises as `open_unpacked` does."""
    found = next((entry for entry in _FORMATS if data.startswith(entry[1])), None)
    if found is None:
        raise CannotUnpack(f"unknown payload format (it begins with {data[:6].hex(' ')})")
    kind, _, unpacker = found
    size = int.from_bytes(data[-4:], "little")
    if size > bound:
        raise _bomb(name, size, bound)
    try:
        content = unpacker(data, size)
    except ImportError as error:
        raise CannotUnpack(f"Python's {error.name} is needed to unpack {kind}") from None
    except _Corrupt as error:
        raise ImageError(f"{name}: the {kind} payload is damaged: {error}; fetch or build the image again") from None
    if len(content) != size:
        way = "more" if len(content) > size else "less"
        raise ImageError(
            f"{name}: the {kind} payload is damaged: it unpacks to {way} than the promised {size:#x} bytes; "
            "fetch or build the image again"
        )
    return kind, content


def _bomb(name: str, size: int, bound: int) -> ImageError:
    return ImageError(
        f"{name}: the payload claims to unpack to {size:#x} bytes, more than the {bound:#x} the kernel is to "
        "run in; the image is damaged"
    )


def _gzip(data: bytes, size: int) -> bytes:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    try:
        content = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise _Corrupt(str(error)) from None
    if len(content) <= size and not stream.eof:
        raise _Corrupt("the stream does not end")
    return content


def _bzip2(data: bytes, size: int) -> bytes:
    import bz2

    stream = bz2.BZ2Decompressor()
    return _drain(stream.decompress, lambda: stream.eof, OSError, data, size)


def _xz(data: bytes, size: int) -> bytes:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_MEMORY_MAX)
    return _drain(stream.decompress, lambda: stream.eof, lzma.LZMAError, data, size)


def _lzma(data: bytes, size: int) -> bytes:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_ALONE, _LZMA_MEMORY_MAX)
    return _drain(stream.decompress, lambda: stream.eof, lzma.LZMAError, data, size)


def _drain(
    decompress: Callable[[bytes, int], bytes],
    at_end: Callable[[], bool],
    error: type[Exception],
    data: bytes,
    size: int,
) -> bytes:
    """Pull at most size + 1 bytes out of a decompressor: one too many is enough to know."""
    pieces = []
    left = size + 1
    try:
        while left > 0 and not at_end():
            piece = decompress(data, left)
            if not piece and not data:
                break
            data = b""
            pieces.append(piece)
            left -= len(piece)
    except (error, ValueError, EOFError) as reason:
        raise _Corrupt(str(reason)) from None
    if left > 0 and not at_end():
        raise _Corrupt("the stream does not end")
    return b"".join(pieces)


def _lz4(data: bytes, size: int) -> bytes:
    import lz4.block

    pieces = []
    total = 0
    at = 4
    # Each round consumes at least the 4 bytes of a block's length; the size word is what remains.
    while at + 4 < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if length == _LZ4_MAGIC:
            continue
        if not 0 < length <= len(data) - 4 - at:
            raise _Corrupt(f"block of {length:#x} bytes at {at:#x}")
        try:
            piece = lz4.block.decompress(data[at : at + length], uncompressed_size=min(_LZ4_BLOCK, size - total))
        except (lz4.block.LZ4BlockError, ValueError, OverflowError, MemoryError):
            raise _Corrupt(f"block at {at:#x}") from None
        if not piece:
            raise _Corrupt(f"empty block at {at:#x}")
        pieces.append(piece)
        total += len(piece)
        at += length
    return b"".join(pieces)


def _zstd(data: bytes, size: int) -> bytearray:
    import zstandard

    content = bytearray(size)
    filled = 0
    try:
        # Without the size word, which would be taken for the next frame.
        packed = memoryview(data)[:-4]
        with zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX).stream_reader(packed) as stream:
            view = memoryview(content)
            while filled < size:
                count = stream.readinto(view[filled:])
                if not count:
                    raise _Corrupt("the stream is too short")
                filled += count
            if stream.read(1):
                raise _Corrupt("the stream is too long")
    except zstandard.ZstdError as error:
        raise _Corrupt(str(error)) from None
    return content


def _lzo(data: bytes, size: int) -> bytearray:
    from vmm.boot import lzo

    try:
        return lzo.unpack_lzop(data[:-4], size)
    except lzo.LzoError as error:
        raise _Corrupt(str(error)) from None


_LZ4_MAGIC = 0x184C2102

_FORMATS: tuple[tuple[str, bytes, Callable[[bytes, int], bytes | bytearray]], ...] = (
    ("gzip", b"\x1f\x8b\x08", _gzip),
    ("bzip2", b"BZh", _bzip2),
    ("xz", b"\xfd7zXZ\0", _xz),
    ("lzma", b"\x5d\x00\x00", _lzma),
    ("lz4", _LZ4_MAGIC.to_bytes(4, "little"), _lz4),
    ("zstd", b"\x28\xb5\x2f\xfd", _zstd),
    ("lzo", b"\x89LZO\0\r\n\x1a\n", _lzo),
)
