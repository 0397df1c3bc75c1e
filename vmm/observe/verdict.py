"""A diagnosis as a value: one cause, one sentence, and what shows it."""

from __future__ import annotations

from os.path import getsize, isfile
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm.printable import printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vmm.observe.budget import Budget
    from vmm.observe.symbols import Symbols

# cause -> how a sentence about it begins
CAUSES: dict[str, str] = {
    # an exception that could not be delivered
    "missing-idt": "exception without an IDT",
    "bad-idt": "exception that the IDT could not deliver",
    "page-fault": "page fault",
    "reserved-bit": "page fault on a reserved bit",
    "non-canonical-jump": "jump to a non-canonical address",
    "non-canonical-address": "general protection: non-canonical address",
    "stack-overflow": "stack overflow",
    "bad-segment": "general protection: bad segment",
    "bad-msr": "general protection: bad MSR",
    "privileged": "general protection: privileged instruction",
    "invalid-opcode": "invalid opcode",
    "device-not-available": "device not available",
    "divide-error": "divide error",
    "software-interrupt": "software interrupt",
    "zeroes": "jump into zeroes",
    "no-code": "jump out of RAM",
    "wrong-image": "wrong or truncated image",
    "not-emulated": "instruction that KVM does not emulate",
    "no-bios": "no BIOS",
    # what this host or this machine has not
    "hypercall": "hypercall that never returns on this host",
    "no-legacy-paging": "32-bit paging, which this host's KVM cannot do",
    "no-int-n": "software interrupt that this host's KVM cannot deliver",
    "empty-vectors": "empty interrupt vector table",
    # nothing moves
    "halt-interrupts-off": "HLT with interrupts off",
    "no-wakeup": "waiting for an interrupt that nothing can raise",
    "waiting-for-device": "waiting for a device",
    "idle": "idle",
    "endless-loop": "endless loop",
    "running": "running",
    # Linux, in its own words or for want of them
    "no-console": "no console",
    "no-root": "unable to mount root",
    "missing-init": "missing init",
    "init-ended": "init ended",
    "kernel-panic": "kernel panic",
    "bad-initrd": "wrong or truncated initrd",
    "no-driver": "no driver",
    # and the rest
    "orderly-end": "orderly end",
    "unknown": "unknown",
}

_EVIDENCE_MAX = 12
TEXT_MAX = 1000  # of a sentence, and of a line of evidence
_LINES_MAX = 64 << 20  # bytes of an ELF file whose line tables are read: a kernel's full ones would take minutes


class Diagnosis(NamedTuple):
    """``cause``: a key of :data:`CAUSES`, for programs. ``sentence`` names it for people; ``evidence`` are lines that
    show it."""

    cause: str
    sentence: str
    evidence: tuple[str, ...] = ()


def say(cause: str, text: str, evidence: list[str] | tuple[str, ...] = ()) -> Diagnosis:
    """A diagnosis whose sentence begins as :data:`CAUSES` has it; what a guest wrote is made printable."""
    shown = tuple(printable(line, TEXT_MAX) for line in evidence[:_EVIDENCE_MAX])
    return Diagnosis(cause, f"{CAUSES[cause]}: {printable(text, TEXT_MAX)}", shown)


class Named(Protocol):
    """A machine whose guest has names for addresses."""

    @property
    def symbols(self) -> Symbols: ...
    def looking(self, budget: Budget | None = None) -> AbstractContextManager[Budget]: ...


def place(machine: Named, address: int) -> str:
    """An address as sentences show it: with its symbol, and the source line where that is known."""
    name = machine.symbols.name(address)
    if not name:
        return f"{address:#x}"
    path, where = machine.symbols.path, None
    if path and isfile(path) and getsize(path) <= _LINES_MAX:
        with machine.looking() as budget:
            where = machine.symbols.line(address, budget)
    return f"{address:#x} <{name}>" + (f" ({where[0]}:{where[1]})" if where else "")
