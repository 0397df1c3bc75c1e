"""What a guest that does not end is doing: halted (and what could wake it), looping, or running."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from vmm.observe.processor import RFLAGS_IF, Processor
from vmm.observe.samples import PLACE_BITS, by_vcpu, looping, narrow
from vmm.observe.verdict import Diagnosis, place, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.cpu.vcpu import Vcpu
    from vmm.observe.samples import Sample
    from vmm.observe.subject import Ended
    from vmm.outcome import Outcome

_SAMPLES_ENOUGH = 8  # fewer show no loop
_PLACES_SHOWN = 4
_VCPUS_SHOWN = 4
_RANGE_MAX = 4096  # bytes: what a loop with a call or two may span, and still be shown as a range
_POLLS, _POLLED_MAX = 32, 2  # so many accesses, of which at most so many are different: polling

# local APIC registers (SDM vol. 3, table 11-1)
_SPURIOUS, _LVT_TIMER, _LVT_LINT0, _TIMER_INITIAL, _TIMER_CURRENT, _IRR = 0xF0, 0x320, 0x350, 0x380, 0x390, 0x200
_MASKED, _EXTINT = 1 << 16, 7 << 8
_TSC_DEADLINE_MSR = 0x6E0
_ALL_LINES = 0xFFFF

# Devices with a line that they never drive by themselves: there is no keyboard, no power button, no alarm.
_SILENT = frozenset({"i8042", "acpi-pm", "rtc"})


def why(machine: Ended, outcome: Outcome) -> Diagnosis:
    """What every started vCPU is doing, or where the one that ended the run was."""
    started = [vcpu for vcpu in machine.vcpus if vcpu.mp_state in ("runnable", "halted")]
    awake = [vcpu for vcpu in started if vcpu.mp_state == "runnable"]
    if started and not awake:
        return _halted(machine, started)
    return _running(machine, awake or machine.vcpus[:1], outcome)


# ---- halted ----


def _halted(machine: Ended, vcpus: Sequence[Vcpu]) -> Diagnosis:
    from vmm.observe import departures

    r = vcpus[0].registers()
    if found := departures.empty_vectors(Processor(r, vcpus[0].bits, vcpus[0].paging(), machine.memory.read)):
        return found
    at = r["rip"] - 1 + (0 if vcpus[0].bits == 64 else r["cs_base"])  # HLT is one byte, and RIP is behind it
    who = "the vCPU is" if len(vcpus) == 1 else f"all {len(vcpus)} started vCPUs are"
    if not any(vcpu.registers()["rflags"] & RFLAGS_IF for vcpu in vcpus):
        return say("halt-interrupts-off", f"{who} halted at {place(machine, at)} with RFLAGS.IF = 0: "
                   "only an NMI or a reset could wake it, and nothing here sends one")  # fmt: skip
    timers, devices, masked = _sources(machine, vcpus)
    halted = f"{who} halted at {place(machine, at)}"
    if timers:
        return say("idle", f"{halted}, and {' and '.join(timers)} wakes it from time to time", _idle(devices))
    if devices:
        return say("waiting-for-device", f"{halted}; of what could wake it ({', '.join(devices)}) nothing has", masked)
    return say("no-wakeup", f"{halted} with interrupts on, but no timer runs and no line that a device drives is "
               "unmasked", masked)  # fmt: skip


def _idle(devices: list[str]) -> list[str]:
    return [f"it also listens to {', '.join(devices)}"] if devices else []


def _sources(machine: Ended, vcpus: Sequence[Vcpu]) -> tuple[list[str], list[str], list[str]]:
    """Timers that run, devices whose interrupts would get through, and why the rest would not."""
    from vmm.irq import chips

    state = chips(machine.native)
    apics = {vcpu.number: _LocalApic.of(vcpu) for vcpu in vcpus}
    timers = [f"vCPU {n}'s local APIC timer" for n, saved in apics.items() if _apic_timer(saved)]
    pins, lines = _unmasked_pins(state.get("ioapic", b"")), 0
    through_pic = [n for n, saved in apics.items() if _takes_pic(saved)]
    if through_pic:
        lines = _unmasked_lines(state)
    wires = _wires(machine)
    heard = {gsi: name for gsi, name in wires.items() if pins >> gsi & 1 or (gsi < 16 and lines >> gsi & 1)}
    if _pit_runs(machine, state.get("pit")) and heard.get(0):
        timers.append("the PIT")
    devices = [f"{name} (GSI {gsi})" for gsi, name in sorted(heard.items()) if gsi and name not in _SILENT]
    devices += [device.name for device in machine.virtio if machine.pci is not None and device.driven]
    masked = [
        "local APIC timers: " + (" ".join(timers) or "masked or not started"),
        f"I/O APIC: {f'unmasked inputs {_bits(pins)}' if pins else 'all inputs masked'}",
        "PICs: " + ("not accepted by any local APIC" if not through_pic else
                    f"unmasked lines {_bits(lines)}" if lines else "all lines masked"),
        "devices with a line: " + ", ".join(f"{name} (GSI {gsi})" for gsi, name in sorted(wires.items())),
        f"PIT: {'runs' if _pit_runs(machine, state.get('pit')) else 'not programmed'}",
    ]  # fmt: skip
    if pending := [n for n, saved in apics.items() if any(_apic(saved, _IRR + 16 * i) for i in range(8))]:
        masked.append(f"an interrupt is pending in the local APIC of vCPU {pending[0]} (IRR), but not taken")
    return timers, devices, masked


def _bits(mask: int) -> str:
    return ", ".join(str(bit) for bit in range(mask.bit_length()) if mask >> bit & 1)


class _LocalApic(NamedTuple):
    registers: bytes
    base: int  # IA32_APIC_BASE
    deadline: int  # IA32_TSC_DEADLINE

    @classmethod
    def of(cls, vcpu: Vcpu) -> _LocalApic:
        deadline = vcpu.msr(_TSC_DEADLINE_MSR) if vcpu.has_msr(_TSC_DEADLINE_MSR) else 0
        return cls(vcpu.local_apic(), vcpu.registers()["apic_base"], deadline)


def _apic(saved: _LocalApic, offset: int) -> int:
    return int.from_bytes(saved.registers[offset : offset + 4], "little")


def _apic_timer(saved: _LocalApic) -> bool:
    """Whether the local APIC's timer will fire (SDM vol. 3, 11.5.4)."""
    lvt = _apic(saved, _LVT_TIMER)
    if lvt & _MASKED or not _apic(saved, _SPURIOUS) & 0x100:
        return False
    mode = lvt >> 17 & 3
    if mode == 2:
        return bool(saved.deadline)
    return bool(_apic(saved, _TIMER_INITIAL) if mode == 1 else _apic(saved, _TIMER_CURRENT))


def _takes_pic(saved: _LocalApic) -> bool:
    """Whether the PICs' interrupts reach this vCPU: through LINT0 as ExtINT, or past a disabled local APIC."""
    lint0 = _apic(saved, _LVT_LINT0)
    enabled = bool(saved.base & 1 << 11)
    return not enabled or (not lint0 & _MASKED and lint0 & _EXTINT == _EXTINT)


def _unmasked_pins(ioapic: bytes) -> int:
    """Unmasked inputs of struct kvm_ioapic_state, as a bit mask."""
    entries = (int.from_bytes(ioapic[at : at + 8], "little") for at in range(32, min(len(ioapic), 32 + 24 * 8), 8))
    return sum(1 << pin for pin, entry in enumerate(entries) if not entry & _MASKED)


def _unmasked_lines(state: dict[str, bytes]) -> int:
    """Lines 0 to 15 that get through the PICs (struct kvm_pic_state: IMR is the third byte); 2 is the cascade."""
    if "pic" not in state:
        return 0
    first, second = ~state["pic"][10] & 0xFF, ~state["pic2"][10] & 0xFF
    return first & ~4 | (second << 8 if first & 4 else 0)


def _pit_runs(machine: Ended, pit: bytes | None) -> bool:
    """Whether channel 0 will fire: the in-kernel PIT's (struct kvm_pit_channel_state), or the user-space one's."""
    if pit is None:
        return any(getattr(device, "armed", False) for device in machine.devices if device.name == "pit")
    import time

    count, mode = int.from_bytes(pit[:4], "little"), pit[13]
    if mode in (2, 3, 6, 7):
        return True
    loaded_at = int.from_bytes(pit[16:24], "little", signed=True)
    return mode != 0xFF and loaded_at + count * 1_000_000_000 // 1_193_182 > time.monotonic_ns()


def _wires(machine: Ended) -> dict[int, str]:
    """Which device is on which global system interrupt."""
    found = {0: "pit"}
    for device in machine.devices:
        gsi = getattr(device.line, "gsi", None)
        if gsi is not None:
            found[gsi] = device.name
    return found


# ---- running ----


def _running(machine: Ended, vcpus: Sequence[Vcpu], outcome: Outcome) -> Diagnosis:
    """What those of the started vCPUs do that are not halted: the worst if all of them are stuck, else what the first
    that is at work does. The others are evidence."""
    found = [_executing(machine, vcpu, outcome) for vcpu in vcpus]
    at_work = [diagnosis for diagnosis in found if diagnosis.cause == "running"]
    first = (at_work or found)[0]
    others = [f"vCPU {vcpu.number}: {diagnosis.sentence}" for vcpu, diagnosis in zip(vcpus, found, strict=True)
              if diagnosis is not first]  # fmt: skip
    return first._replace(evidence=(*first.evidence, *others[:_VCPUS_SHOWN]))


def _executing(machine: Ended, vcpu: Vcpu, outcome: Outcome) -> Diagnosis:
    from vmm.observe import departures, faults

    samples = [sample for sample in by_vcpu(machine.samples).get(vcpu.number, []) if not sample.halted]
    r = vcpu.registers()
    cpu = Processor(r, vcpu.bits, vcpu.paging(), machine.memory.read)
    code, _ = cpu.fetch(cpu.rip)
    if len(code) > 1 and not any(code):
        vectors = departures.empty_vectors(cpu)
        return vectors or say("zeroes", f"it executes zeroes at {place(machine, cpu.rip)}, and continues through them")
    insn = faults.decode(cpu, code)
    if hypercall := departures.hypercall(machine, cpu, insn, samples):
        return hypercall
    if insn is not None and insn.mnemonic == "jmp" and insn.operands[0].imm == cpu.rip:
        until = "" if r["rflags"] & RFLAGS_IF else ", with interrupts off"
        return say("endless-loop", f"the instruction at {place(machine, cpu.rip)} jumps to itself{until}")
    if len(samples) < _SAMPLES_ENOUGH:
        return say("running", f"it was executing at {place(machine, cpu.rip)}", _polled(machine, outcome))
    seconds = samples[-1].at - samples[0].at
    evidence = _polled(machine, outcome) + _top(machine, samples)
    seen = f"{len(samples)} samples of RIP in {seconds:.2g} s"
    if looping(samples):
        again = len(samples) - len({(sample.rip, sample.state) for sample in samples})
        return say("endless-loop", f"all of {seen} are at {_where(machine, samples)}, with all registers as they "
                   f"were before in {again} of {len(samples)}", evidence)  # fmt: skip
    if len({sample.state for sample in samples}) == 1:
        return say("running", f"all of {seen} are at {_where(machine, samples)}: the host hardly let it run", evidence)
    if narrow(samples):
        return say("running", f"all of {seen} are at {_where(machine, samples)}, with other registers each time: it "
                   "computes, counts or waits for a clock", evidence)  # fmt: skip
    return say("running", f"{seen} are in {len({s.rip for s in samples})} places: it was at work, not stuck", evidence)


def _where(machine: Ended, samples: list[Sample]) -> str:
    """The places of samples: one, a range where they are close together, else the most frequent."""
    low, high = min(s.rip for s in samples), max(s.rip for s in samples)
    if low == high:
        return place(machine, low)
    if high - low <= _RANGE_MAX:
        return f"{place(machine, low)} to {place(machine, high)}"
    often = Counter(s.rip >> PLACE_BITS for s in samples).most_common(_PLACES_SHOWN)
    return ", ".join(place(machine, next(s.rip for s in samples if s.rip >> PLACE_BITS == block)) for block, _ in often)


def _top(machine: Ended, samples: list[Sample]) -> list[str]:
    """Where most of the samples are, by function where there are names."""
    found = Counter((machine.symbols.name(s.rip) or f"{s.rip:#x}").split("+")[0] for s in samples)
    return [f"{times:3} of {len(samples)} in {name}" for name, times in found.most_common(_PLACES_SHOWN)]


def _polled(machine: Ended, outcome: Outcome) -> list[str]:
    """The accesses it makes over and over, if its newest are few different ones."""
    from vmm.observe.exits import describe_exit

    accesses = [event for event in outcome.last_exits if event.reason in ("io", "mmio")][-_POLLS:]
    found = Counter(describe_exit(machine.bus, event) for event in accesses)
    if len(accesses) < _POLLS or len(found) > _POLLED_MAX:
        return []
    return ["its last device accesses, over and over: " + "; ".join(found)]
