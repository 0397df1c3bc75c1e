"""Guest instructions as text (capstone)."""

from __future__ import annotations

from functools import cache
from typing import Any

_LONGEST = 15


@cache
def _decoder(bits: int, detail: bool) -> Any:
    import capstone

    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32}.get(bits, capstone.CS_MODE_64)
    decoder = capstone.Cs(capstone.CS_ARCH_X86, mode)
    decoder.detail = detail
    return decoder


def disassemble(code: bytes, address: int, bits: int = 64, limit: int = 6) -> list[str]:
    """Up to ``limit`` instructions of ``code`` at ``address``: ``address: bytes  mnemonic operands``."""
    lines = []
    for insn in _decoder(bits, False).disasm(code, address):
        lines.append(f"{insn.address:#x}: {insn.bytes.hex():<22} {insn.mnemonic} {insn.op_str}".rstrip())
        if len(lines) == limit:
            break
    if not lines:
        lines.append(f"{address:#x}: {code.hex() or '(not readable)':<22} (not an instruction)")
    return lines


def accessing(before: bytes, at: bytes, address: int, bits: int, space: str, size: int, *, write: bool) -> str:
    """The instruction behind an exit at ``address``, as text; an empty string: there is none.

    ``space`` is "port", "memory" or, for an exit that is no access, empty. It is the one at ``address``, unless that
    cannot be and one that ends there can: after a write RIP may stand behind the instruction. Where several could
    end there, the longest: a shorter one is what remains of it without its prefixes.
    """
    here = next(_decoder(bits, True).disasm(at, address, 1), None)
    chosen = here
    if space and (here is None or not _does(here, space, size, write)):
        for length in range(min(_LONGEST, len(before)), 0, -1):
            insn = next(_decoder(bits, True).disasm(before[-length:], address - length, 1), None)
            if insn is not None and insn.size == length and _does(insn, space, size, write):
                chosen = insn
                break
    return f"{chosen.mnemonic} {chosen.op_str}".rstrip() if chosen is not None else ""


def _does(insn: Any, space: str, size: int, write: bool) -> bool:
    """Whether an instruction can have made such an access."""
    import capstone

    if space == "port":
        name = insn.mnemonic.split()[-1]  # after rep
        if name not in (("out", "outsb", "outsw", "outsd") if write else ("in", "insb", "insw", "insd")):
            return False
        if name in ("in", "out"):
            return bool(insn.operands[-1 if write else 0].size == size)  # the accumulator
        return bool(name[-1] == {1: "b", 2: "w", 4: "d"}.get(size))
    wanted = capstone.CS_AC_WRITE if write else capstone.CS_AC_READ
    # KVM hands over an access of more than 8 bytes, or one across a page, in parts.
    return any(
        operand.type == capstone.x86.X86_OP_MEM and operand.access & wanted and operand.size >= size
        for operand in insn.operands
    )
