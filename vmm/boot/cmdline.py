"""The Linux kernel's command line, read as the kernel does (lib/cmdline.c, next_arg; kernel/params.c, parse_args)."""

from __future__ import annotations

from typing import NamedTuple

_BLANKS = " \t\n\v\f\r"


class Option(NamedTuple):
    """One option: ``name`` as written, ``value`` after the first "=" without its quotes, ``None`` without one."""

    name: str
    value: str | None


class CommandLine:
    """A command line's ``options``, in order. What follows " -- " is init's, and no option.

    Blanks end an option except between double quotes, which can be put around a value or the whole of it; there is no
    way to write a double quote itself. In names "-" and "_" are the same.
    """

    __slots__ = ("options",)

    def __init__(self, text: str) -> None:
        self.options: list[Option] = []
        at = 0
        while True:
            while at < len(text) and text[at] in _BLANKS:
                at += 1
            if at == len(text):
                return
            option, at = _next(text, at)
            if option == Option("--", None):
                return
            self.options.append(option)

    def __contains__(self, name: str) -> bool:
        """Whether an option of that name is given, with a value or without."""
        return any(_same(option.name, name) for option in self.options)

    def values(self, name: str) -> list[str]:
        """Every value given to ``name``, in order."""
        return [o.value for o in self.options if o.value is not None and _same(o.name, name)]

    def last(self, name: str) -> str | None:
        """The value of ``name`` that counts for most options: the last one."""
        values = self.values(name)
        return values[-1] if values else None


def _next(text: str, at: int) -> tuple[Option, int]:
    """The option at ``at``, which is no blank, and where the rest begins."""
    whole = text[at] == '"'
    start = at = at + whole
    quoted, equals = whole, 0
    while at < len(text) and (quoted or text[at] not in _BLANKS):
        if text[at] == "=" and not equals:
            equals = at - start  # an option that begins with "=" has its name end at the next one
        quoted ^= text[at] == '"'
        at += 1
    word = text[start:at]
    if whole:
        word = word.removesuffix('"')
    if not equals:
        return Option(word, None), at
    name, value = word[:equals], word[equals + 1 :]
    if value.startswith('"'):
        value = value[1:].removesuffix('"')
    return Option(name, value), at


def _same(one: str, other: str) -> bool:
    return one.replace("-", "_") == other.replace("-", "_")
