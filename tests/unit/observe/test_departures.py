"""What cannot work on a host's KVM, told by the instruction a guest stopped at; no KVM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmm.cpu.findings import Findings
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


BOTH = ["32-bit", "PAE"]


def machine(compat: str = "auto", **host: Any) -> Any:
    known = {"emulated": True, "vmcall_loops": True, "unpaged": BOTH, **host}
    return SimpleNamespace(
        host=SimpleNamespace(**known), symbols=Symbols([], "nowhere"), config=SimpleNamespace(compat=compat)
    )


def found(cpu: Processor, **how: Any) -> str:
    diagnosis = departures.of(machine(**how), cpu, cpu.fetch(cpu.rip)[0])
    return diagnosis.sentence if diagnosis else ""


def test_int_n_at_cpl_3_is_named_where_it_is_not_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Findings()
    monkeypatch.setattr("vmm.host.findings", lambda: known)
    at_cpl_3 = processor("cd80", 64, cs=0x2B, efer=0x500)
    assert not found(at_cpl_3, compat="off")  # a host that delivers it
    known.syscall_broken = True
    sentence = found(at_cpl_3, compat="off")
    assert sentence.startswith("software interrupt that this host's KVM cannot deliver: int 0x80 at 0x1000, at CPL 3")
    assert "--compat auto repairs" in sentence and "see pyvmm doctor" in sentence
    assert not found(at_cpl_3)
    assert not found(processor("cd80", 64, cs=0x08, efer=0x500), compat="off")
    assert not found(processor("cd10", 16, cs=3, cr0=0), compat="off")  # a segment of real mode


@pytest.mark.parametrize(
    ("registers", "kind"),
    [
        ({"rax": 0x80000011}, "32-bit"),
        ({"rax": 0x80000011, "cr4": 0x20}, "PAE"),
        ({"rax": 0x11}, None),  # no paging
        ({"rax": 0x80000011, "efer": 0x100}, None),  # the way into long mode
    ],
)
def test_32_bit_paging_is_named_where_the_host_lacks_that_kind(registers: dict[str, int], kind: str | None) -> None:
    cpu = processor("0f22c0", 32, **registers)
    assert (f"switches {kind} paging on" in found(cpu)) is (kind is not None)
    assert not found(cpu, unpaged=[other for other in BOTH if other != kind])


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
