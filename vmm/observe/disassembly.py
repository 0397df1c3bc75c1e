"""Guest instructions as text (capstone)."""

from __future__ import annotations


def disassemble(code: bytes, address: int, bits: int = 64, limit: int = 6) -> list[str]:
    """Up to ``limit`` instructions of ``code`` at ``address``: ``address: bytes  mnemonic operands``."""
    import capstone

    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32}.get(bits, capstone.CS_MODE_64)
    lines = []
    for insn in capstone.Cs(capstone.CS_ARCH_X86, mode).disasm(code, address):
        lines.append(f"{insn.address:#x}: {insn.bytes.hex():<22} {insn.mnemonic} {insn.op_str}".rstrip())
        if len(lines) == limit:
            break
    if not lines:
        lines.append(f"{address:#x}: {code.hex() or '(not readable)':<22} (not an instruction)")
    return lines
