"""What this host's KVM offers is known, and what a guest gets of it is in its saved state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm._ffi import lib
from vmm.cli.doctor import examine
from vmm.cpu import features
from vmm.cpu.cpuid import offered, saved_msrs
from vmm.cpu.tiny_guest import TinyGuest
from vmm.errors import HostError
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def tiny() -> Iterator[TinyGuest]:
    guest = TinyGuest("/dev/kvm")
    yield guest
    guest.close()


def test_every_feature_that_this_kvm_offers_is_known(tiny: TinyGuest) -> None:
    assert features.unknown(offered(tiny.vm)) == [], "classify these in vmm/cpu/features.py"


def test_the_registers_of_what_a_guest_is_offered_are_in_its_state(guest: Callable[[str], str]) -> None:
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.load()
        rows = machine.cpuid.value()
        state = machine.save()
        msrs = {index for index, _ in state["processors"]["vcpus"][0]["msrs"]} | {0x6E0}  # the deadline is beside them
        table = {(row[0], row[1]): dict(zip(("eax", "ebx", "ecx", "edx"), row[3:], strict=True)) for row in rows}
        held = features.components(table)
        banks = machine.vcpus[0].msr(0x179) & 0xFF  # IA32_MCG_CAP
    missing = {
        (by.name, hex(msr))
        for (function, index, register, bit), by in features.CARRIED.items()
        if table.get((function, index), {}).get(register, 0) >> bit & 1
        for msr in by.msrs
        if msr not in msrs and not 0x400 + 4 * banks <= msr <= 0x47F
    }
    assert missing == set()
    xcr0 = table[0xD, 0]["eax"] | table[0xD, 0]["edx"] << 32 if (0xD, 0) in table else 0
    assert xcr0 == sum(1 << number for number in held)


@pytest.mark.parametrize("msr", [0x402, 0x47F, 0x20F, 0x277], ids=["MC0_ADDR", "MC31_MISC", "MTRR", "PAT"])
def test_a_register_that_kvm_leaves_out_of_its_list_comes_back(guest: Callable[[str], str], msr: int) -> None:
    value = 0x0007040600070405 if msr == 0x277 else 0x12345800
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.load()
        vcpu = machine.vcpus[0]
        if not vcpu.has_msr(msr):
            pytest.skip(f"this KVM has no MSR {msr:#x}")
        vcpu.set_msr(msr, value)
        state = machine.save()
        vcpu.set_msr(msr, 0 if msr != 0x277 else 0x0007040600070406)
        machine.load_state(state)
        assert vcpu.msr(msr) == value


def test_doctor_names_the_features_kept_from_guests(tiny: TinyGuest) -> None:
    assert examine()["withheld_features"] == features.withheld(offered(tiny.vm), saved_msrs(tiny.vm))


@pytest.mark.parametrize(("times", "close"), [(1.0, True), (1.0001, True), (0.5, False), (2.0, False)])
def test_a_guest_keeps_the_rate_of_its_tsc_or_is_refused(
    guest: Callable[[str], str], tiny: TinyGuest, times: float, close: bool
) -> None:
    scales = lib.vmm_vm_check_extension(tiny.vm, 60)  # KVM_CAP_TSC_CONTROL
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.load()
        state = machine.save()
        vcpu = state["processors"]["vcpus"][0]
        khz = vcpu["tsc_khz"] = int(vcpu["tsc_khz"] * times)
        if close or scales:
            machine.load_state(state)
        else:
            with pytest.raises(HostError, match=rf"counts at {khz / 1e3:g} MHz"):
                machine.load_state(state)
        if scales:
            assert machine.save()["processors"]["vcpus"][0]["tsc_khz"] == khz
