"""Encodings that no processor offered here has are #UD, whoever executes them: the processor, KVM, or pyvmm for it."""

from __future__ import annotations

from typing import Any

import pytest

ILLEGAL = {
    "movbe of a register": "0f38f0c1",
    "movbe to a register": "0f38f1c1",
    "rdpru": "0f01fd",
    "invpcid of a register": "660f3882c1",
    "cmpxchg8b of a register": "0fc7c9",
    "ldmxcsr of a register": "0faed0",
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_an_illegal_encoding_is_undefined_and_does_not_end_the_run(flat: Any, what: str) -> None:
    # A gate for vector 6 at 0x200000 leads to the debug exit with 6: lidt from behind the code, then the instruction.
    gate = bytes.fromhex("4000 1000 008e 1000 00000000 00000000")  # 0x100040, selector 0x10
    code = bytes.fromhex("0f011c25 70001000") + bytes.fromhex(ILLEGAL[what]) + b"\xb0\x05\xe6\xf4"
    code = code.ljust(0x40, b"\x90") + b"\xb0\x06\xe6\xf4"
    code = code.ljust(0x70, b"\x90") + (0x6F).to_bytes(2, "little") + (0x100080).to_bytes(8, "little")
    code = code.ljust(0x80, b"\x90") + bytes(6 * 16) + gate
    outcome = flat(code).run(60)
    assert (outcome.reason, outcome.code) == ("debug-exit", 6)
