"""Why a guest died or makes no progress: one cause, one sentence, and the evidence.

What can be known is worked out, never guessed: registers, page tables and descriptors after a fault
(:mod:`~vmm.observe.faults`), interrupt controllers and samples of RIP where nothing moves
(:mod:`~vmm.observe.waiting`), a Linux kernel's own words (:mod:`~vmm.observe.kernel_words`). Where nothing is found the
cause is "unknown".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.observe.verdict import TEXT_MAX, Diagnosis, place, say
from vmm.outcome import KVM_EMULATION
from vmm.printable import printable

if TYPE_CHECKING:
    from vmm.observe.faults import Fault
    from vmm.observe.processor import Processor
    from vmm.observe.subject import Ended
    from vmm.outcome import Outcome

ENDED_FROM_OUTSIDE = frozenset({"timeout", "stalled", "halt", "stopped", "interrupted", "terminated"})


def diagnose(machine: Ended, outcome: Outcome) -> Diagnosis:
    """The diagnosis of an ended run; the machine must not be closed. What a guest wrote is printable in it, and of
    bounded length."""
    from vmm.observe import bios

    found = _diagnose(machine, outcome)
    found = found._replace(evidence=(*found.evidence, *bios.calls(machine)))
    return found._replace(evidence=tuple(printable(line, TEXT_MAX) for line in found.evidence))  # some is added late


def _diagnose(machine: Ended, outcome: Outcome) -> Diagnosis:
    from vmm.observe import kernel_words, waiting

    # A guest that powers itself off did not die of what it printed; a reset may be a panic's (panic=-1).
    found = None if outcome.ok and outcome.reason != "reset" else kernel_words.told(machine, outcome)
    if found is None and outcome.reason in ("triple-fault", "emulation-failure"):
        found = _fault(machine, outcome)
    if found is None and outcome.reason in ENDED_FROM_OUTSIDE:
        found = kernel_words.silent(machine)
        if found is None:
            found = waiting.why(machine, outcome)
            found = found._replace(evidence=(*found.evidence, *kernel_words.unprinted(machine)))
        if found.cause in ("idle", "waiting-for-device") and (undriven := kernel_words.undriven(machine)):
            found = undriven._replace(evidence=(*undriven.evidence, found.sentence))
    if found is None and outcome.reason == "no-bios":
        found = say("no-bios", outcome.sentence)
    if found is None and outcome.reason == "panic":
        found = say("kernel-panic", "the guest reported it through pvpanic")
    if found is None and outcome.ok:
        found = kernel_words.undriven(machine) or say("orderly-end", outcome.sentence)
    return found or say("unknown", outcome.sentence)


# ---- a fault ----


def _fault(machine: Ended, outcome: Outcome) -> Diagnosis | None:
    from vmm.observe import departures, faults
    from vmm.observe.descriptors import VECTORS, delivery
    from vmm.observe.processor import Processor

    if outcome.reason == "emulation-failure" and outcome.code != KVM_EMULATION:
        return None  # KVM gave up by itself: the instruction at RIP is not to blame
    if outcome.lost:
        return say("unknown", outcome.lost)
    r = outcome.registers
    vcpu = machine.vcpus[outcome.vcpu or 0]
    cpu = Processor(r, outcome.bits, vcpu.paging(r), machine.memory.read)
    if found := departures.empty_vectors(cpu) or departures.of(machine, cpu, cpu.fetch(cpu.rip)[0]):
        return found
    names = faults.Names(lambda address: place(machine, address), vcpu.has_msr)
    fault = faults.find(cpu, names)
    if outcome.replayed and fault is not None and fault.address is not None:
        r["cr2"] = fault.address  # the replay's registers are those before the fault
    if outcome.reason == "emulation-failure":
        return _not_emulated(machine, outcome, cpu, fault)
    if fault is None:
        return _undeliverable(machine, cpu)
    evidence = _details(machine, cpu, fault)
    handler = delivery(cpu, fault.vector, names.of)
    shown = VECTORS.get(fault.vector, f"vector {fault.vector}")
    if fault.intended and handler.problem:
        cause = "missing-idt" if handler.problem in ("no-idt", "unmapped") else "bad-idt"
        return say(cause, f"{fault.text} raises {shown}, and {handler.text}", evidence)
    text = fault.text if not handler.problem else f"{fault.text}; {shown} could not be delivered: {handler.text}"
    if not handler.problem:
        evidence.append(f"{handler.text}: {shown} by itself could be delivered")
    if nothing := _nothing_at_entry(machine, cpu, fault):
        return say("wrong-image", f"{nothing}: {fault.text}", evidence)
    return say(fault.cause, text, evidence)


def _nothing_at_entry(machine: Ended, cpu: Processor, fault: Fault) -> str:
    """Whether there was no code where the image was entered, in words."""
    if machine.entry is None:
        return ""
    at = machine.entry.rip + (machine.entry.cs_base if machine.entry.mode == "real" else 0)
    first = cpu.read(at, 16)
    if fault.cause == "zeroes" and first is not None and not any(first):
        return f"the image holds zeroes at its entry point {at:#x}"
    if fault.cause == "invalid-opcode" and cpu.rip == at:
        return f"there is no {cpu.bits}-bit code at the image's entry point {at:#x}"
    return ""


def _not_emulated(machine: Ended, outcome: Outcome, cpu: Processor, fault: Fault | None) -> Diagnosis:
    if fault is not None and not fault.intended:
        if nothing := _nothing_at_entry(machine, cpu, fault):
            return say("wrong-image", f"{nothing}: {fault.text}")
        return say(fault.cause, fault.text, _details(machine, cpu, fault))
    from vmm.observe.faults import decode

    insn = decode(cpu, outcome.instruction)
    shown = f"{insn.mnemonic} {insn.op_str}".strip() if insn else outcome.instruction.hex(" ") or "(bytes not known)"
    return say("not-emulated", f"{shown} at {place(machine, cpu.rip)}; see pyvmm doctor, and --compat")


def _undeliverable(machine: Ended, cpu: Processor) -> Diagnosis | None:
    """Nothing is wrong with the instruction: then it was an interrupt, or a fault while one was delivered."""
    from vmm.observe.descriptors import delivery

    what = f"an exception or interrupt came at {place(machine, cpu.rip)}, whose instruction is sound"
    for vector in (14, 13, 8):
        found = delivery(cpu, vector, lambda address: place(machine, address))
        if found.problem:
            cause = "missing-idt" if found.problem in ("no-idt", "unmapped") else "bad-idt"
            return say(cause, f"{what}, and {found.text}")
    return None


def _details(machine: Ended, cpu: Processor, fault: Fault) -> list[str]:
    lines = []
    if fault.cause in ("page-fault", "reserved-bit", "stack-overflow"):
        lines.append(f"cr2 (the last page fault's address) is {cpu.registers['cr2']:#x}")
    if not any(cpu.fetch(cpu.rip)[0]) and (caller := _caller(machine, cpu)):
        lines.append(caller)
    if fault.cause == "stack-overflow":
        lines += _recursion(machine, cpu)
    if (
        machine.entry is not None
        and machine.entry.kind == "flat"
        and not {"io", "mmio"} & machine.vcpus[0].exit_counts().keys()
    ):
        lines.append(f"it never used a device: is this an image for another mode than {machine.entry.mode} (--mode)?")
    return lines


def _caller(machine: Ended, cpu: Processor) -> str:
    """Who called the address it is at, if the top of the stack is where a call returns to."""
    from vmm.observe.stack import follows_call

    top = cpu.word(cpu.linear("ss", cpu.registers["rsp"]), 8) if cpu.bits == 64 else None
    if top is None or not follows_call(_Memory(cpu), top):
        return ""
    return f"called from {place(machine, top)}, which is on top of the stack"


class _Memory:
    """What a stopped processor's code sees, as :mod:`vmm.observe.stack` reads it."""

    def __init__(self, cpu: Processor) -> None:
        self._cpu = cpu

    def read(self, address: int, size: int, /) -> bytes:
        """``size`` bytes; a ``LookupError`` where they are not mapped."""
        data = self._cpu.read(address & (1 << 64) - 1, size)
        if data is None:
            raise LookupError(f"{address:#x} is not mapped")
        return data


def _recursion(machine: Ended, cpu: Processor) -> list[str]:
    """The return address that fills the stack."""
    from collections import Counter

    data = cpu.read((cpu.registers["rsp"] + 7) & ~7, 2048) if cpu.bits == 64 else None
    if data is None:
        return []
    words = (int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8))
    found = Counter(word for word in words if machine.symbols.name(word)).most_common(1)
    if not found or found[0][1] < 4:
        return []
    (address, times), words_seen = found[0], len(data) // 8
    return [f"{place(machine, address)} is {times} times among the {words_seen} words on top of the stack: recursion"]
