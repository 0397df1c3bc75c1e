"""Checking a saved device state before anything of it is used: it may come from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.devices.device import State


def checked(
    name: str,
    state: State,
    numbers: dict[str, int],
    strings: dict[str, int] | None = None,
    values: tuple[str, ...] = (),
) -> State:
    """Answer a copy of ``state`` if it has version 1, every field asked for, and no other.

    ``numbers`` gives each integer field's greatest value (the least is 0), ``strings`` each ``bytes`` field's
    greatest length; ``values`` are fields for others to check. Raises ``ValueError`` naming the device ``name`` and
    the field.
    """
    strings = strings or {}
    if not isinstance(state, dict) or state.get("version") != 1:
        raise ValueError(f"{name}: this is not a version 1 state")
    odd = state.keys() ^ {"version", *numbers, *strings, *values}
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


def listed(name: str, value: object, most: int) -> list[State]:
    """Answer the records of a list in a state, at most ``most``, for :func:`checked`: they share the state's version.
    Raises ``ValueError``."""
    if not isinstance(value, list) or len(value) > most or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{name}: this is not a list of at most {most} records")
    return [{"version": 1, **record} for record in value]


def accept(code: int) -> None:
    """Raise as ``ValueError`` what native code says of a state that it refuses."""
    if code < 0:
        from vmm._ffi import ffi, lib

        raise ValueError(ffi.string(lib.vmm_error_text()).decode(errors="replace"))
