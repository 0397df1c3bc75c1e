"""The page-table walk beside KVM's own, over random tables; and memory by linear address of a real vCPU."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from vmm._ffi import check, ffi, lib
from vmm.cpu.paging import Translation
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    GuestPath = Callable[[str], str]

CR0_PE, CR0_PG, CR4_PSE, CR4_PAE, LMA_LME, NXE = 1, 1 << 31, 1 << 4, 1 << 5, 0x500, 0x800
TABLES, RAM = 0x10000, 16 << 20

MODES = {
    "32-bit": (CR0_PE | CR0_PG, CR4_PSE, 0, 4),
    "pae": (CR0_PE | CR0_PG, CR4_PAE, NXE, 8),
    "4-level": (CR0_PE | CR0_PG, CR4_PAE, LMA_LME | NXE, 8),
}


def random_entry(rng: random.Random, size: int, reserved: bool) -> int:
    """A table or a page among ours, usually present, often large, now and then with bits that may not be."""
    value = rng.randrange(TABLES >> 12, (TABLES >> 12) + 16) << 12 | rng.choice([7, 7, 7, 3, 1, 5, 0])
    if rng.random() < 0.3:
        value = value & 0xFFF | rng.randrange(RAM >> 21) << 22 | 0x80
    if size == 8 and rng.random() < 0.2:
        value |= 1 << 63
    if reserved and rng.random() < 0.1:
        value |= 1 << rng.randrange(12, size * 8)
    if size == 4 and value & 0x80:
        value &= ~(0xF << 17)  # bits 39:36 of an address, which KVM takes for reserved whatever MAXPHYADDR is
    return value


@pytest.mark.parametrize("mode", MODES)
def test_the_walk_agrees_with_kvm_over_random_tables(mode: str) -> None:
    rng = random.Random(mode)
    cr0, cr4, efer, size = MODES[mode]
    agreed = {True: 0, False: 0}
    with Machine(memory="16M", compat="off") as machine:
        vcpu = machine.vcpus[0]
        sregs = ffi.new("vmm_sregs *")
        for _ in range(20):
            entries = (random_entry(rng, size, reserved=True).to_bytes(size, "little") for _ in range(0x10000 // size))
            machine.memory.write(TABLES, b"".join(entries))
            for i in range(4 if mode == "pae" else 0):  # loaded with CR3, which refuses what is reserved there
                machine.memory.write(TABLES + 8 * i, (TABLES + 0x1000 * (1 + i) | 1).to_bytes(8, "little"))
            check(lib.vmm_vcpu_get_sregs(vcpu.native, sregs))
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = cr0, TABLES, cr4, efer
            sregs.cs.l = 1 if mode == "4-level" else 0
            sregs.cs.db = 1 - sregs.cs.l
            check(lib.vmm_vcpu_set_sregs(vcpu.native, sregs))
            if not vcpu.registers()["cr0"] & CR0_PG:
                pytest.skip(f"this host's KVM has no {mode} paging: CR0.PG does not stay set")
            for _ in range(180):
                linear = rng.getrandbits(32 if mode != "4-level" else 47)
                found = vcpu.memory.walk(linear)
                expected = vcpu.translate(linear)
                gpa = found.gpa if isinstance(found, Translation) else None
                assert gpa == expected, found
                agreed[gpa is not None] += 1
    assert min(agreed.values()) > 100, agreed  # both kinds were seen


def test_a_machine_s_memory_is_read_through_the_tables_it_runs_on(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M") as machine:
        machine.run(timeout=120)
        vcpu = machine.vcpus[0]
        rip = vcpu.registers()["rip"]
        found = vcpu.memory.walk(rip, "fetch")
        assert isinstance(found, Translation)
        assert [entry.level for entry in found.entries] == ["PML4E", "PDPTE", "PDE"]
        assert found.gpa == vcpu.translate(rip) == rip  # identity mapped
        assert vcpu.memory.read(rip, 16) == machine.memory.read(rip, 16)
