"""Descriptors as the processor reads them: what a selector leads to, and what the IDT holds for a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmm.observe.processor import Processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VECTORS = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE", 21: "#CP",
}  # fmt: skip

_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})


class Descriptor(NamedTuple):
    """A GDT or LDT entry (SDM vol. 3, 3.4.5)."""

    low: int

    @property
    def present(self) -> bool:
        """Bit 47."""
        return bool(self.low >> 47 & 1)

    @property
    def code_or_data(self) -> bool:
        """Bit 44: not a system descriptor."""
        return bool(self.low >> 44 & 1)

    @property
    def code(self) -> bool:
        """A code segment."""
        return self.code_or_data and bool(self.low >> 43 & 1)

    @property
    def writable(self) -> bool:
        """A data segment that may be written."""
        return self.code_or_data and not self.code and bool(self.low >> 41 & 1)

    @property
    def readable(self) -> bool:
        """A data segment, or a code segment that may be read."""
        return self.code_or_data and (not self.code or bool(self.low >> 41 & 1))

    @property
    def base(self) -> int:
        """Of a segment."""
        return self.low >> 16 & 0xFFFFFF | self.low >> 32 & 0xFF000000

    @property
    def dpl(self) -> int:
        """Its privilege level."""
        return self.low >> 45 & 3


def descriptor(cpu: Processor, selector: int) -> Descriptor | str:
    """What ``selector`` names, or why it names nothing; the LDT is not looked into (``""`` then)."""
    if selector & 4:
        return ""
    at, limit = selector & ~7, cpu.registers["gdt_limit"]
    if at + 7 > limit:
        return f"selector {selector:#x} is beyond the GDT's limit {limit:#x}"
    low = cpu.word(cpu.registers["gdt_base"] + at, 8)
    if low is None:
        return f"the GDT at {cpu.registers['gdt_base']:#x} is not mapped"
    return Descriptor(low)


def bad_selector(cpu: Processor, register: str, selector: int) -> str | None:
    """Why loading ``selector`` into a segment register (or "tr", "ldt") faults, or ``None`` (SDM vol. 2, MOV)."""
    if selector & ~3 == 0:
        if register in ("cs", "tr") or (register == "ss" and not (cpu.bits == 64 and cpu.cpl != 3)):
            return f"{register} cannot hold the null selector"
        return None
    found = descriptor(cpu, selector)
    if isinstance(found, str):
        return found or None
    what = f"the descriptor of selector {selector:#x} is {found.low:#x}"
    if register in ("tr", "ldt"):
        wanted = {"tr": (1, 9), "ldt": (2,)}[register]
        if found.code_or_data or found.low >> 40 & 15 not in wanted:
            return f"{what}: not {'an available TSS' if register == 'tr' else 'an LDT'}"
    elif register == "cs" and not found.code:
        return f"{what}: not a code segment"
    elif register == "ss" and not found.writable:
        return f"{what}: not a writable data segment"
    elif register == "ss" and (found.dpl != cpu.cpl or selector & 3 != cpu.cpl):
        return f"{what}: of privilege level {found.dpl}, at CPL {cpu.cpl}"
    elif register not in ("cs", "ss") and not found.readable:
        return f"{what}: not a data or readable code segment"
    elif register not in ("cs", "ss") and not found.code and found.dpl < max(cpu.cpl, selector & 3):
        return f"{what}: of privilege level {found.dpl}, at CPL {cpu.cpl}"
    return None if found.present else f"{what}: not present"


class Delivery(NamedTuple):
    """What becomes of an exception: ``problem`` is "" where its handler could be entered; ``text`` says it."""

    problem: str
    text: str


def delivery(cpu: Processor, vector: int, name: Callable[[int], str]) -> Delivery:
    """What the IDT holds for ``vector`` (SDM vol. 3, 6.10 to 6.14); ``name(address)`` is how an address is shown.

    Problems: "no-idt" (no entry at all could be read), "limit", "unmapped", "absent", "type", "selector",
    "handler", "stack".
    """
    r = cpu.registers
    base, limit = r["idt_base"], r["idt_limit"]
    size = 16 if cpu.long else 8 if cpu.protected else 4
    what = f"the IDT at {base:#x}"
    if limit < size - 1:
        return Delivery("no-idt", f"no IDT is loaded (base {base:#x}, limit {limit:#x})")
    if vector * size + size - 1 > limit:
        return Delivery("limit", f"{what} ends before vector {vector}: its limit is {limit:#x}")
    raw = cpu.read(base + vector * size, size)
    if raw is None:
        return Delivery("unmapped", f"{what} is not mapped at vector {vector}")
    if not cpu.protected:
        handler = (int.from_bytes(raw[2:], "little") << 4) + int.from_bytes(raw[:2], "little")
        return Delivery("", f"vector {vector} leads to {handler:#x}")
    return _gate(cpu, vector, raw, f"the gate of vector {vector} in {what}", name)


def handlers(cpu: Processor) -> Iterator[int]:
    """Linear addresses that an exception or interrupt may enter: of every gate that is present, and readable."""
    size = 16 if cpu.long else 8 if cpu.protected else 4
    table = min(cpu.registers["idt_limit"] + 1, 256 * size)
    for at in range(0, table - size + 1, size):
        raw = cpu.read(cpu.registers["idt_base"] + at, size)
        if raw is None:
            continue
        low = int.from_bytes(raw[:8], "little")
        if not cpu.protected:
            address = (low >> 16) * 16 + (low & 0xFFFF)
            if low:  # an entry of zeroes leads into the table itself
                yield address
        elif low >> 47 & 1:
            code = descriptor(cpu, low >> 16 & 0xFFFF)
            base = 0 if cpu.long or isinstance(code, str) else code.base
            offset = low & 0xFFFF | low >> 32 & 0xFFFF0000 | int.from_bytes(raw[8:12], "little") << 32
            yield offset + base & ((1 << 64) - 1 if cpu.long else 0xFFFFFFFF)


def _gate(cpu: Processor, vector: int, raw: bytes, what: str, name: Callable[[int], str]) -> Delivery:
    low = int.from_bytes(raw[:8], "little")
    kind, selector = low >> 40 & 31, low >> 16 & 0xFFFF
    handler = low & 0xFFFF | low >> 32 & 0xFFFF0000
    if not low >> 47 & 1:
        return Delivery("absent", f"{what} is not present ({raw.hex(' ', 8)})")
    if kind not in ((14, 15) if cpu.long else (5, 6, 7, 14, 15)):
        return Delivery("type", f"{what} is of type {kind:#x}: no interrupt or trap gate")
    code = descriptor(cpu, selector)
    if isinstance(code, str):
        if code:
            return Delivery("selector", f"{what} names a bad code segment: {code}")
    elif not (code.code and code.present):
        return Delivery("selector", f"{what} names selector {selector:#x}, which is no present code segment")
    elif cpu.long and not code.low >> 53 & 1:
        return Delivery("selector", f"{what} names selector {selector:#x}, which is no 64-bit code segment")
    if cpu.long:
        handler |= int.from_bytes(raw[8:12], "little") << 32
        refused = _frame_refused(cpu, vector, low >> 32 & 7)
        if refused:
            return Delivery("stack", refused)
    fetched = cpu.refused(handler, 1, "fetch", user=False)
    if fetched:
        return Delivery("handler", f"{what} leads to {name(handler)}, and {fetched.sentence}")
    return Delivery("", f"{what} leads to {name(handler)}")


def _frame_refused(cpu: Processor, vector: int, ist: int) -> str:
    """Why the 64-bit exception frame cannot be stored (SDM vol. 3, 6.14.2 and 6.14.5)."""
    slot = 36 + 8 * (ist - 1) if ist else 4 if cpu.cpl else None
    if slot is None:
        stack: int | None = cpu.registers["rsp"]
    else:
        stack = cpu.word(cpu.registers["tr_base"] + slot, 8)
        if stack is None:
            return f"the TSS at {cpu.registers['tr_base']:#x}, which names the stack of vector {vector}, is not mapped"
    assert stack is not None
    size = 48 if vector in _WITH_ERROR_CODE else 40
    top = (stack & ~15) - size & (1 << 64) - 1
    refused = cpu.refused(top, size, "write", user=False)
    return f"its frame cannot be stored on the stack at {stack:#x}: {refused.sentence}" if refused else ""
