"""How a run ended: the native stop reason, registers and console become an :class:`~vmm.outcome.Outcome`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm._ffi import lib
from vmm.machine.stop_reasons import HOST_REASONS, REASONS
from vmm.outcome import KVM_EMULATION, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.console import Console
    from vmm.cpu.vcpu import Vcpu
    from vmm.machine.firmware import Firmware
    from vmm.machine.vm import Vm
    from vmm.memory import GuestMemory
    from vmm.outcome import Replayed

_PANIC_MARK = b"Kernel panic - not syncing"
_CODE_BYTES = 16  # at RIP; an instruction has at most 15


class Ending:
    """Describes the end of a machine that has stopped and is still open.

    ``replay(outcome)`` returns what repeats the run, for hosts that reset the vCPU before they report a triple fault.
    """

    def __init__(
        self,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        memory: GuestMemory,
        console: Console,
        firmware: Firmware,
        replay: Callable[[Outcome], Callable[[], Replayed]],
    ) -> None:
        self._vm = vm
        self._vcpus = vcpus
        self._memory = memory
        self._console = console
        self._firmware = firmware
        self._replay = replay

    def outcome(self, seconds: float, migrated: bool, failure: BaseException | None) -> Outcome:
        """Return the outcome of a run of ``seconds``. ``failure``: what code of a device or hook raised."""
        from vmm.cpu.vcpu import named, operand_bits, was_reset

        native, code, number = self._vm.stopped()
        reason = HOST_REASONS.get(code, "stopped") if native == lib.VMM_STOP_HOST else REASONS.get(native, "stopped")
        culprit = number if number < len(self._vcpus) else None
        vcpu = self._vcpus[culprit or 0]
        regs, sregs = vcpu.structs()
        outcome = Outcome(
            "migrated" if migrated else reason,
            code,
            vcpu=culprit,
            registers=lambda: named(regs, sregs),
            bits=operand_bits(sregs),
            last_exits=vcpu.kept_exits(),
            console=self._console.tail(),
            seconds=seconds,
        )
        entry = self._firmware.entry
        if outcome.reason == "triple-fault" and was_reset(regs, sregs) and entry and entry.rip != regs.rip:
            outcome.seek(self._replay(outcome))
        if native == lib.VMM_STOP_CALLBACK and failure is not None:
            outcome.explanation = f"code of a device or hook raised {failure!r:.200}"
        outcome.instruction = vcpu.failed_instruction() or self._bytes_at(vcpu, regs.rip + sregs.cs.base)
        self._explain(outcome, vcpu)
        return outcome

    def _explain(self, outcome: Outcome, vcpu: Vcpu) -> None:
        """Add what only memory, the console or KVM's own numbers tell about a reason."""
        if outcome.reason == "emulation-failure" and outcome.code != KVM_EMULATION:
            from vmm.cpu.internal_error import sentence

            outcome.data = vcpu.internal_error()
            outcome.explanation = sentence(outcome.code, outcome.data)
        if outcome.reason == "no-bios":
            from vmm.observe import bios

            outcome.explanation = bios.call(outcome.registers, self._memory)
        if outcome.reason in ("reset", "halt", "timeout", "stalled") and _PANIC_MARK in outcome.console:
            # panic=-1 turns a panic into a reset: the guest's own last words say which it was.
            outcome.reason = "panic"
        if outcome.reason == "panic" and (line := _panic_line(outcome.console)):
            outcome.explanation = f"the guest's kernel panicked: {line}"

    def _bytes_at(self, vcpu: Vcpu, linear: int) -> bytes:
        found = b""
        while len(found) < _CODE_BYTES:
            gpa = vcpu.translate((linear + len(found)) & ((1 << 64) - 1))
            if gpa is None:
                break
            size = min(_CODE_BYTES - len(found), layout.PAGE - gpa % layout.PAGE)
            try:
                found += self._memory.read(gpa, size)
            except IndexError:
                break
        return found


def _panic_line(console: bytes) -> str:
    at = console.rfind(_PANIC_MARK)
    if at < 0:
        return ""
    return console[at:].split(b"\n", 1)[0].split(b" ]---")[0].strip().decode(errors="replace")
