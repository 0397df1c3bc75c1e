"""Fields of a configuration: readers that parse and check a value, with defaults and help texts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm import layout
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

PathLike = str | os.PathLike[str]

_UNITS = {"": layout.MIB, "K": layout.KIB, "M": layout.MIB, "G": layout.GIB}


def parse_size(text: str | int) -> int:
    """Parse ``"512M"``, ``"4G"``, ``"65536K"`` or ``"512"`` (MiB, as in QEMU) to bytes; an int is bytes already.

    Raises :class:`~vmm.errors.ConfigError`.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    body = str(text).strip().upper().removesuffix("IB").removesuffix("B")
    unit = body[-1:] if body[-1:].isalpha() else ""
    number = body.removesuffix(unit) if unit else body
    if unit not in _UNITS or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ConfigError(f"{text!r} is not a size: write 512M, 4G or 65536K (a bare number is MiB)")
    return int(number) * _UNITS[unit]


def read_path(value: Any) -> str | None:
    """Read the path of a file, or ``None``."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{value!r} is not the path of a file")
    path = os.fspath(value)
    if "\0" in path:
        raise ConfigError(f"{path!r} is not the path of a file: there is a zero byte in it")
    return path


def split_commas(text: str) -> list[str]:
    """Split a text at single commas; two commas stand for one in a value, as in QEMU.

    Raises :class:`~vmm.errors.ConfigError` for a zero byte, which no value can contain.
    """
    if "\0" in text:
        raise ConfigError(f"{text!r} is not a list: there is a zero byte in it")
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def read_paths(value: Any) -> tuple[str, ...]:
    """Read several paths: a list, one path, or text for :func:`split_commas`."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part for part in split_commas(value) if part)
    entries = [value] if isinstance(value, os.PathLike) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(part, str | os.PathLike) for part in entries):
        raise ConfigError(f"{value!r} is not a list of paths of files")
    return tuple(path for path in map(read_path, entries) if path is not None)


def read_text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} is not a string")
    return value


def read_flag(value: Any) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} is not true or false")
    return value


def read_one_of(*choices: str) -> Callable[[Any], str]:
    """Return a reader that accepts one of ``choices``."""

    def check(value: Any) -> str:
        if value not in choices:
            raise ConfigError(f"{value!r} is not one of {', '.join(choices)}")
        return str(value)

    return check


class Field:
    """One field of a machine: its reader, its default and its help text."""

    __slots__ = ("default", "help", "read")

    def __init__(self, read: Callable[[Any], Any], default: Any, help: str) -> None:
        self.read = read
        self.default = default
        self.help = help


def read_count(least: int, most: int, what: str) -> Callable[[Any], int]:
    """Return a reader of a whole number in ``[least, most]``, given as an int or as digits."""

    def check(value: Any) -> int:
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise ConfigError(f"{value!r} is not {what}: give {least} to {most}")
        return number

    return check
