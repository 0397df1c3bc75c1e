"""The mode a vCPU starts in: real, 32-bit protected, or 64-bit long mode.

The tables that a mode needs (GDT, page tables) are already in guest memory, at the addresses in
:class:`vmm.boot.Entry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib

if TYPE_CHECKING:
    from vmm._ffi import vmm_vcpu
    from vmm.boot import Entry

# Control register bits (SDM vol. 3, 2.5)
CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

# Segment types (SDM vol. 3, 3.4.5.1 and 3.5)
CODE = 0xB
DATA = 0x3
TSS_BUSY = 0xB

MSR_MISC_ENABLE = 0x1A0
MSR_MTRR_DEFAULT = 0x2FF
FAST_STRINGS = 1
MTRR_WRITE_BACK = 1 << 11 | 6  # enabled, default type write-back: RAM is not left uncached


def _segment(s: Any, selector: int, base: int, kind: int, *, long: bool, wide: bool) -> None:
    s.selector, s.base = selector, base
    s.limit = 0xFFFFFFFF if wide else 0xFFFF
    s.type, s.s, s.present, s.dpl, s.unusable, s.avl = kind, 1, 1, 0, 0, 0
    s.l = 1 if long and kind == CODE else 0
    s.db = 1 if wide and not s.l else 0
    s.g = 1 if wide else 0


def enter(vcpu: vmm_vcpu, entry: Entry) -> None:
    """Set a new vCPU's registers as ``entry`` requires."""
    sregs = ffi.new("vmm_sregs *")
    check(lib.vmm_vcpu_get_sregs(vcpu, sregs))
    wide, long = entry.mode != "real", entry.mode == "long"
    code_base = 0 if wide else entry.cs_base
    _segment(sregs.cs, entry.cs, code_base, CODE, long=long, wide=wide)
    for name in ("ds", "es", "fs", "gs", "ss"):
        selector = entry.ss if name == "ss" else entry.ds
        _segment(getattr(sregs, name), selector, 0 if wide else selector << 4, DATA, long=long, wide=wide)
    if wide:
        sregs.gdt.base, sregs.gdt.limit = entry.gdt_base, entry.gdt_limit
        sregs.idt.base, sregs.idt.limit = (
            0,
            0,
        )  # none: an exception before the guest loads one is a triple fault
        tr = sregs.tr
        tr.selector, tr.base, tr.limit, tr.type = entry.tr, 0, 0x67, TSS_BUSY
        tr.s, tr.present, tr.unusable, tr.g, tr.db, tr.l, tr.dpl = 0, 1, 0, 0, 0, 0, 0
        sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE
    if long:
        sregs.cr3 = entry.cr3
        sregs.cr4 |= CR4_PAE
        sregs.cr0 |= CR0_PG
        sregs.efer |= EFER_LME | EFER_LMA
    check(lib.vmm_vcpu_set_sregs(vcpu, sregs))

    regs = ffi.new("vmm_regs *", {"rflags": 2, "rip": entry.rip, **entry.registers})
    check(lib.vmm_vcpu_set_regs(vcpu, regs))
    index = ffi.new("uint32_t[]", [MSR_MISC_ENABLE, MSR_MTRR_DEFAULT])
    value = ffi.new("uint64_t[]", [FAST_STRINGS, MTRR_WRITE_BACK])
    check(lib.vmm_vcpu_set_msrs(vcpu, index, value, 2))
