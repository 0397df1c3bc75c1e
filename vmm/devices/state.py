"""Checking a saved device state before anything of it is used: it may come from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.devices.device import State


def checked(name: str, state: State, numbers: dict[str, int], strings: dict[str, int] | None = None) -> State:
    """Answer a copy of ``state`` if it has version 1, every field asked for, and no other.

    ``numbers`` gives each integer field's greatest value (the least is 0), ``strings`` each ``bytes`` field's
    greatest length. Raises ``ValueError`` naming the device ``name`` and the field.
    """
    strings = strings or {}
    if not isinstance(state, dict) or state.get("version") != 1:
        raise ValueError(f"{name}: this is not a version 1 state")
    odd = state.keys() ^ {"version", *numbers, *strings}
    if odd:
        raise ValueError(f"{name}: fields missing or unknown: {', '.join(sorted(map(str, odd)))}")
    for field, most in numbers.items():
        value = state[field]
        if not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name}: {field} is {value!r}, not 0..{most:#x}")
    for field, most in strings.items():
        value = state[field]
        if not isinstance(value, bytes) or len(value) > most:
            raise ValueError(f"{name}: {field} is not at most {most} bytes")
    return dict(state)
