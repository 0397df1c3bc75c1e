"""A hypercall comes to an end on every host: the kernel goes on, with an error."""

from __future__ import annotations

from typing import Any

import pytest

UNKNOWN, ENOSYS = 99, 1000
GATE = bytes.fromhex("8000 1000 008e 1000 00000000 00000000")  # interrupt gate to 0x100080, selector 0x10
LSTAR = bytes.fromhex("b9820000c0 31d2 b880001000 0f30")  # mov ecx, LSTAR; xor edx, edx; mov eax, 0x100080; wrmsr


def program(before: bytes, call: bytes) -> bytes:
    """Exits with 1 if the call returned -1000, with 0 if it returned something else, with 6 after a #UD."""
    code = bytes.fromhex("0f011c25 f0001000") + before + b"\xb8" + UNKNOWN.to_bytes(4, "little") + call
    code += b"\x48\x3d" + (-ENOSYS).to_bytes(4, "little", signed=True) + bytes.fromhex("0f94c0 e6f4")
    code = code.ljust(0x80, b"\x90") + b"\xb0\x06\xe6\xf4"
    code = code.ljust(0xF0, b"\x90") + (0x6F).to_bytes(2, "little") + (0x100100).to_bytes(8, "little")
    return code.ljust(0x100, b"\x90") + bytes(6 * 16) + GATE


@pytest.mark.parametrize("call", ["0f01c1", "0f01d9"], ids=["vmcall", "vmmcall"])
def test_an_unknown_hypercall_returns_an_error(flat: Any, call: str) -> None:
    outcome = flat(program(LSTAR, bytes.fromhex(call))).run(60)
    assert (outcome.reason, outcome.code) == ("debug-exit", 1)


@pytest.mark.parametrize("call", ["0f01c1", "0f01d9"], ids=["vmcall", "vmmcall"])
def test_a_kernel_without_system_calls_is_not_held_by_a_hypercall(flat: Any, call: str) -> None:
    outcome = flat(program(b"", bytes.fromhex(call))).run(60)
    assert outcome.reason == "debug-exit" and outcome.code in (1, 6)
