"""Where a guest spends its time: samples of every vCPU's RIP, or of its whole stack.

    with machine.profile(hz=100) as profile:
        machine.run(timeout=10)
    print(profile.table())

A sample pauses the machine, reads registers, and resumes: tens of microseconds in which no vCPU runs, and a kick for
each of them. The guest's own clocks continue meanwhile. A sample falls where the guest can be paused, between two
instructions: an exit that takes long is counted at the instruction behind it. A halted vCPU is found behind its HLT.
"""

from __future__ import annotations

import select
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from vmm.cpu.paging import PAGE, LinearMemory
from vmm.errors import ConfigError, VmmError
from vmm.observe import stack
from vmm.observe.recording import in_words
from vmm.observe.symbols import Symbols
from vmm.printable import printable

if TYPE_CHECKING:
    from types import TracebackType

    from vmm.cpu.paging import Paging
    from vmm.memory import GuestMemory
    from vmm.observe.subject import Traced

HZ_MAX = 10_000
PLACES_MAX = 1 << 17  # different stacks that are told apart; more are counted as one
_RETRY = 1.0  # seconds between two searches for a kernel's own symbols, which stacks need
_ELSEWHERE = (0,)


class Profile:
    """Samples, from its making until :meth:`stop`, on a thread of its own that sleeps in between.

    ``stacks``: walk each stack (64-bit guests; see :mod:`vmm.observe.stack`), which takes longer. ``samples``: how
    many; ``counts``: by (vCPU, addresses from the innermost out); ``paused``: seconds in which the machine stood
    still for them. Raises :class:`~vmm.errors.ConfigError` for a frequency that cannot be.
    """

    def __init__(self, machine: Traced, hz: float = 100.0, *, stacks: bool = False) -> None:
        if not 0 < hz <= HZ_MAX:
            raise ConfigError(f"{hz:g} samples a second: give more than 0, {HZ_MAX} at most")
        self._machine = machine
        self._period = 1 / hz
        self._stacks = stacks
        self._asked = threading.Event()
        self._symbols = Symbols([], "nowhere")
        self._search_at = 0.0
        self._names: dict[int, str] = {}
        self.counts: dict[tuple[int, tuple[int, ...]], int] = {}
        self.samples = 0
        self.paused = 0.0
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="profile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling, and resolve symbols while the machine is still open. Idempotent."""
        self._asked.set()
        self._thread.join()
        symbols = self._machine.symbols
        for _, addresses in self.counts:
            for address in addresses:
                if address not in self._names:
                    name = symbols.name(address) or f"{address:#x}"
                    self._names[address] = printable(name.partition("+")[0])

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- sampling ----

    def _run(self) -> None:
        began = due = time.monotonic()
        while not self._asked.is_set():
            due = max(due + self._period, time.monotonic())  # a host that is behind takes fewer, not all at once
            try:
                if select.select([self._machine.stop_fd], [], [], max(0.0, due - time.monotonic()))[0]:
                    break
                if self._machine.running:
                    self._sample()
            except (VmmError, ValueError, OSError):  # closed meanwhile
                break
        self.seconds = time.monotonic() - began

    def _sample(self) -> None:
        if self._stacks and not self._symbols and time.monotonic() >= self._search_at:
            self._symbols = self._machine.symbols  # which may take long: not while the guest waits
            self._search_at = time.monotonic() + _RETRY
        began = time.perf_counter()
        self._machine.pause()
        try:
            found = [(vcpu.number, self._addresses(vcpu.number)) for vcpu in self._machine.vcpus]
        finally:
            self._machine.resume()
        self.paused += time.perf_counter() - began
        self.samples += 1
        for key in found:
            if key not in self.counts and len(self.counts) >= PLACES_MAX:
                key = key[0], _ELSEWHERE
            self.counts[key] = self.counts.get(key, 0) + 1

    def _addresses(self, number: int) -> tuple[int, ...]:
        vcpu = self._machine.vcpus[number]
        registers, bits = vcpu.registers(), vcpu.bits
        if self._stacks and bits == 64:
            memory = _Pages(self._machine.memory, vcpu.paging())
            with suppress(LookupError):
                return tuple(frame.address for frame in stack.walk(registers, memory, self._symbols))
        base = 0 if bits == 64 else registers["cs_base"]
        return ((registers["rip"] + base) & ((1 << 64) - 1),)

    # ---- results ----

    def name(self, address: int) -> str:
        """A symbol without offset, or the address; "(elsewhere)" stands for what there was no room for."""
        return self._names.get(address, f"{address:#x}") if address else "(elsewhere)"

    def totals(self) -> list[tuple[str, int, int]]:
        """(symbol, samples in it, samples in it or what it called), the most frequent first. After :meth:`stop`."""
        own: dict[str, int] = {}
        whole: dict[str, int] = {}
        for (_, addresses), n in self.counts.items():
            names = [self.name(address) for address in addresses]
            own[names[0]] = own.get(names[0], 0) + n
            for name in set(names):
                whole[name] = whole.get(name, 0) + n
        rows = [(name, own.get(name, 0), n) for name, n in whole.items()]
        return sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))

    def table(self, top: int = 30) -> str:
        """The most frequent symbols as text that ends in a newline, and what sampling cost."""
        taken = sum(self.counts.values())
        each = in_words(int(1e9 * self.paused / self.samples)) if self.samples else "0 ns"
        share = 100 * self.paused / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.samples} samples in {self.seconds:.3g} s; each paused the guest for {each}, {share:.2g}% in all"
        ]
        lines += ["", f"{'self':>8} {'':6} {'total' if self._stacks else '':>8}  symbol"]
        for name, own, whole in self.totals()[:top]:
            lines.append(f"{own:8} {100 * own / taken:5.1f}% {whole if self._stacks else '':>8}  {name}")
        return "\n".join(lines) + "\n"

    def folded(self) -> str:
        """Stacks as flamegraph.pl and speedscope read them: ``vcpu0;outer;inner count``, a line each."""
        lines: dict[str, int] = {}
        for (vcpu, addresses), n in self.counts.items():
            key = ";".join([f"vcpu{vcpu}", *(self.name(a).replace(";", ":") for a in reversed(addresses))])
            lines[key] = lines.get(key, 0) + n
        return "".join(f"{key} {n}\n" for key, n in sorted(lines.items()))


class _Pages:
    """Linear memory for one walk: a stack is read word by word, its pages are looked up and copied once."""

    def __init__(self, ram: GuestMemory, paging: Paging) -> None:
        self._memory = LinearMemory(ram, lambda: paging)
        self._pages: dict[int, bytes] = {}

    def read(self, address: int, size: int, /) -> bytes:
        page, at = address & ~(PAGE - 1), address & (PAGE - 1)
        if at + size > PAGE:
            return self._memory.read(address, size)
        if page not in self._pages:
            self._pages[page] = self._memory.read(page, PAGE)
        return self._pages[page][at : at + size]
