"""What cannot work on a host's KVM, told by the instruction a guest stopped at; no KVM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmm.cpu.paging import Paging
from vmm.observe import departures
from vmm.observe.processor import Processor
from vmm.observe.samples import Sample
from vmm.observe.symbols import Symbols

AT = 0x1000
REGISTERS = dict.fromkeys(
    ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer",
     "cs", "cs_base", "ss_base", "ds_base"), 0
)  # fmt: skip


def processor(code: str, bits: int, **registers: int) -> Processor:
    memory = bytearray(1 << 20)
    memory[AT : AT + 16] = bytes.fromhex(code).ljust(16, b"\x90")
    values = {**REGISTERS, "rip": AT, "cr0": 1, **registers}
    return Processor(values, bits, Paging(values), lambda gpa, size: bytes(memory[gpa : gpa + size]))


def machine(**host: bool) -> Any:
    known = {"emulated": True, "vmcall_loops": True, **host}
    return SimpleNamespace(
        host=SimpleNamespace(**known), symbols=Symbols([], "nowhere"), config=SimpleNamespace(compat="auto")
    )


def found(cpu: Processor, **host: bool) -> str:
    diagnosis = departures.of(machine(**host), cpu, cpu.fetch(cpu.rip)[0])
    return diagnosis.sentence if diagnosis else ""


def test_int_n_at_cpl_3_is_named_where_kernel_code_is_emulated() -> None:
    sentence = found(processor("cd80", 64, cs=0x2B, efer=0x500))
    assert sentence.startswith("software interrupt that this host's KVM cannot deliver: int 0x80 at 0x1000, at CPL 3")
    assert "see pyvmm doctor" in sentence
    assert not found(processor("cd80", 64, cs=0x08, efer=0x500))
    assert not found(processor("cd80", 64, cs=0x2B, efer=0x500), emulated=False)
    assert not found(processor("cd10", 16, cs=3, cr0=0))  # a segment of real mode


@pytest.mark.parametrize(
    ("registers", "named"),
    [
        ({"rax": 0x80000011}, True),
        ({"rax": 0x80000011, "cr4": 0x20}, True),  # PAE
        ({"rax": 0x11}, False),  # no paging
        ({"rax": 0x80000011, "efer": 0x100}, False),  # the way into long mode
    ],
)
def test_32_bit_paging_is_named(registers: dict[str, int], named: bool) -> None:
    sentence = found(processor("0f22c0", 32, **registers))
    assert ("switches paging on outside long mode" in sentence) is named
    assert not found(processor("0f22c0", 32, **registers), emulated=False)


def test_a_hypercall_is_named_only_by_a_vcpu_that_stays_there() -> None:
    cpu = processor("0f01c1", 64, efer=0x500, rax=9)
    code = cpu.fetch(cpu.rip)[0]
    from vmm.observe.faults import decode

    insn, there = decode(cpu, code), Sample(0.0, 0, AT, False)
    for samples, known, named in (
        ([there] * 3, True, True),
        ([], True, True),
        ([there, there._replace(rip=AT + 3)], True, False),
        ([there] * 3, False, False),
    ):
        diagnosis = departures.hypercall(machine(vmcall_loops=known), cpu, insn, samples)
        assert (diagnosis is not None) is named
    assert departures.hypercall(machine(), cpu, decode(cpu, b"\x90" * 4), []) is None


def test_a_real_mode_guest_with_vectors_or_without_a_frame_is_not_said_to_have_none() -> None:
    assert departures.empty_vectors(processor("f4", 16, cr0=0, rsp=0x7000)) is None  # no FLAGS on the stack
    memory = bytearray(1 << 20)
    memory[0x7000:0x7006] = bytes.fromhex("0210 0000 0200")
    memory[0x1000:0x1002] = b"\xcd\x13"
    values = {**REGISTERS, "rsp": 0x7000, "rip": 0x500}
    cpu = Processor(values, 16, Paging(values), lambda gpa, size: bytes(memory[gpa : gpa + size]))
    diagnosis = departures.empty_vectors(cpu)
    assert diagnosis is not None and "int 0x13 at 0x0:0x1000 led to 0x0:0x0" in diagnosis.sentence
    memory[0x40:0x60] = b"\x12" * 32
    assert departures.empty_vectors(cpu) is None
