"""What an instruction faults on, from registers and page tables alone; and whatever a guest leaves, it is an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.cpu.paging import Paging
from vmm.observe import faults
from vmm.observe.descriptors import delivery
from vmm.observe.processor import Processor
from vmm.observe.verdict import CAUSES

if TYPE_CHECKING:
    from collections.abc import Callable

RAM = 64 << 10
CODE, STACK, GDT, TABLES = 0x1000, 0x8000, 0x3000, 0x4000
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
TABLES_OF = ("gdt_base", "gdt_limit", "idt_base", "idt_limit")
NAMES = faults.Names(hex, lambda index: index < 0x1000)


def reader(ram: bytes) -> Callable[[int, int], bytes]:
    def read(gpa: int, size: int) -> bytes:
        if gpa + size > len(ram):
            raise IndexError(gpa)
        return ram[gpa : gpa + size]

    return read


def processor(code: bytes, bits: int = 64, **registers: int) -> Processor:
    """At CODE, in long mode (64) with the first 2 MiB mapped, or without paging; a stack, a GDT, no IDT."""
    ram = bytearray(RAM)
    ram[CODE : CODE + len(code)] = code
    for n, descriptor in enumerate((0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)):
        ram[GDT + 8 * n : GDT + 8 * n + 8] = descriptor.to_bytes(8, "little")
    for n, entry in enumerate((TABLES + 0x1003, TABLES + 0x2003, 0x83)):
        ram[TABLES + n * 0x1000 : TABLES + n * 0x1000 + 8] = entry.to_bytes(8, "little")
    r = dict.fromkeys((*GENERAL, *CONTROL, *SEGMENTS, *(f"{s}_base" for s in SEGMENTS), *TABLES_OF), 0)
    r |= {"rip": CODE, "rsp": STACK, "rflags": 2, "cs": 8, "ss": 16, "gdt_base": GDT, "gdt_limit": 23, "cr0": 1}
    if bits == 64:
        r |= {"cr0": 0x80000001, "cr3": TABLES, "cr4": 0x20, "efer": 0x500}
    r |= registers
    return Processor(r, bits, Paging(r), reader(bytes(ram)))


@pytest.mark.parametrize(
    ("code", "registers", "cause", "text"),
    [
        (b"\xff\xe0", {"rax": 1 << 47}, "non-canonical-jump", "jmp rax"),
        (b"\xc3", {"rsp": 0x400000}, "page-fault", "ret at 0x1000, on the stack at 0x400000"),
        (b"\x50", {"rsp": 0x200000, "rip": CODE}, None, ""),
        (b"\x48\xcf", {"rsp": STACK}, "bad-segment", "cs cannot hold the null selector"),
        (b"\xec", {}, None, ""),
        (b"\x50", {"rsp": 0xFFFFFFFFFFFFFFF8}, "page-fault", "the PML4E at 0x4ff8"),
        (b"\x48\xa5", {"rsi": 0, "rdi": 0x200000}, "page-fault", "the PDE at 0x6008"),
        (b"\x65\x48\x8b\x00", {"gs_base": 0x300000}, "page-fault", "linear address 0x300000"),
        (b"\x48\x8b\x05\x00\x00\x40\x00", {}, "page-fault", "linear address 0x401007"),
        (b"\x0f\x30", {"rcx": 0xC0000080, "rax": 0x2}, "bad-msr", "no MSR 0xc0000080"),
        (b"\x0f\x00\xd8", {"rax": 8}, "bad-segment", "not an available TSS"),
        (b"\x8e\xd0", {"rax": 8}, "bad-segment", "not a writable data segment"),
        (b"\x8e\xd8", {"rax": 3}, None, ""),
        (b"\xf4", {"cs": 0xB, "ss": 0x13}, "page-fault", "supervisor page"),
        (b"\x0f\x28\xc1", {}, "invalid-opcode", "CR4.OSFXSR = 0"),
        (b"\x0f\x28\xc1", {"cr4": 0x220}, None, ""),
        (b"\xf7\xf1", {"rcx": 1, "rdx": 2}, "divide-error", "too wide"),
        (b"\x90", {}, None, ""),
        (b"\x48\x8d\x04\x25\x00\x00\x40\x00", {}, None, ""),  # lea touches nothing
    ],
)  # fmt: skip
def test_the_fault_of_an_instruction(code: bytes, registers: dict[str, int], cause: str | None, text: str) -> None:
    found = faults.find(processor(code, **registers), NAMES)
    assert (found.cause if found else None) == cause, found
    assert text in (found.text if found else "")


def test_code_that_ends_at_an_unmapped_page_faults_there() -> None:
    cpu = processor(b"", rip=(2 << 20) - 1)
    assert cpu.fetch(cpu.rip)[1] is not None
    found = faults.find(cpu, NAMES)
    assert found is not None
    assert found.cause == "no-code"  # mapped, but the machine has only 64 KiB


def test_a_16_bit_stack_is_addressed_through_its_segment() -> None:
    found = faults.find(processor(b"\x50", bits=16, cr0=0, ss=0x4000, ss_base=0x40000, rsp=0x10), NAMES)
    assert found is None


IDT = 0x2000


def gate(offset: int = CODE, selector: int = 8, kind: int = 0x8E, ist: int = 0) -> bytes:
    """A gate of a 64-bit IDT (SDM vol. 3, figure 6-8)."""
    low = offset & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | (offset >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + (offset >> 32).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("entry", "registers", "problem", "text"),
    [
        (gate(), {}, "", "leads to 0x1000"),
        (gate(kind=0x0E), {}, "absent", "not present"),
        (gate(kind=0x8C), {}, "type", "of type 0xc"),
        (gate(selector=16), {}, "selector", "selector 0x10, which is no present code segment"),
        (gate(selector=0x50), {}, "selector", "beyond the GDT's limit 0x17"),
        (gate(offset=0x400000), {}, "handler", "leads to 0x400000, and linear address 0x400000: the PDE at"),
        (gate(), {"rsp": 0x400000}, "stack", "cannot be stored on the stack at 0x400000"),
        (gate(ist=1), {"tr_base": 0x8000}, "stack", "cannot be stored on the stack at 0x0"),
        (gate(ist=1), {"tr_base": 0x400000}, "stack", "the TSS at 0x400000"),
        (gate(), {"idt_limit": 0}, "no-idt", "no IDT is loaded (base 0x2000, limit 0x0)"),
        (gate(), {"idt_limit": 0x5F}, "limit", "ends before vector 6: its limit is 0x5f"),
        (gate(), {"idt_base": 0x400000}, "unmapped", "the IDT at 0x400000 is not mapped at vector 6"),
    ],
)
def test_what_the_idt_makes_of_an_exception(entry: bytes, registers: dict[str, int], problem: str, text: str) -> None:
    code = bytes(IDT - CODE) + bytes(16 * 6) + entry
    found = delivery(processor(code, **{"idt_base": IDT, "idt_limit": 0x1FF, **registers}), 6, hex)
    assert (found.problem, text in found.text) == (problem, True), found


def test_the_idt_of_real_mode_is_a_table_of_far_pointers() -> None:
    cpu = processor(b"", bits=16, cr0=0, idt_base=0, idt_limit=0x3FF)
    assert delivery(cpu, 6, hex).text == "vector 6 leads to 0x0"


NUMBERS = st.one_of(st.integers(0, RAM), st.integers(0, (1 << 64) - 1), st.sampled_from([0, (1 << 64) - 1, 1 << 47]))


@settings(max_examples=examples(300), deadline=None)
@given(
    st.fixed_dictionaries(
        {name: NUMBERS for name in (*GENERAL, *CONTROL, *(f"{s}_base" for s in SEGMENTS), *TABLES_OF)}
        | {name: st.integers(0, 0xFFFF) for name in SEGMENTS}
    ),
    st.sampled_from([16, 32, 64]),
    st.binary(max_size=256),
    st.integers(0, 255),
)
@pytest.mark.hypothesis
def test_whatever_registers_and_memory_hold_there_is_an_answer(
    registers: dict[str, int], bits: int, ram: bytes, vector: int
) -> None:
    cpu = Processor(registers, bits, Paging(registers), reader((ram * RAM)[:RAM]))
    found = faults.find(cpu, NAMES)
    assert found is None or (found.cause in CAUSES and found.text)
    assert delivery(cpu, vector, hex).text


@settings(max_examples=examples(300), deadline=None)
@given(st.binary(min_size=1, max_size=15), st.sampled_from([16, 32, 64]), NUMBERS, NUMBERS)
@pytest.mark.hypothesis
def test_any_bytes_as_an_instruction_have_an_answer(code: bytes, bits: int, first: int, second: int) -> None:
    r = {name: (first, second)[n % 2] for n, name in enumerate(GENERAL) if name not in ("rip", "rflags")}
    found = faults.find(processor(code, bits, **r), NAMES)
    assert found is None or (found.cause in CAUSES and found.text)
