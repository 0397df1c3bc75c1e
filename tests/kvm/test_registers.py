"""Registers of a vCPU by name: what is set is what is there, and what cannot be is refused whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vmm.errors import ConfigError, HostError, StateError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.cpu.vcpu import Vcpu


@pytest.fixture(scope="module")
def vcpu() -> Iterator[Vcpu]:
    with Machine(memory="16M") as machine:
        yield machine.vcpus[0]


# A segment's G is 1 where its limit is beyond 1 MiB: kvm-amd, whose processors do not keep the bit, gives it so.
@pytest.mark.parametrize(
    ("name", "value"),
    [("rax", (1 << 64) - 1), ("r15", 1), ("rip", 0x1234), ("rflags", 0x202), ("cr2", 1 << 63), ("cr8", 15),
     ("fs_base", 0x7000), ("gs_base", 0xFFFF800000000000), ("ds", 0x18), ("es_limit", 0xFFFFF),
     ("es_rights", 0x40F3), ("idt_base", 0x5000), ("gdt_limit", 0x7F)],
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
     ("xmm0", (1 << 128) - 1), ("xmm15", 1 << 127), ("ymm0", (1 << 256) - 1), ("ymm15", 1 << 128), ("mxcsr", 0x1FA0)],
)  # fmt: skip
def test_a_floating_point_register_that_is_set_reads_back(vcpu: Vcpu, name: str, value: int) -> None:
    before = vcpu.fpu()
    if name not in before:
        pytest.skip("this host's KVM gives guests no AVX")
    vcpu.set_fpu(**{name: value})
    after = vcpu.fpu()
    assert after[name] == value
    same = {name, name.replace("xmm", "ymm"), name.replace("ymm", "xmm")}  # one is a part of the other
    assert {n: v for n, v in after.items() if n not in same} == {n: v for n, v in before.items() if n not in same}
    if name.startswith("ymm"):
        assert after[name.replace("ymm", "xmm")] == value & (1 << 128) - 1
    vcpu.set_fpu(**{name: before[name]})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rax": 1, "rbx": 1 << 64}, "rbx has 64 bits"),
        ({"rax": 1, "cs": 0x10000}, "cs has 16 bits"),
        ({"rax": 1, "eax": 1}, "no such register: eax"),
        ({"rax": 1, "cs_size": 1}, "no such register: cs_size"),
        ({"rax": 1, "cs_limit": 1 << 32}, "cs_limit has 32 bits"),
        ({"rax": 1, "rip": 1 << 32}, "rip 0x100000000 is no address"),
        ({"rax": 1, "rip": 1 << 63, "cr0": 0x80000011, "cr4": 0x20, "efer": 0x500}, "rip .* is no address"),
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
    [({"st0": 1 << 80}, "st0 has 80 bits"), ({"mxcsr": 1 << 16}, "reserved"), ({"xmm16": 0}, "no such register")],
)
def test_a_floating_point_value_that_cannot_be_is_refused(vcpu: Vcpu, values: dict[str, int], match: str) -> None:
    before = vcpu.fpu()
    with pytest.raises(ConfigError, match=match):
        vcpu.set_fpu(**values)
    assert vcpu.fpu() == before


def test_an_xsave_area_that_is_set_reads_back_and_another_size_is_refused(vcpu: Vcpu) -> None:
    area = vcpu.xsave()
    vcpu.set_fpu(xmm3=3)
    assert vcpu.xsave() != area
    vcpu.set_xsave(area)
    assert vcpu.fpu()["xmm3"] == int.from_bytes(area[208:224], "little")
    with pytest.raises(ConfigError, match="4096 bytes, not 512"):
        vcpu.set_xsave(area[:512])
    with pytest.raises(HostError):
        vcpu.set_xsave(area[:512] + b"\xff" * 8 + area[520:])  # components that no processor has


def test_a_vcpu_that_runs_is_not_looked_at(flat: Any) -> None:
    with flat(bytes.fromhex("b041 baf8030000 ee fb f4 ebfd")) as machine:  # prints A, then sti; hlt for ever
        vcpu = machine.vcpus[0]
        machine.start()
        machine.console.expect("A", timeout=60)
        for look in (
            vcpu.registers, vcpu.fpu, vcpu.local_apic, vcpu.paging, lambda: vcpu.mp_state, lambda: vcpu.msr(0x10),
            lambda: vcpu.set_registers(rax=1), lambda: vcpu.set_msr(0x10, 0), lambda: vcpu.translate(0),
            lambda: vcpu.memory.read(0, 1), machine.stack,
        ):  # fmt: skip
            with pytest.raises(StateError, match="vCPU 0 runs: pause the machine"):
                look()
        machine.pause()
        assert vcpu.registers()["rax"] & 0xFF == 0x41
        machine.resume()
        with pytest.raises(StateError, match="not paused"):
            machine.resume()


def test_a_hook_looks_at_its_own_vcpu(flat: Any) -> None:
    seen = []
    with flat(bytes.fromhex("b041 baf8030000 ee b005 e6f4")) as machine:
        machine.on_port(0x3F8, lambda access: seen.append(machine.vcpus[0].registers()["rax"] & 0xFF))
        assert machine.run(timeout=60).code == 5
    assert seen == [0x41]
