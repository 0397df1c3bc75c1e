"""x87 arithmetic in guest kernel code gives the architecture's answers, natively or completed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm import Machine

if TYPE_CHECKING:
    from pathlib import Path

_LOAD_AND_EXIT = bytes.fromhex("8b042500900000e7f4")  # mov eax, [0x9000]; out 0xf4, eax
_CASES = {
    # fninit; fld1; fldpi; faddp; fistp dword [0x9000]
    "one plus pi, rounded": ("dbe3 d9e8 d9eb dec1 db1c2500900000", 4),
    # fninit; fld1; fldz; fcomip st(1): 0 is below 1; setc [0x9000]
    "flags of a comparison": ("dbe3 d9e8 d9ee dff1 0f92042500900000", 1),
    # fninit; mov dword [0x9010], 9; fild dword [0x9010]; fsqrt; fistp dword [0x9000]
    "square root from memory": ("dbe3 c704251090000009000000 db042510900000 d9fa db1c2500900000", 3),
    # fninit; fld1; fldz; fdivp (1/0, masked: infinity); fnstsw [0x9000]: ZE
    "a masked division by zero": ("dbe3 d9e8 d9ee def9 dd3c2500900000 812425009000000f000000", 4),
}


@pytest.mark.parametrize("name", _CASES)
def test_x87_at_cpl0(tmp_path: Path, name: str) -> None:
    code, answer = _CASES[name]
    image = tmp_path / "x87.bin"
    image.write_bytes(bytes.fromhex(code) + _LOAD_AND_EXIT)
    with Machine(kernel=image, kind="flat", mode="long", address=0x100000, memory="4M") as machine:
        outcome = machine.run(timeout=120)
        assert (outcome.reason, outcome.code) == ("debug-exit", answer), outcome.instruction.hex()
