"""The call stack of a stopped guest, walked in 64-bit mode.

Three ways, the first that holds for a frame: Linux's ORC tables, where the kernel has them (they describe every
instruction); frame pointers; and guessing, which takes every word on the stack that follows a call instruction.

The guest wrote all of it: a walk ends after :data:`FRAMES_MAX` frames, and spends of a budget.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm.observe.budget import Budget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.observe.symbols import Symbols

FRAMES_MAX = 64
_GUESSED_BYTES = 8192  # of stack that guessing looks at: a Linux kernel's is 16 KiB
_ORC_MAX = 4 << 20  # entries; a distribution's kernel has 400,000


class Memory(Protocol):
    """Memory by linear address, as ``vcpu.memory``."""

    def read(self, address: int, size: int, /) -> bytes:
        """``size`` bytes; a ``LookupError`` where nothing is mapped."""


class Frame(NamedTuple):
    """One frame: where it was, its name or "", and how it was found: "rip", "orc", "frame pointer" or "guess"."""

    address: int
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.address:#x} {'? ' if self.how == 'guess' else ''}{self.name}".rstrip()


def walk(registers: Mapping[str, int], memory: Memory, symbols: Symbols, budget: Budget | None = None) -> list[Frame]:
    """The stack of a vCPU with these registers (``rip``, ``rsp``, ``rbp``), innermost frame first.

    ``memory`` reads linear addresses. Frames found by guessing come last, and only where nothing better led on.
    """
    frames = [Frame(registers["rip"], symbols.name(registers["rip"]) or "", "rip")]
    with (budget or Budget()).part("the walk of the stack") as part:
        _walk(frames, registers, _Spending(memory, part), symbols)
    return frames


class _Spending:
    """Memory whose reads are spent of a budget."""

    def __init__(self, memory: Memory, part: Budget) -> None:
        self._memory, self._part = memory, part

    def read(self, address: int, size: int, /) -> bytes:
        self._part.spend(looked=size)
        return self._memory.read(address, size)


def _walk(frames: list[Frame], registers: Mapping[str, int], memory: Memory, symbols: Symbols) -> None:
    """Append the frames behind the first."""
    rip, rsp, rbp = registers["rip"], registers["rsp"], registers["rbp"]
    orc = OrcTables.of_kernel(memory, symbols)
    state: _State | None = _State(rip, rsp, rbp, exact=True)
    while state is not None and len(frames) < FRAMES_MAX:
        step, how = (orc.step(state, memory) if orc else None), "orc"
        if step is None and not (orc and orc.ends(state)):
            step, how = _by_frame_pointer(state, memory), "frame pointer"
        if step is None or (how != "orc" and step.rsp <= state.rsp):  # ORC goes from one stack to another
            break
        frames.append(Frame(step.rip, symbols.name(step.rip) or "", how))
        state = step
        rsp = state.rsp
    if len(frames) == 1:
        for frame in _guesses(rsp, memory, symbols):
            frames.append(frame)


class _State(NamedTuple):
    """Where a frame is; ``exact``: ``rip`` is the next instruction, not the one after a call."""

    rip: int
    rsp: int
    rbp: int
    exact: bool


def _word(memory: Memory, at: int) -> int | None:
    try:
        return int.from_bytes(memory.read(at & (1 << 64) - 1, 8), "little")
    except LookupError:
        return None


def follows_call(memory: Memory, address: int) -> bool:
    """Whether a call instruction ends at ``address``: E8, or FF /2 with any operand (SDM vol. 2, CALL)."""
    try:
        code = memory.read(address - 7, 7)
    except LookupError:
        return False
    if code[2] == 0xE8:
        return True
    for size in (2, 3, 4, 6, 7):
        at = 7 - size
        if code[at] == 0xFF and code[at + 1] >> 3 & 7 == 2 and _modrm_size(code[at + 1], code[at:]) == size:
            return True
    return False


def _modrm_size(modrm: int, code: bytes) -> int:
    mode, low = modrm >> 6, modrm & 7
    if mode == 3:
        return 2
    sib = low == 4
    if mode == 0 and (low == 5 or (sib and len(code) > 2 and code[2] & 7 == 5)):
        return 6 + sib
    return 2 + sib + (0, 1, 4)[mode]


def _by_frame_pointer(state: _State, memory: Memory) -> _State | None:
    if state.rbp < state.rsp or state.rbp % 8:
        return None
    caller, address = _word(memory, state.rbp), _word(memory, state.rbp + 8)
    if caller is None or not address or not follows_call(memory, address):
        return None
    return _State(address, state.rbp + 16, caller, exact=False)


def _guesses(rsp: int, memory: Memory, symbols: Symbols) -> Iterator[Frame]:
    found = 0
    for at in range(rsp & ~7, (rsp & ~7) + _GUESSED_BYTES, 8):
        word = _word(memory, at)
        if word is None or found == FRAMES_MAX:
            break
        name = symbols.name(word)
        if name and follows_call(memory, word):
            found += 1
            yield Frame(word, name, "guess")


# ---- ORC: arch/x86/include/asm/orc_types.h ----

_UNDEFINED, _PREV_SP, _BP, _SP, _BP_INDIRECT, _SP_INDIRECT = 0, 1, 4, 5, 8, 9
_CALL, _REGS, _PARTIAL, _END = "call", "regs", "partial", "end"
# The encoding of the type: in two bits with an end bit above (until Linux 6.3), or in three (since 6.4).
_OLD_TYPES = (_CALL, _REGS, _PARTIAL)
_NEW_TYPES = (_END, _END, _CALL, _REGS, _PARTIAL)
# struct pt_regs: rbp, rip and rsp
_REGS_RBP, _REGS_RIP, _REGS_RSP = 32, 128, 152


class OrcTables:
    """A Linux kernel's unwind tables, read entry by entry where they are."""

    def __init__(self, memory: Memory, ips: int, entries: int, count: int) -> None:
        self._memory = memory
        self._ips, self._entries, self._count = ips, entries, count
        sample = [self._raw(n * count // 64)[3] & 7 for n in range(64)]
        self._new = sample.count(2) > sample.count(0)

    @classmethod
    def of_kernel(cls, memory: Memory, symbols: Symbols) -> OrcTables | None:
        """Where the kernel's symbols say they are; ``None`` without, or when they make no sense."""
        names = ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", "__start_orc_unwind")
        start, stop, entries = map(symbols.address, names)
        if start is None or stop is None or entries is None or not 0 < (stop - start) // 4 <= _ORC_MAX:
            return None
        try:
            return cls(memory, start, entries, (stop - start) // 4)
        except LookupError:
            return None

    def _ip(self, n: int) -> int:
        at = self._ips + 4 * n
        return at + int.from_bytes(self._memory.read(at, 4), "little", signed=True)

    def _raw(self, n: int) -> tuple[int, int, int, int]:
        sp_offset, bp_offset, registers, kind = struct.unpack("<hhBB", self._memory.read(self._entries + 6 * n, 6))
        return sp_offset, bp_offset, registers, kind

    def _find(self, address: int) -> tuple[int, int, int, int] | None:
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if self._ip(middle) <= address:
                low = middle + 1
            else:
                high = middle
        return self._raw(low - 1) if low else None

    def _entry(self, state: _State) -> tuple[int, int, int, str] | None:
        # After a call the next instruction may be another function's: look up the call.
        try:
            found = self._find(state.rip if state.exact else state.rip - 1)
        except LookupError:
            return None
        if found is None:
            return None
        sp_offset, bp_offset, registers, bits = found
        if self._new:
            kind = _NEW_TYPES[bits & 7] if bits & 7 < len(_NEW_TYPES) else _END
        else:
            kind = _END if bits & 4 or bits & 3 == 3 else _OLD_TYPES[bits & 3]
        return sp_offset, bp_offset, registers, kind

    def ends(self, state: _State) -> bool:
        """Whether the tables say that this is the outermost frame."""
        entry = self._entry(state)
        return entry is not None and entry[3] == _END and entry[2] & 15 == _UNDEFINED

    def step(self, state: _State, memory: Memory) -> _State | None:
        """The caller's frame, or ``None`` at the end of the stack and where the tables do not say."""
        entry = self._entry(state)
        if entry is None or entry[3] == _END:
            return None
        sp_offset, bp_offset, registers, kind = entry
        base = self._base(state, memory, registers & 15, sp_offset)
        if base is None:
            return None
        rip: int | None
        rsp: int | None
        if kind == _CALL:
            rip, rsp = _word(memory, base - 8), base
        elif kind == _REGS:
            rip, rsp = _word(memory, base + _REGS_RIP), _word(memory, base + _REGS_RSP)
        else:
            rip, rsp = _word(memory, base), _word(memory, base + 24)
        rbp = self._frame_pointer(state, memory, registers >> 4, bp_offset, base)
        if kind == _REGS:
            rbp = _word(memory, base + _REGS_RBP)
        if not rip or rsp is None:
            return None
        return _State(rip, rsp, state.rbp if rbp is None else rbp, exact=kind != _CALL)

    @staticmethod
    def _base(state: _State, memory: Memory, register: int, offset: int) -> int | None:
        if register == _SP:
            return state.rsp + offset
        if register == _BP:
            return state.rbp + offset
        if register == _BP_INDIRECT:
            return _word(memory, state.rbp + offset)
        if register == _SP_INDIRECT:
            word = _word(memory, state.rsp)
            return None if word is None else word + offset
        return None  # registers that the walk does not follow

    @staticmethod
    def _frame_pointer(state: _State, memory: Memory, register: int, offset: int, base: int) -> int | None:
        if register == _PREV_SP:
            return _word(memory, base + offset)
        if register == _BP:
            return _word(memory, state.rbp + offset)
        return None
