"""One screen about how a guest died: reason, where it was, what it did last, what it said last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.observe.exits import describe_exit, folded
from vmm.outcome import KVM_EMULATION
from vmm.printable import printable, printable_lines

if TYPE_CHECKING:
    from vmm.observe.budget import Budget
    from vmm.observe.subject import Ended
    from vmm.observe.verdict import Diagnosis
    from vmm.outcome import Outcome

EXITS_SHOWN = 8
FRAMES_SHOWN = 10
CONSOLE_LINES = 8


def report(machine: Ended, outcome: Outcome) -> str:
    """The screen, as text ending in a newline. What the guest wrote is printable in it."""
    with machine.looking() as budget:
        lines = _report(machine, outcome)
        return _finished([*lines, *_notes(budget), *_text_screen(machine)])


def _finished(lines: list[str]) -> str:
    return printable_lines("\n".join(lines)) + "\n"


def _notes(budget: Budget) -> list[str]:
    return [f"  ({note})" for note in budget.notes]


def _text_screen(machine: Ended) -> list[str]:
    from vmm.observe.screen import section

    return section(machine.screen()) if machine.screen() else []


def _report(machine: Ended, outcome: Outcome) -> list[str]:
    from vmm.observe.disassembly import disassemble
    from vmm.observe.verdict import place

    r = outcome.registers
    who = "" if outcome.vcpu is None else f" on vCPU {outcome.vcpu}"
    lines = ["", f"pyvmm: {outcome.sentence}{who} (after {outcome.seconds:.3g} s)"]
    lines += _diagnosis(machine.diagnose())
    if outcome.lost:
        lines += _wrapped(outcome.lost)
    elif outcome.replayed:
        lines.append("  registers are of a replay that died the same way")
    if outcome.reason == "emulation-failure" and outcome.code == KVM_EMULATION:
        lines.append(f"  instruction bytes {outcome.instruction.hex(' ') or '(unknown)'}; suberror {outcome.code}")
    linear = r["rip"] + (r["cs_base"] if outcome.bits == 16 else 0)
    lines.append(f"  rip {place(machine, r['rip'])}  {outcome.bits}-bit  rflags {r['rflags']:#x}")
    for row in (("rax", "rbx", "rcx", "rdx"), ("rsi", "rdi", "rsp", "rbp"), ("cr0", "cr2", "cr3", "cr4")):
        lines.append("  " + "  ".join(f"{name} {r[name]:#018x}" for name in row))
    lines.append(f"  cs {r['cs']:#x}  ss {r['ss']:#x}  idt {r['idt_base']:#x}/{r['idt_limit']:#x}  efer {r['efer']:#x}")
    lines.append("code:")
    lines += [f"  {line}" for line in disassemble(outcome.instruction, linear, outcome.bits, 4)]
    frames = machine.stack(outcome.vcpu or 0)[1:] if outcome.bits == 64 else []
    if frames:
        lines.append("called from:")
        shown = folded([str(frame) for frame in frames])
        lines += [f"  {frame}" for frame in shown[:FRAMES_SHOWN]]
        lines += ["  ..."] if len(shown) > FRAMES_SHOWN else []
    if outcome.last_exits:
        lines.append("last exits:")
        shown = folded([describe_exit(machine.bus, event) for event in outcome.last_exits])
        lines += [f"  {line}" for line in shown[-EXITS_SHOWN:]]
    tail = [line.rstrip() for line in outcome.console.decode(errors="replace").splitlines() if line.strip()]
    if tail:
        lines.append("console:")
        lines += [f"  {printable(line[:116])[:116]}" for line in tail[-CONSOLE_LINES:]]
    return lines


def brief(machine: Ended, outcome: Outcome) -> str:
    """What it was doing when it was ended from outside: the first lines of the screen."""
    with machine.looking() as budget:
        found = _diagnosis(machine.diagnose())
        return _finished([f"pyvmm: {outcome.sentence}", *found, *_notes(budget), *_text_screen(machine)])


def _diagnosis(found: Diagnosis) -> list[str]:
    if found.cause == "unknown":
        return []
    return [*_wrapped(found.sentence), *(f"  - {line[:116]}" for line in found.evidence)]


def _wrapped(sentence: str) -> list[str]:
    import textwrap

    return textwrap.wrap(sentence, 116, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
