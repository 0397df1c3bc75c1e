"""How a machine ended, as a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cpu.vcpu import Exit
    from vmm.observe.verdict import Diagnosis

# reason -> (exit status of `pyvmm boot`, one sentence). A debug exit's status is (value << 1) | 1, always odd, as
# QEMU's isa-debug-exit has it; so pyvmm's own are even wherever no older convention fixes them.
REASONS: dict[str, tuple[int, str]] = {
    "power-off": (0, "the guest powered off"),
    "debug-exit": (1, "the guest wrote to the debug-exit port"),
    "reset": (4, "the guest asked for a reset"),
    "panic": (10, "the guest's kernel panicked"),
    "triple-fault": (12, "triple fault: an exception could not be delivered, nor the double fault after it"),
    "emulation-failure": (14, "KVM could not emulate a guest instruction"),
    "entry-failure": (16, "the processor refused to enter the guest: its register state is not legal"),
    "halt": (18, "the guest halted with nothing to wake it"),
    "unknown-exit": (20, "KVM reported an exit this monitor has no answer to"),
    "host-failure": (22, "KVM_RUN failed on the host"),
    "debug": (24, "the guest hit a debug exception nobody claimed"),
    "stalled": (26, "the guest made no progress for as long as it was given (--stall)"),
    "memory-lost": (28, "guest memory that was still to come will not: its source is gone"),
    "no-bios": (30, "the guest called the BIOS, and this machine has none"),
    "stopped": (0, "the monitor stopped the machine"),
    "migrated": (0, "the machine moved, and goes on elsewhere"),
    "timeout": (124, "the time limit passed"),
    "interrupted": (130, "interrupted (SIGINT)"),
    "terminated": (143, "terminated (SIGTERM)"),
}

KVM_EMULATION = 1  # the code of an "emulation-failure" that is one (KVM_INTERNAL_ERROR_EMULATION)

GOOD_ENDS = frozenset({"power-off", "reset", "debug-exit", "stopped", "migrated"})


class Replayed(NamedTuple):
    """The dying instruction, and the registers before it; or ``why`` that was not found."""

    registers: dict[str, int] = {}
    bits: int = 64
    instruction: bytes = b""
    why: str = ""


class Outcome:
    """How a run ended.

    ``reason`` is a key of :data:`REASONS`; ``code`` the number that came with it (the debug-exit value, KVM's
    suberror, the panic event bits ...); ``status`` the exit status it maps to. ``vcpu`` is the number of the vCPU
    that ended it, or None. ``registers`` are that vCPU's (or vCPU 0's), ``instruction`` the bytes at its RIP,
    ``bits`` its operand size, ``last_exits`` its newest exits (oldest first), ``console`` the tail of what the
    guest printed. ``seconds`` is how long it ran. ``diagnosis`` is what ``Machine.diagnose()`` found, once that was
    asked for. ``data`` are the numbers that KVM gave with an internal error of its own, an "emulation-failure" whose
    ``code`` is not 1.

    Where the host's KVM has reset the vCPU (AMD SVM, after a triple fault), the first access to ``registers``,
    ``instruction`` or ``bits`` repeats the run, which takes a few times as long as the run did. ``replayed`` then is
    true if they come from that replay; if not, ``lost`` gives the reason, and they are the values after the reset.
    """

    __slots__ = (
        "_bits",
        "_exits",
        "_instruction",
        "_lost",
        "_registers",
        "_replayed",
        "_seek",
        "code",
        "console",
        "data",
        "diagnosis",
        "explanation",
        "reason",
        "seconds",
        "vcpu",
    )

    def __init__(
        self,
        reason: str,
        code: int = 0,
        *,
        vcpu: int | None = None,
        registers: dict[str, int] | Callable[[], dict[str, int]] | None = None,
        instruction: bytes = b"",
        bits: int = 64,
        last_exits: list[Exit] | Callable[[], list[Exit]] | None = None,
        console: bytes = b"",
        explanation: str = "",
        seconds: float = 0.0,
    ) -> None:
        self.reason = reason
        self.code = code
        self.data: tuple[int, ...] = ()
        self.vcpu = vcpu
        self._registers = registers or {}
        self._instruction = instruction
        self._bits = bits
        self._seek: Callable[[], Replayed] | None = None
        self._replayed = False
        self._lost = ""
        self._exits = last_exits or []
        self.console = console
        self.explanation = explanation
        self.seconds = seconds
        self.diagnosis: Diagnosis | None = None

    # Computed on first access, since few callers read them.

    @property
    def registers(self) -> dict[str, int]:
        """The registers, by the names that :meth:`vmm.cpu.vcpu.Vcpu.registers` uses."""
        self._find()
        if callable(self._registers):
            self._registers = self._registers()
        return self._registers

    @property
    def instruction(self) -> bytes:
        """The bytes at its RIP, as many as there are, up to 16."""
        self._find()
        return self._instruction

    @instruction.setter
    def instruction(self, code: bytes) -> None:
        """Set by the code that creates the outcome."""
        self._instruction = code

    @property
    def bits(self) -> int:
        """Operand size of the code at its RIP: 16, 32 or 64."""
        self._find()
        return self._bits

    @property
    def replayed(self) -> bool:
        """Whether the registers are those of a second run that died the same way."""
        self._find()
        return self._replayed

    @property
    def lost(self) -> str:
        """Why the registers are not those it died with, or ``""``."""
        self._find()
        return self._lost

    def seek(self, replay: Callable[[], Replayed]) -> None:
        """Note that the host has reset the vCPU; the first access to its registers calls ``replay``."""
        self._seek = replay

    def _find(self) -> None:
        seek, self._seek = self._seek, None
        if seek is None:
            return
        found = seek()
        if found.why:
            self._lost = f"the host's KVM has reset the vCPU (SVM), and a replay does not tell: {found.why}"
        else:
            self._registers, self._bits, self._instruction = found.registers, found.bits, found.instruction
            self._replayed = True

    @property
    def last_exits(self) -> list[Exit]:
        """The newest exits, oldest first."""
        if callable(self._exits):
            self._exits = self._exits()
        return self._exits

    @property
    def ok(self) -> bool:
        """Whether the guest ended itself in an orderly way (its own verdict is ``status``)."""
        return self.reason in GOOD_ENDS

    @property
    def status(self) -> int:
        """The exit status of ``pyvmm boot`` for this end."""
        if self.reason == "debug-exit":
            return (self.code << 1 | 1) & 0xFF
        return REASONS[self.reason][0]

    @property
    def sentence(self) -> str:
        """The reason in one sentence."""
        return self.explanation or REASONS[self.reason][1]

    def __repr__(self) -> str:
        return f"<Outcome {self.reason} code={self.code:#x} status={self.status}>"
