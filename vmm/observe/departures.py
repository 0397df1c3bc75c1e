"""What a guest did that cannot work on this KVM, or on a machine without a BIOS, told by its last instruction."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from vmm.observe.processor import Processor
from vmm.observe.verdict import Diagnosis, place, say

if TYPE_CHECKING:
    from vmm.cpu.findings import Findings
    from vmm.host import Remedies
    from vmm.observe.samples import Sample
    from vmm.observe.subject import Ended

_VECTORS = 1024  # bytes of real mode's interrupt vector table, which is at 0
_CR0_PG, _CR4_PAE, _EFER_LME = 1 << 31, 1 << 5, 1 << 8
_STRAY = 4  # bytes of it that are not zero all the same: zeroes are code that adds AL to the byte at DS:BX+SI
_FRAMES = 1 << 13  # of a stack of 64 KiB
_FLAGS_FIXED = 0x802A  # bits 15, 5 and 3 of FLAGS are zero, bit 1 is one
_INT = 0xCD
_DOCTOR = "see pyvmm doctor"


def of(machine: Ended, cpu: Processor, code: bytes) -> Diagnosis | None:
    """Why the guest died at the instruction ``code`` at RIP, if that is something this host cannot do."""
    from vmm.observe.faults import decode

    insn = decode(cpu, code) if any(code) else None
    if insn is None:
        return None
    return _paging_32(machine, cpu, insn) or _int_n(machine, cpu, insn)


def _found(machine: Ended) -> Findings | Remedies:
    """What is known of the host; a machine without host compatibility has not asked."""
    if machine.config.compat != "off":
        return machine.host
    from vmm import host

    return host.findings()


def _paging_32(machine: Ended, cpu: Processor, insn: Any) -> Diagnosis | None:
    """MOV CR0 with PG outside long mode, where this KVM has no such paging (``unpaged`` of the findings)."""
    if insn.mnemonic != "mov" or insn.op_str.partition(",")[0] != "cr0" or cpu.registers["efer"] & _EFER_LME:
        return None
    kind = "PAE" if cpu.registers["cr4"] & _CR4_PAE else "32-bit"
    if kind not in _found(machine).unpaged:
        return None
    source = insn.op_str.partition(", ")[2]
    value = cpu.registers.get(f"r{source[-2:]}", 0)
    if not value & _CR0_PG:
        return None
    where = f"{insn.mnemonic} {insn.op_str} at {place(machine, cpu.rip)}"
    return say("no-legacy-paging", f"{where} switches {kind} paging on ({source} is {value:#x}): a 32-bit "
               f"kernel runs here only without paging; {_DOCTOR}")  # fmt: skip


def _int_n(machine: Ended, cpu: Processor, insn: Any) -> Diagnosis | None:
    """INT n at CPL 3, which raises #UD on a host that breaks SYSCALL, and is not repaired without compatibility."""
    if insn.mnemonic != "int" or cpu.cpl != 3 or machine.config.compat != "off":
        return None
    from vmm import host

    if not host.findings().syscall_broken:
        return None
    return say("no-int-n", f"{insn.mnemonic} {insn.op_str} at {place(machine, cpu.rip)}, at CPL 3 in {cpu.bits}-bit "
               f"code: this host's KVM raises #UD for it, which --compat auto repairs; {_DOCTOR}")  # fmt: skip


def hypercall(machine: Ended, cpu: Processor, insn: Any, samples: list[Sample]) -> Diagnosis | None:
    """Whether a vCPU is at a hypercall, and stays there, on a host whose hypercalls never return."""
    if insn is None or insn.mnemonic not in ("vmcall", "vmmcall") or not _hypercalls_loop(machine):
        return None
    if any(sample.rip != cpu.rip for sample in samples[-2:]):
        return None
    text = f"{insn.mnemonic} at {place(machine, cpu.rip)} (rax {cpu.registers['rax']:#x}), which KVM executes forever"
    return say("hypercall", f"{text}; {_DOCTOR}", ["Linux makes none where CPUID offers none: see --compat"])


def _hypercalls_loop(machine: Ended) -> bool:
    return _found(machine).vmcall_loops


def empty_vectors(cpu: Processor) -> Diagnosis | None:
    """Whether a real-mode guest took an interrupt whose vector is 0000:0000, and has run through zeroes since.

    Such code changes neither the stack pointer nor CS: what the interrupt pushed is still on top of the stack, perhaps
    under what the end of the segment pushed, where the way round begins again.
    """
    if cpu.protected or cpu.registers["cs_base"]:
        return None
    table = cpu.read(0, _VECTORS)
    if table is None or len(table) - table.count(0) > _STRAY:
        return None
    for n in range(_FRAMES):
        frame = cpu.read(cpu.linear("ss", (cpu.registers["rsp"] & 0xFFFF) + 6 * n), 6)
        ip, cs, flags = struct.unpack("<3H", frame) if frame else (0, 0, 0)
        code = cpu.read((cs << 4) + ip - 2, 4) if ip >= 2 else None
        if flags & _FLAGS_FIXED != 2:
            break
        if code is not None and any(code):
            return _through_nothing(cpu, cs, ip, code)
    return None


def _through_nothing(cpu: Processor, cs: int, ip: int, code: bytes) -> Diagnosis:
    which = f"int {code[1]:#x} at {cs:#x}:{ip - 2:#x}" if code[0] == _INT else f"an interrupt at {cs:#x}:{ip:#x}"
    return say("empty-vectors", f"{which} led to 0x0:0x0, since the table at 0 is empty, and it ran on from there, up "
               f"to {cpu.rip:#x}: there is no BIOS, and the guest has set no handler")  # fmt: skip
