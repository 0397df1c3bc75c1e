"""Plain values as bytes: CBOR (RFC 8949) in its core deterministic encoding (4.2), and no other.

A value is ``None``, a ``bool``, an ``int`` of any size, ``bytes``, ``str``, or a list or dict of such, with ``int`` and
``str`` keys. One value has one encoding: what :func:`decode` accepts, :func:`encode` answers again.
"""

from __future__ import annotations

from typing import Any

DEPTH_MAX = 64  # lists within lists; a device's state has three or four
BIGNUM_MAX = 4096  # bytes of an integer

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _LIST, _MAP, _TAG, _SIMPLE = range(8)
_SIMPLE_VALUES = {20: False, 21: True, 22: None}
_POSITIVE_BIGNUM, _NEGATIVE_BIGNUM = 2, 3


def encode(value: Any) -> bytes:
    """The one encoding of ``value``. Raises ``ValueError`` for what is no plain value, with the way to it."""
    out = bytearray()
    _encode(value, out, ())
    return bytes(out)


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << 8 * size:
            return bytes([major << 5 | code]) + argument.to_bytes(size, "big")
    raise ValueError("more than 2^64 of something")


def _encode(value: Any, out: bytearray, way: tuple[Any, ...]) -> None:
    if len(way) > DEPTH_MAX:
        raise ValueError(f"a value has more than {DEPTH_MAX} lists and dicts within each other")
    kind = type(value)
    if value is None or kind is bool:
        out += _head(_SIMPLE, 22 if value is None else 20 + value)
    elif kind is int:
        _encode_int(value, out)
    elif kind is bytes:
        out += _head(_BYTES, len(value))
        out += value
    elif kind is str:
        text = value.encode()
        out += _head(_TEXT, len(text)) + text
    elif kind is list:
        out += _head(_LIST, len(value))
        for n, item in enumerate(value):
            _encode(item, out, (*way, n))
    elif kind is dict:
        if any(type(key) not in (int, str) for key in value):
            raise ValueError(f"{_name(way)} has a key that is neither int nor str")
        out += _head(_MAP, len(value))
        for key, name in sorted((encode(name), name) for name in value):
            out += key
            _encode(value[name], out, (*way, name))
    else:
        raise ValueError(f"{_name(way)} is a {kind.__name__}, not a plain value")


def _encode_int(value: int, out: bytearray) -> None:
    major, argument = (_UNSIGNED, value) if value >= 0 else (_NEGATIVE, -1 - value)
    if argument < 1 << 64:
        out += _head(major, argument)
        return
    size = (argument.bit_length() + 7) // 8
    if size > BIGNUM_MAX:
        raise ValueError(f"an integer of more than {BIGNUM_MAX} bytes")
    out += _head(_TAG, _POSITIVE_BIGNUM if value >= 0 else _NEGATIVE_BIGNUM) + _head(_BYTES, size)
    out += argument.to_bytes(size, "big")


def _name(way: tuple[Any, ...]) -> str:
    return "value" + "".join(f"[{step!r}]" for step in way)


def decode(encoded: bytes) -> Any:
    """The value that ``encoded`` is the encoding of, all of it. Raises ``ValueError`` for any other bytes."""
    reader = _Reader(encoded)
    value = reader.value(0)
    if reader.at != len(encoded):
        raise ValueError(f"{len(encoded) - reader.at} bytes follow the value")
    return value


class _Reader:
    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded
        self.at = 0

    def take(self, n: int) -> bytes:
        if n > len(self.encoded) - self.at:
            raise ValueError(f"{n} bytes are said to be at {self.at}, where there are fewer")
        self.at += n
        return self.encoded[self.at - n : self.at]

    def head(self) -> tuple[int, int]:
        first = self.take(1)[0]
        major, info = first >> 5, first & 31
        if info < 24:
            return major, info
        if info > 27 or major == _SIMPLE:
            raise ValueError(f"byte {first:#x} at {self.at - 1} begins nothing known")
        size = 1 << (info - 24)
        argument = int.from_bytes(self.take(size), "big")
        if argument < (24 if size == 1 else 1 << 4 * size):
            raise ValueError(f"a number at {self.at - size} is longer than need be")
        return major, argument

    def value(self, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise ValueError(f"more than {DEPTH_MAX} lists and maps within each other")
        major, argument = self.head()
        if major == _UNSIGNED:
            return argument
        if major == _NEGATIVE:
            return -1 - argument
        if major == _BYTES:
            return self.take(argument)
        if major == _TEXT:
            return self.take(argument).decode()  # a UnicodeDecodeError is a ValueError
        if major == _LIST:
            return [self.value(depth + 1) for _ in range(self.fitting(argument))]
        if major == _MAP:
            return self.map(self.fitting(argument), depth)
        if major == _TAG:
            return self.bignum(argument)
        if argument not in _SIMPLE_VALUES:
            raise ValueError(f"simple value {argument} is not known")
        return _SIMPLE_VALUES[argument]

    def fitting(self, n: int) -> int:
        """``n`` items take at least as many bytes: more than are left is a lie."""
        if n > len(self.encoded) - self.at:
            raise ValueError(f"{n} items are said to be at {self.at}, where there are fewer bytes")
        return n

    def map(self, n: int, depth: int) -> dict[int | str, Any]:
        value: dict[int | str, Any] = {}
        before = b""
        for _ in range(n):
            start = self.at
            key = self.value(DEPTH_MAX)
            if type(key) not in (int, str) or self.encoded[start : self.at] <= before:
                raise ValueError(f"a key at {start} is no number or text, or not in its place")
            before = self.encoded[start : self.at]
            value[key] = self.value(depth + 1)
        return value

    def bignum(self, tag: int) -> int:
        major, size = self.head()
        if tag not in (_POSITIVE_BIGNUM, _NEGATIVE_BIGNUM) or major != _BYTES or not 8 < size <= BIGNUM_MAX:
            raise ValueError(f"tag {tag} before {self.at} is no large integer")
        digits = self.take(size)
        if digits[0] == 0:
            raise ValueError(f"a number before {self.at} is longer than need be")
        number = int.from_bytes(digits, "big")
        return number if tag == _POSITIVE_BIGNUM else -1 - number
