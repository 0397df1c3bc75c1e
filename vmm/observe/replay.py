"""The last instruction of a guest whose registers are lost, found by running it again.

kvm-amd resets a vCPU before it reports a triple fault (:func:`vmm.cpu.vcpu.was_reset`): only memory and the last exits
are left. So a second machine runs from the same beginning. It must record the same exits as the first, and must die of
a triple fault, too; else it says nothing. A checkpoint is taken at the last exit, and from there the vCPU is stepped,
its registers being kept before each instruction. Where that is too many steps, the checkpoint is moved towards the
death in time: run for half of what is left, see whether the guest still lives, keep that or go back.

A step ends where the next instruction begins, but an exception's handler runs unstepped until it returns, since the
processor clears TF. So the last step's instruction may have raised an exception that was delivered, and the guest have
died in the handler. That is seen by breakpoints at all handlers; the search then continues from the one that is hit.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.errors import LinearMemoryError, VmmError
from vmm.observe.processor import Processor
from vmm.outcome import Replayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.cpu.debug import Followed, Stop
    from vmm.cpu.vcpu import Exit
    from vmm.memory import GuestMemory
    from vmm.observe.subject import Replayable

SECONDS, TIMES, SECONDS_MAX = 30.0, 4.0, 120.0  # for a replay: so many, and times the run's, and at most
_STEPS_MAX = 1 << 40  # time is the bound
_FIRST_LOOK = 2.0  # seconds of steps from the last exit before halving begins
_SLICE_MIN = 0.0002  # seconds: less cannot be told from what waking a thread takes
_ENTERED_MAX = 16  # handlers within handlers
_TRIES = 3  # interrupts come when they like, and a second walk may not get to the place of the first
_RECORDED_MAX = 64  # exits that a vCPU remembers
_LSTAR, _CSTAR, _SYSENTER_EIP, _EFER_SCE = 0xC0000082, 0xC0000083, 0x176, 1
_CHUNK, _PAGE = 1 << 20, 4096


class Death(NamedTuple):
    """What is known of it: on which ``vcpu``, after how many recorded ``exits``, the last of them, the run's duration,
    and ``memory`` as it was left, where it still is."""

    vcpu: int
    exits: int
    last_exits: list[Exit]
    seconds: float
    memory: GuestMemory | None


class _Astray(Exception):
    """The replay does not do what the first run did."""


def find(death: Death, make: Callable[[], Replayable]) -> Replayed:
    """Replay a death in the machine that ``make`` returns, which is closed afterwards."""
    deadline = time.monotonic() + min(SECONDS_MAX, SECONDS + TIMES * death.seconds)
    try:
        with make() as machine:
            return _Replay(machine, death, deadline).find()
    except (_Astray, VmmError) as error:
        return Replayed(why=str(error))


class _Replay:
    """One replay. The machine is paused, but within the debugger's ``run`` and ``follow``."""

    def __init__(self, machine: Replayable, death: Death, deadline: float) -> None:
        self.machine = machine
        self.death = death
        self.deadline = deadline
        self.vcpu = machine.vcpus[death.vcpu]

    def find(self) -> Replayed:
        self.machine.load()
        self.machine.pause()
        self.machine.start()
        self._run_to_last_exit()
        self.at = self.machine.checkpoint()
        began = time.monotonic()
        self._run()
        lasted = time.monotonic() - began
        self._compare()
        last = self._last_step(lasted)
        for _ in range(_ENTERED_MAX):
            if not self._enters_handler(last):
                return self._result(last)
            last = self._last_step(self.left)  # from the handler's first instruction
        raise _Astray(f"it dies within more than {_ENTERED_MAX} handlers that interrupt each other")

    @property
    def left(self) -> float:
        """Seconds."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise _Astray(
                f"there was not enough time (a run of {self.death.seconds:.3g} s): "
                "take a checkpoint shortly before, from which it can be repeated"
            )
        return left

    # ---- to the last exit, and the death ----

    def _run_to_last_exit(self) -> None:
        exits = self.death.exits
        if exits and self._run(exits=exits) is None:
            raise _Astray(f"it took another way: it ended after {self.vcpu.recorded} of {exits} exits, or hangs")
        n = min(exits, _RECORDED_MAX)
        if n and list(map(_same, self.vcpu.last_exits()[-n:])) != list(map(_same, self.death.last_exits[-n:])):
            raise _Astray(f"it took another way: the last of {exits} exits are not those of the first run")

    def _compare(self) -> None:
        if not self._dead:
            raise _Astray("it took another way: it goes on where the first run died")
        if self.vcpu.recorded != self.death.exits:
            raise _Astray(f"it took another way: it died after {self.vcpu.recorded} exits, not {self.death.exits}")
        if not self.death.exits and (differ := self._pages_that_differ()):
            raise _Astray(f"it took another way: {differ} pages of memory are not as the first run left them")

    def _pages_that_differ(self) -> int:
        then, now = self.death.memory, self.machine.memory
        if then is None:
            return 0
        differ = 0
        for gpa, size in (part for number in range(len(then.regions)) for part in then.in_use(number)):
            for at in range(gpa, gpa + size, _CHUNK):
                n = min(_CHUNK, gpa + size - at)
                one, other = then.read(at, n), now.read(at, n)
                if one != other:
                    differ += sum(one[i : i + _PAGE] != other[i : i + _PAGE] for i in range(0, n, _PAGE))
        return differ

    def _run(self, seconds: float | None = None, exits: int = 0) -> Stop | None:
        left = self.left if seconds is None else min(seconds, self.left)
        return self.machine.debug.run(left, vcpu=self.vcpu, exits=exits)

    @property
    def _dead(self) -> bool:
        """Whether it has died as the first one did; an end of any other kind is another way."""
        ended = self.machine.ended
        if ended and (ended.reason, ended.vcpu) != ("triple-fault", self.death.vcpu):
            raise _Astray(f"it took another way: its end was {ended.reason}")
        return ended is not None

    # ---- going back ----

    def _go_back(self) -> None:
        self.machine.rollback(self.at)
        if not self.machine.running:
            self.machine.start()

    def _keep(self) -> None:
        """From now on, go back to here."""
        new = self.machine.checkpoint()
        self.at.close()
        self.at = new

    # ---- the last step ----

    def _last_step(self, lasted: float) -> Followed:
        """The last step from the checkpoint, whose death comes in ``lasted`` seconds."""
        last = self._walk(_FIRST_LOOK)
        if last is None:
            self._close_in(lasted)
            last = self._walk(self.left)
        if last is None:
            raise _Astray("it runs too long without an exit before it dies: nothing tells where")
        return last

    def _walk(self, seconds: float) -> Followed | None:
        """Step from the checkpoint; ``None``: the death is further than so many seconds of steps."""
        self._go_back()
        last = self.machine.debug.follow(self.vcpu, _STEPS_MAX, min(seconds, self.left))
        return last if self._dead else None

    def _close_in(self, lasted: float) -> None:
        """Move the checkpoint to shortly before the death."""
        part = lasted / 2
        while part > _SLICE_MIN:
            self._go_back()
            began = time.monotonic()
            self._run(part)
            ran = time.monotonic() - began
            if self._dead:
                part = min(part, ran) / 2
            else:
                self._keep()

    # ---- handlers ----

    def _enters_handler(self, last: Followed) -> bool:
        """Whether what ended the last step entered a handler, at whose beginning the checkpoint is then."""
        handlers = set(self._handlers(last)) - {_processor(self.machine, self.vcpu, last).rip}
        if not handlers:
            return False
        for _ in range(_TRIES):
            self._go_back()
            if last.steps:
                self.machine.debug.follow(self.vcpu, last.steps, self.left)
            if not self.machine.ended and self.vcpu.registers() == last.registers:
                break
        else:
            raise _Astray("interrupts lead it another way each time")
        points = list(self._planted(handlers))
        stop = self._run()
        for point in points:
            point.remove()
        if stop is None:
            if not self._dead:
                raise _Astray("it took another way: it goes on where the first run died")
            return False
        self._keep()
        return True

    def _planted(self, addresses: set[int]) -> Iterator[Any]:
        for address in addresses:
            try:
                yield self.machine.debug.breakpoint(address, vcpu=self.vcpu)
            except LinearMemoryError:  # what enters there faults at once, which is no handler's deed
                continue

    def _handlers(self, last: Followed) -> Iterator[int]:
        from vmm.observe.descriptors import handlers

        yield from handlers(_processor(self.machine, self.vcpu, last))
        if last.registers["efer"] & _EFER_SCE:
            yield from (self.vcpu.msr(index) for index in (_LSTAR, _CSTAR, _SYSENTER_EIP))

    # ---- what was found ----

    def _result(self, last: Followed) -> Replayed:
        cpu = _processor(self.machine, self.vcpu, last)
        code, _ = cpu.fetch(cpu.rip)
        if self.death.memory is not None:
            then = Processor(last.registers, last.bits, cpu.paging, self.death.memory.read)
            if then.fetch(then.rip)[0] != code:
                raise _Astray("it took another way: it died in code that the first run has not")
        return Replayed(last.registers, last.bits, code)


def _processor(machine: Replayable, vcpu: Any, last: Followed) -> Processor:
    return Processor(last.registers, last.bits, vcpu.paging(last.registers), machine.memory.read)


def _same(event: Exit) -> tuple[object, ...]:
    """What must be equal of an exit in both runs."""
    return event.reason, event.address, event.value, event.size, event.write, event.count
