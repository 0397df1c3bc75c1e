"""Registers of a vCPU by name: what is set is what is there, and what cannot be is refused whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vmm.errors import ConfigError, HostError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.cpu.vcpu import Vcpu


@pytest.fixture(scope="module")
def vcpu() -> Iterator[Vcpu]:
    with Machine(memory="16M") as machine:
        yield machine.vcpus[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rax", (1 << 64) - 1), ("r15", 1), ("rip", 0x1234), ("rflags", 0x202), ("cr2", 1 << 63), ("cr8", 15),
     ("fs_base", 0x7000), ("gs_base", 0xFFFF800000000000), ("ds", 0x18), ("idt_base", 0x5000), ("gdt_limit", 0x7F)],
)  # fmt: skip
def test_a_register_that_is_set_reads_back(vcpu: Vcpu, name: str, value: int) -> None:
    before = vcpu.registers()
    vcpu.set_registers(**{name: value})
    after = vcpu.registers()
    assert after[name] == value
    assert {n: v for n, v in after.items() if n != name} == {n: v for n, v in before.items() if n != name}
    vcpu.set_registers(**{name: before[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("st0", (1 << 80) - 1), ("st7", 0x4000C90FDAA22168C235), ("fcw", 0x27F), ("fsw", 0x3800), ("ftw", 0xFF),
     ("xmm0", (1 << 128) - 1), ("xmm15", 1 << 127), ("mxcsr", 0x1FA0)],
)  # fmt: skip
def test_a_floating_point_register_that_is_set_reads_back(vcpu: Vcpu, name: str, value: int) -> None:
    before = vcpu.fpu()
    vcpu.set_fpu(**{name: value})
    after = vcpu.fpu()
    assert after[name] == value
    assert {n: v for n, v in after.items() if n != name} == {n: v for n, v in before.items() if n != name}
    vcpu.set_fpu(**{name: before[name]})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rax": 1, "rbx": 1 << 64}, "rbx has 64 bits"),
        ({"rax": 1, "cs": 0x10000}, "cs has 16 bits"),
        ({"rax": 1, "eax": 1}, "no such register: eax"),
        ({"rax": 1, "cs_limit": 1}, "no such register: cs_limit"),
        ({"rax": 1, "rcx": -1}, "rcx has 64 bits"),
    ],
)
def test_a_name_or_value_that_cannot_be_sets_nothing(vcpu: Vcpu, values: dict[str, int], match: str) -> None:
    before = vcpu.registers()
    with pytest.raises(ConfigError, match=match):
        vcpu.set_registers(**values)
    assert vcpu.registers() == before


@pytest.mark.parametrize(
    "values",
    [
        {"cr0": 0x80000000},  # paging without protection
        {"cr4": 1 << 63},
        {"cr0": 0x80000011, "efer": 0x500},  # long mode without PAE
    ],
)
def test_a_state_no_processor_can_be_in_is_refused(vcpu: Vcpu, values: dict[str, Any]) -> None:
    before = vcpu.registers()
    with pytest.raises(HostError, match="no processor can be in this state"):
        vcpu.set_registers(rax=77, **values)
    assert vcpu.registers() == before


@pytest.mark.parametrize(
    ("values", "match"),
    [({"st0": 1 << 80}, "st0 has 80 bits"), ({"mxcsr": 1 << 16}, "reserved"), ({"ymm0": 0}, "no such register")],
)
def test_a_floating_point_value_that_cannot_be_is_refused(vcpu: Vcpu, values: dict[str, int], match: str) -> None:
    before = vcpu.fpu()
    with pytest.raises(ConfigError, match=match):
        vcpu.set_fpu(**values)
    assert vcpu.fpu() == before
