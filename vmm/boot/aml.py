"""ACPI Machine Language, built from Python calls that read like the ASL they stand for.

Every function returns the encoded bytes of one AML term, so terms nest by being passed to each other::

    aml.device(
        "COM1",
        aml.name("_HID", aml.eisaid("PNP0501")),
        aml.name("_UID", 1),
        aml.name("_CRS", aml.resources(aml.io(0x3F8, 8), aml.irq(4))),
    )

Where a term is expected, plain Python values stand for data: ``int`` is an Integer, ``str`` a String,
``list`` or ``tuple`` a Package; ``bytes`` is a term already encoded (:func:`buffer` makes a Buffer of data,
:func:`path` a reference to a named object). Whatever cannot be encoded (a bad name, a number that does not
fit its field) raises :class:`vmm.errors.ConfigError`.

Integers are 64 bits wide, so the table the terms go into must have revision 2 or later.
Source: ACPI 6.3, chapter 20 (AML encoding) and section 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Value = int | str | bytes | Sequence["Value"]

# An encoded term, named apart from other bytes for the reader only.
Term = bytes

# Region address spaces for operation_region (ACPI 6.3, table 5-143).
SYSTEM_MEMORY = 0
SYSTEM_IO = 1

# The "no target" operand of and_, or_ and their like: the result is the value of the expression only.
NOTHING = b"\x00"

_LEAD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_REST = _LEAD | frozenset("0123456789")


def _checked(value: int, bits: int, what: str) -> int:
    if not 0 <= value < 1 << bits:
        raise ConfigError(f"AML: {what} {value:#x} does not fit in {bits} bits")
    return value


# --- Names ------------------------------------------------------------------------------------------------


def _segment(text: str) -> bytes:
    if not 1 <= len(text) <= 4 or text[0] not in _LEAD or not _REST.issuperset(text):
        raise ConfigError(f"AML: {text!r} is no name: use 1 to 4 of A-Z, 0-9 and _, not starting with a digit")
    return text.ljust(4, "_").encode()


def path(text: str) -> Term:
    r"""A NameString such as ``"_CRS"``, ``"\\_SB.PCI0"`` or ``"^LNKA"``: also how an object is referred to.

    Source: ACPI 6.3, 20.2.2.
    """
    prefix = text[:1] if text[:1] == "\\" else text[: len(text) - len(text.lstrip("^"))]
    rest = text[len(prefix) :]
    if not rest:
        if not prefix:
            raise ConfigError("AML: a name is empty; give 1 to 4 of A-Z, 0-9 and _")
        return prefix.encode() + b"\x00"
    segments = [_segment(part) for part in rest.split(".")]
    if len(segments) > 255:
        raise ConfigError(f"AML: a name of {len(segments)} segments is longer than 255")
    lead = (b"", b"\x2e")[len(segments) - 1] if len(segments) <= 2 else bytes((0x2F, len(segments)))
    return prefix.encode() + lead + b"".join(segments)


# --- Lengths and data -------------------------------------------------------------------------------------


# A PkgLength of one byte holds six bits. With more bytes, the first keeps its low four bits for the length
# and its top two for the number of bytes that follow. Source: ACPI 6.3, 20.2.4.
_LENGTH_LIMITS = (1 << 6, 1 << 12, 1 << 20, 1 << 28)


def _length(value: int, width: int) -> bytes:
    if width == 1:
        return bytes((value,))
    return bytes(((width - 1) << 6 | value & 0xF,)) + (value >> 4).to_bytes(width - 1, "little")


def pkg_length(content: int) -> bytes:
    """PkgLength of an object whose other ``content`` bytes follow; the length counts its own bytes too."""
    for width, limit in enumerate(_LENGTH_LIMITS, 1):
        if content + width < limit:
            return _length(content + width, width)
    raise ConfigError(f"AML: an object of {content} bytes is larger than AML allows (2^28 - 1)")


def _bit_count(bits: int) -> bytes:
    # The width of a field is written as a PkgLength too, but it counts bits, and not its own bytes.
    for width, limit in enumerate(_LENGTH_LIMITS, 1):
        if 1 <= bits < limit:
            return _length(bits, width)
    raise ConfigError(f"AML: a field of {bits} bits; it can have 1 to 2^28 - 1")


def _block(opcode: bytes, *parts: bytes) -> Term:
    content = b"".join(parts)
    return opcode + pkg_length(len(content)) + content


def integer(value: int) -> Term:
    """An Integer constant, 0 to 2^64 - 1, in its shortest encoding."""
    _checked(value, 64, "integer")
    if value <= 1:
        return bytes((value,))
    if value == (1 << 64) - 1:
        return b"\xff"
    for opcode, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << 8 * size:
            return bytes((opcode,)) + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> Term:
    """A String constant; ASCII without NUL is all that AML can hold."""
    if not text.isascii() or "\0" in text:
        raise ConfigError(f"AML: the string {text!r} is not plain ASCII")
    return b"\x0d" + text.encode() + b"\x00"


def data(value: Value) -> Term:
    """The term that a Python value stands for (see the module's text)."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return string(value)
    if isinstance(value, int):
        return integer(value)
    return package(*value)


def buffer(content: bytes) -> Term:
    """A Buffer that holds ``content``."""
    return _block(b"\x11", integer(len(content)), content)


def package(*elements: Value) -> Term:
    """A Package. Above 255 elements it becomes a VarPackage, whose count is an Integer."""
    body = b"".join(data(element) for element in elements)
    if len(elements) <= 255:
        return _block(b"\x12", bytes((len(elements),)), body)
    return _block(b"\x13", integer(len(elements)), body)


def eisaid(text: str) -> Term:
    """A compressed EISA identifier such as ``"PNP0501"``: three letters, four hexadecimal digits.

    Source: ACPI 6.3, 19.6.35; each letter keeps five bits, and the number goes most significant byte first.
    """
    letters, number = text[:3], text[3:]
    if len(text) != 7 or not _LEAD.issuperset(letters) or "_" in letters:
        raise ConfigError(f"AML: {text!r} is no EISA id: use three capital letters and four hexadecimal digits")
    try:
        product = bytes.fromhex(number)
    except ValueError:
        raise ConfigError(f"AML: the EISA id {text!r} does not end in four hexadecimal digits") from None
    first, second, third = (ord(letter) - 0x40 for letter in letters)
    return b"\x0c" + (first << 10 | second << 5 | third).to_bytes(2, "big") + product


def uuid(text: str) -> Term:
    """ToUUID: a 16-byte Buffer whose first three fields are little-endian (ACPI 6.3, 19.6.142)."""
    try:
        raw = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        raw = b""
    if len(raw) != 16:
        raise ConfigError(f"AML: {text!r} is not a UUID; write 8-4-4-4-12 hexadecimal digits")
    return buffer(raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:])


# --- Named objects ----------------------------------------------------------------------------------------


def name(where: str, value: Value) -> Term:
    """``Name (where, value)``."""
    return b"\x08" + path(where) + data(value)


def scope(where: str, *terms: Term) -> Term:
    r"""``Scope (where) { terms }``; ``where`` may be absolute (``"\\_GPE"``) inside any other scope."""
    return _block(b"\x10", path(where), *terms)


def device(where: str, *terms: Term) -> Term:
    """``Device (where) { terms }``."""
    return _block(b"\x5b\x82", path(where), *terms)


def method(where: str, *terms: Term, args: int = 0, serialized: bool = False) -> Term:
    """``Method (where, args) { terms }``. One that creates named objects or fields has to be serialized."""
    if not 0 <= args <= 7:
        raise ConfigError(f"AML: method {where} takes {args} arguments; 0 to 7 are possible")
    return _block(b"\x14", path(where), bytes((args | serialized << 3,)), *terms)


def operation_region(where: str, space: int, offset: int, size: int) -> Term:
    """``OperationRegion``: ``size`` bytes at ``offset`` of an address space, for :func:`field` to name."""
    head = b"\x5b\x80" + path(where) + bytes((_checked(space, 8, "address space"),))
    return head + integer(offset) + integer(size)


def field(region: str, *parts: tuple[str | None, int], access: int = 8) -> Term:
    """``Field``: names for runs of bits in a region, from bit 0 up.

    ``parts`` are ``(name, bits)``; None for a name skips that many bits. ``access`` is the width in bits of
    the accesses the guest makes: 8, 16, 32 or 64. The update rule is Preserve, the lock rule NoLock.
    """
    widths = (8, 16, 32, 64)
    if access not in widths:
        raise ConfigError(f"AML: field access of {access} bits; it can be 8, 16, 32 or 64")
    units = ((b"\x00" if part is None else _segment(part)) + _bit_count(bits) for part, bits in parts)
    return _block(b"\x5b\x81", path(region), bytes((widths.index(access) + 1,)), *units)


# --- What methods are made of -----------------------------------------------------------------------------


def arg(index: int) -> Term:
    """Argument ``index`` (0 to 6) of the method around it."""
    if not 0 <= index <= 6:
        raise ConfigError(f"AML: Arg{index} does not exist")
    return bytes((0x68 + index,))


def local(index: int) -> Term:
    """Local variable ``index`` (0 to 7) of the method around it."""
    if not 0 <= index <= 7:
        raise ConfigError(f"AML: Local{index} does not exist")
    return bytes((0x60 + index,))


def return_(value: Value) -> Term:
    """``Return (value)``."""
    return b"\xa4" + data(value)


def store(value: Value, target: Term) -> Term:
    """``target = value``."""
    return b"\x70" + data(value) + target


def and_(left: Value, right: Value, target: Term = NOTHING) -> Term:
    """``left & right``, also stored in ``target``."""
    return b"\x7b" + data(left) + data(right) + target


def or_(left: Value, right: Value, target: Term = NOTHING) -> Term:
    """``left | right``, also stored in ``target``."""
    return b"\x7d" + data(left) + data(right) + target


def equal(left: Value, right: Value) -> Term:
    """``left == right``."""
    return b"\x93" + data(left) + data(right)


def not_(value: Value) -> Term:
    """``!value``."""
    return b"\x92" + data(value)


def if_(condition: Value, *terms: Term) -> Term:
    """``If (condition) { terms }``."""
    return _block(b"\xa0", data(condition), *terms)


def else_(*terms: Term) -> Term:
    """``Else { terms }``, right after an :func:`if_`."""
    return _block(b"\xa1", *terms)


def notify(where: str, value: int) -> Term:
    """``Notify (where, value)``."""
    return b"\x86" + path(where) + integer(value)


def create_dword_field(source: Value, offset: int, where: str) -> Term:
    """``CreateDWordField``: names the four bytes at ``offset`` of a buffer."""
    return b"\x8a" + data(source) + integer(offset) + path(where)


# --- Resource templates: what _CRS and _PRS hold ----------------------------------------------------------


def resources(*descriptors: bytes) -> Term:
    """``ResourceTemplate () { descriptors }``: a Buffer that ends in an End Tag (checksum 0: none)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def _span(first: int, size: int, bits: int) -> None:
    _checked(first, bits, "first address")
    if size < 1:
        raise ConfigError(f"AML: a resource at {first:#x} of size {size}; it has to have one byte at least")
    _checked(first + size - 1, bits, "last address")


def io(port: int, count: int) -> bytes:
    """``IO (Decode16)``: ``count`` ports from ``port`` on (ACPI 6.3, 6.4.2.5)."""
    _span(port, count, 16)
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, _checked(count, 8, "port count"))


def irq(line: int, *, level: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """``IRQ`` for ISA lines 0 to 15 (6.4.2.1).

    The default (edge, active high, exclusive: what ISA means) is encoded as ``IRQNoFlags``.
    """
    mask = 1 << _checked(line, 4, "ISA interrupt")
    if not (level or active_low or shared):
        return struct.pack("<BH", 0x22, mask)
    return struct.pack("<BHB", 0x23, mask, (not level) | active_low << 3 | shared << 4)


def interrupt(*gsis: int, level: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """``Interrupt (ResourceConsumer)``: global system interrupts of any number (6.4.3.6)."""
    if not 1 <= len(gsis) <= 255:
        raise ConfigError(f"AML: an interrupt descriptor holds 1 to 255 interrupts, not {len(gsis)}")
    numbers = [_checked(gsi, 32, "GSI") for gsi in gsis]
    flags = 1 | (not level) << 1 | active_low << 2 | shared << 3
    return struct.pack(f"<BHBB{len(gsis)}I", 0x89, 2 + 4 * len(gsis), flags, len(gsis), *numbers)


def memory32_fixed(address: int, size: int, *, writable: bool = True) -> bytes:
    """``Memory32Fixed`` (6.4.3.4)."""
    _span(address, size, 32)
    return struct.pack("<BHBII", 0x86, 9, writable, address, _checked(size, 32, "size"))


def _window(form: str, tag: int, kind: int, type_flags: int, first: int, size: int, translation: int) -> bytes:
    width = struct.calcsize("<" + form)
    _span(first, size, 8 * width)
    _checked(size, 8 * width, "size")
    _checked(translation, 8 * width, "translation")
    # General flags 0x0c: a producer (a bridge passes the range on), both ends fixed, positive decode.
    head = struct.pack("<BHBBB", tag, 3 + 5 * width, kind, 0x0C, type_flags)
    return head + struct.pack(f"<5{form}", 0, first, first + size - 1, translation, size)


def word_bus_number(first: int, count: int) -> bytes:
    """``WordBusNumber``: the bus numbers below a PCI host bridge (6.4.3.5.3)."""
    return _window("H", 0x88, 2, 0, first, count, 0)


def word_io(first: int, size: int, *, translation: int = 0) -> bytes:
    """``WordIO (EntireRange)``: a window of I/O ports."""
    return _window("H", 0x88, 1, 3, first, size, translation)


def dword_memory(first: int, size: int, *, cacheable: bool = False, translation: int = 0) -> bytes:
    """``DWordMemory (ReadWrite)``: a window of memory below 4 GiB."""
    return _window("I", 0x87, 0, 1 | cacheable << 1, first, size, translation)


def qword_memory(first: int, size: int, *, cacheable: bool = False, translation: int = 0) -> bytes:
    """``QWordMemory (ReadWrite)``: a window of memory anywhere."""
    return _window("Q", 0x8A, 0, 1 | cacheable << 1, first, size, translation)
