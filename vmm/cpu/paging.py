"""The guest's page tables, walked as the processor walks them (SDM vol. 3, chapter 4), and memory by linear address.

A walk is pure: registers and a ``read(gpa, n)`` in, a :class:`Translation` or a :class:`PageFault` out, both naming
every entry that was read. It sets no accessed or dirty flags. Not looked at: protection keys and shadow stacks
(both only take rights away), and the copies of the four PDPTEs that a processor in PAE paging keeps from the last
load of CR3 (memory is read instead).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.errors import ConfigError, GuestMemoryError, LinearMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmm.memory import GuestMemory

PAGE = 4096

CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
RFLAGS_AC = 1 << 18

_P, _W, _U, _PS = 1, 2, 4, 0x80
_NX = 1 << 63
_ADDRESS = 0x000FFFFFFFFFF000

_NAMES = ("", "PTE", "PDE", "PDPTE", "PML4E", "PML5E")


class Mode(NamedTuple):
    """A paging mode (SDM vol. 3, table 4-1): its name, how many levels, how an index and an entry are sized."""

    name: str
    levels: int
    index_bits: int
    entry_size: int


MODES = {
    "none": Mode("none", 0, 0, 0),
    "32-bit": Mode("32-bit", 2, 10, 4),
    "pae": Mode("pae", 3, 9, 8),
    "4-level": Mode("4-level", 4, 9, 8),
    "5-level": Mode("5-level", 5, 9, 8),
}


class Entry(NamedTuple):
    """One paging-structure entry as it was read: its ``level`` ("PML5E" to "PTE"), where it lies, what it held."""

    level: str
    gpa: int
    value: int


class Translation:
    """Translation of a linear address: ``gpa``, the ``size`` of its page in bytes, and the combined rights.

    ``entries`` are those the walk read, outermost first; without paging there are none and everything is permitted.
    """

    __slots__ = ("entries", "executable", "gpa", "linear", "size", "user", "writable")

    def __init__(
        self, linear: int, gpa: int, size: int, entries: list[Entry], *, user: bool, writable: bool, executable: bool
    ) -> None:
        self.linear = linear
        self.gpa = gpa
        self.size = size
        self.entries = entries
        self.user = user
        self.writable = writable
        self.executable = executable

    def __repr__(self) -> str:
        rights = f"{'u' if self.user else 's'}r{'w' if self.writable else '-'}{'x' if self.executable else '-'}"
        return f"<{self.linear:#x} -> {self.gpa:#x} {rights} in a page of {self.size:#x}>"


class PageFault:
    """Why a linear address is not mapped, or not for this access.

    ``kind`` is one of "not-present", "reserved", "write", "user", "execute", "smep", "smap", "non-canonical" and
    "table" (a paging structure that lies outside RAM). ``entries`` end with the entry that decided, where there is
    one; for a missing right that is the outermost that takes it away.
    """

    __slots__ = ("detail", "entries", "kind", "linear")

    def __init__(self, linear: int, kind: str, detail: str, entries: list[Entry]) -> None:
        self.linear = linear
        self.kind = kind
        self.detail = detail
        self.entries = entries

    @property
    def entry(self) -> Entry | None:
        """The entry that decided, or ``None``."""
        return self.entries[-1] if self.entries else None

    @property
    def level(self) -> str:
        """Its level, or an empty string."""
        return self.entries[-1].level if self.entries else ""

    @property
    def sentence(self) -> str:
        """What is wrong, where, with the values."""
        at = self.entry
        where = f"the {at.level} at {at.gpa:#x} is {at.value:#x}: " if at else ""
        return f"linear address {self.linear:#x}: {where}{self.detail}"

    def __repr__(self) -> str:
        return f"<PageFault {self.kind}: {self.sentence}>"


class Paging:
    """The paging mode that a vCPU's registers select, ready to :meth:`walk`.

    ``registers`` need ``cr0``, ``cr3``, ``cr4``, ``efer`` and ``rflags`` (as ``Vcpu.registers()`` gives them).
    ``physical_bits`` is MAXPHYADDR: address bits from there on are reserved. ``gigabyte_pages``: whether a PDPTE may
    map a page (CPUID.80000001H:EDX[26]).
    """

    def __init__(self, registers: Mapping[str, int], *, physical_bits: int = 52, gigabyte_pages: bool = True) -> None:
        cr0, self.cr4, self.efer = registers["cr0"], registers["cr4"], registers["efer"]
        self.cr3 = registers["cr3"]
        self.physical_bits = physical_bits
        self.gigabyte_pages = gigabyte_pages
        self.write_protect = bool(cr0 & CR0_WP)
        self.alignment_check = bool(registers.get("rflags", 0) & RFLAGS_AC)
        if not cr0 & CR0_PG:
            name = "none"
        elif self.efer & EFER_LMA:
            name = "5-level" if self.cr4 & CR4_LA57 else "4-level"
        else:
            name = "pae" if self.cr4 & CR4_PAE else "32-bit"
        self.mode = MODES[name]

    @property
    def linear_bits(self) -> int:
        """Width of a linear address: 32, 48 or 57."""
        return {"4-level": 48, "5-level": 57}.get(self.mode.name, 32)

    def canonical(self, linear: int) -> bool:
        """Whether ``linear`` (0 to 2^64-1) is an address at all: the bits above the width copy its topmost one."""
        if self.efer & EFER_LMA:
            upper = linear >> (self.linear_bits - 1)
            return upper in (0, (1 << (65 - self.linear_bits)) - 1)
        return linear >> 32 == 0

    def walk(
        self, read: Callable[[int, int], bytes], linear: int, access: str | None = None, *, user: bool = False
    ) -> Translation | PageFault:
        """Translate one address. ``access`` "read", "write" or "fetch" is checked against the rights of CPL 3
        (``user``) or the supervisor; ``None`` asks only where the page is.

        ``read(gpa, n)`` returns ``n`` bytes of RAM or raises ``IndexError``.
        """
        if not self.canonical(linear):
            detail = f"not canonical: a linear address has {self.linear_bits} bits here"
            return PageFault(linear, "non-canonical", detail, [])
        if not self.mode.levels:
            return Translation(linear, linear, PAGE, [], user=True, writable=True, executable=True)
        entries: list[Entry] = []
        for level, gpa in self._places(linear, entries):
            try:
                value = int.from_bytes(read(gpa, self.mode.entry_size), "little")
            except IndexError:
                detail = f"the {_NAMES[level]} should be at {gpa:#x}, which is not RAM"
                return PageFault(linear, "table", detail, entries)
            entries.append(Entry(_NAMES[level], gpa, value))
            if not value & _P:
                return PageFault(linear, "not-present", "not present", entries)
            reserved = value & self._reserved(level, value)
            if reserved:
                bits = ", ".join(str(bit) for bit in range(64) if reserved >> bit & 1)
                return PageFault(linear, "reserved", f"reserved bits set: {bits}", entries)
            if self._maps_page(level, value):
                break
        shift = 12 + self.mode.index_bits * (level - 1)
        offset = (1 << shift) - 1
        translation = self._translation(linear, (self._page(entries[-1].value, shift) & ~offset) | linear & offset,
                                        1 << shift, entries)  # fmt: skip
        return (self._forbidden(translation, access, user) if access else None) or translation

    def behind(self, found: Translation | PageFault) -> int:
        """Return the first address after what a walk found: a page, or the range that an entry leaves unmapped."""
        if isinstance(found, PageFault):
            if found.kind == "non-canonical":
                return (1 << 64) - (1 << self.linear_bits - 1 if self.efer & EFER_LMA else 0)
            level = self.mode.levels - len(found.entries) + (found.kind != "table")
            size = 1 << 12 + self.mode.index_bits * (level - 1)
        else:
            size = found.size
        return (found.linear & ~(size - 1)) + size

    def _places(self, linear: int, entries: list[Entry]) -> Iterator[tuple[int, int]]:
        """(level, gpa of the entry) down the levels; each from the entry the caller found at the last."""
        mode = self.mode
        table = self.cr3 & (_ADDRESS if mode.levels > 3 else 0xFFFFFFE0 if mode.levels == 3 else 0xFFFFF000)
        for level in range(mode.levels, 0, -1):
            shift = 12 + mode.index_bits * (level - 1)
            index = linear >> shift & (1 << mode.index_bits) - 1
            yield level, table + index * mode.entry_size
            table = entries[-1].value & (_ADDRESS if mode.entry_size == 8 else 0xFFFFF000)

    def _maps_page(self, level: int, value: int) -> bool:
        if level == 1:
            return True
        if level == 2:
            return bool(value & _PS) and (self.mode.entry_size == 8 or bool(self.cr4 & CR4_PSE))
        return level == 3 and bool(value & _PS) and self.mode.levels > 3

    def _reserved(self, level: int, value: int) -> int:
        """Bits that must be 0 in a present entry (SDM vol. 3, tables 4-4 to 4-20)."""
        maps = self._maps_page(level, value)
        if self.mode.entry_size == 4:
            # PSE-36: bits 20:13 are address bits 39:32, as far as MAXPHYADDR goes
            return (1 << 22) - (1 << max(13, min(self.physical_bits, 40) - 19)) if maps and level == 2 else 0
        above = (1 << 52) - (1 << self.physical_bits)
        if self.mode.name == "pae":
            if level == 3:
                return (1 << 64) - (1 << self.physical_bits) | 0x1E6
            above |= (1 << 63) - (1 << 52)
        reserved = above if self.efer & EFER_NXE else above | _NX
        if level > 3 or (level == 3 and not self.gigabyte_pages):
            return reserved | _PS
        if maps and level > 1:
            return reserved | (1 << 12 + 9 * (level - 1)) - (1 << 13)
        return reserved

    def _page(self, value: int, shift: int) -> int:
        if self.mode.entry_size == 8:
            return value & _ADDRESS
        return (value & 0xFFC00000) | (value >> 13 & 0xFF) << 32 if shift == 22 else value & 0xFFFFF000

    def _deciding(self, entries: list[Entry]) -> list[Entry]:
        """The entries that carry rights: in PAE paging a PDPTE has none."""
        return entries[1:] if self.mode.name == "pae" else entries

    def _translation(self, linear: int, gpa: int, size: int, entries: list[Entry]) -> Translation:
        every, some = -1, 0
        for entry in self._deciding(entries):
            every &= entry.value
            some |= entry.value
        nx = self.mode.entry_size == 8 and bool(some & _NX)
        return Translation(
            linear, gpa, size, entries, user=bool(every & _U), writable=bool(every & _W), executable=not nx
        )

    def _forbidden(self, t: Translation, access: str, user: bool) -> PageFault | None:
        """SDM vol. 3, 4.6.1."""

        def fault(kind: str, detail: str, flag: int, wanted: bool) -> PageFault:
            decided = next(i for i, entry in enumerate(t.entries)
                           if entry in self._deciding(t.entries) and bool(entry.value & flag) == wanted)  # fmt: skip
            return PageFault(t.linear, kind, detail, t.entries[: decided + 1])

        if user and not t.user:
            return fault("user", f"{access} by CPL 3 of a supervisor page", _U, False)
        if access == "fetch":
            if not t.executable:
                return fault("execute", "execution of a page marked no-execute", _NX, True)
            if not user and t.user and self.cr4 & CR4_SMEP:
                return PageFault(t.linear, "smep", "execution by the supervisor of a user page (SMEP)", t.entries)
            return None
        if not user and t.user and self.cr4 & CR4_SMAP and not self.alignment_check:
            return PageFault(t.linear, "smap", f"{access} by the supervisor of a user page (SMAP)", t.entries)
        if access == "write" and not t.writable and (user or self.write_protect):
            return fault("write", "write to a read-only page", _W, False)
        return None


class LinearMemory:
    """Guest memory by linear address, as a debugger sees it: what is mapped is read and written whatever its rights.

    Addresses are linear: where segments have a base (real mode), the caller has added it. Both wrap at 2^64, or at
    2^32 outside long mode, as the processor's do.
    """

    __slots__ = ("_paging", "_ram")

    def __init__(self, ram: GuestMemory, paging: Callable[[], Paging]) -> None:
        self._ram = ram
        self._paging = paging

    def walk(self, linear: int, access: str | None = None, *, user: bool = False) -> Translation | PageFault:
        """Translate one address through the page tables in force now; see :meth:`Paging.walk`."""
        return self._paging().walk(self._ram.read, linear, access, user=user)

    def read(self, linear: int, size: int) -> bytes:
        """Return a copy of ``size`` bytes.

        Raises :class:`~vmm.errors.LinearMemoryError` naming the first address that is not mapped, and its level.
        """
        return b"".join(self._ram.read(gpa, n) for gpa, n in self._parts(linear, size))

    def write(self, linear: int, data: bytes) -> None:
        """Store ``data``: all of it or, when part is not mapped (:class:`~vmm.errors.LinearMemoryError`), nothing."""
        at = 0
        for gpa, n in list(self._parts(linear, len(data))):
            self._ram.write(gpa, data[at : at + n])
            at += n

    def view(self, linear: int, size: int) -> memoryview:
        """A writable view of ``size`` bytes, no copy: of the memory that the page tables lead to now.

        Raises :class:`~vmm.errors.LinearMemoryError` for what is not mapped, and where a page does not lie behind the
        one before it in guest-physical memory too: :meth:`read` takes those together.
        """
        parts = list(self._parts(linear, size))
        first = end = parts[0][0] if parts else 0
        for gpa, n in parts:
            if gpa != end:
                where = f"linear address {linear + end - first:#x}: its page, {gpa:#x}, is not behind the one before it"
                raise LinearMemoryError(
                    linear + end - first, f"{where}, and a view is of one stretch: read() copies both"
                )
            end += n
        return self._ram.view(first, end - first)

    def array(self, linear: int, size: int, dtype: str = "u1") -> Any:
        """Return a numpy array over :meth:`view`, which shares the guest's memory."""
        import numpy

        return numpy.frombuffer(self.view(linear, size), dtype=dtype)

    def search(
        self, pattern: bytes, start: int, end: int, *, spend: Callable[[int], object] | None = None
    ) -> int | None:
        """The lowest address in ``[start, end)`` where ``pattern`` stands, wherever its pages lie, or ``None``.

        What is not mapped is passed over, so the cost is that of the pages which are; a guest can map one of them at
        all addresses. ``spend(n)`` is called for each ``n`` bytes that were looked at, and may end the search by
        raising. Raises :class:`~vmm.errors.ConfigError` for a range that is none.
        """
        if not 0 <= start <= end <= 1 << 64:
            raise ConfigError(f"search from {start:#x} to {end:#x}: give a range of addresses, 2^64 at most")
        paging = self._paging()
        before = b""  # possible start of a match
        while start < end:
            found = paging.walk(self._ram.read, start, None)
            behind = min(paging.behind(found), end)
            while isinstance(found, Translation) and start < behind:
                n = min(PAGE - start % PAGE, behind - start)
                try:
                    before += self._ram.read(found.gpa + start - found.linear, n)
                except GuestMemoryError:
                    before = b""
                if spend is not None:
                    spend(n)
                if (at := before.find(pattern)) >= 0:
                    return start + n - len(before) + at
                before = before[max(0, len(before) - len(pattern) + 1) :]
                start += n
            if isinstance(found, PageFault):
                before, start = b"", behind
        return None

    def readable(self, linear: int, size: int) -> int:
        """Return how many of ``size`` bytes from ``linear`` on can be read."""
        found = 0
        try:
            for _, n in self._parts(linear, size):
                found += n
        except LinearMemoryError:
            pass
        return found

    def _parts(self, linear: int, size: int) -> Iterator[tuple[int, int]]:
        """(gpa, bytes) page by page; each is RAM."""
        paging = self._paging()
        wrap = (1 << 64 if paging.efer & EFER_LMA else 1 << 32) - 1
        while size > 0:
            found = paging.walk(self._ram.read, linear, None)
            if isinstance(found, PageFault):
                raise LinearMemoryError(linear, found.sentence)
            n = min(size, PAGE - linear % PAGE)
            try:
                self._ram.read(found.gpa, 1)  # RAM is there by pages
            except GuestMemoryError as error:
                where = f"linear address {linear:#x}: mapped to {found.gpa:#x}, which is not RAM"
                raise LinearMemoryError(linear, where) from error
            yield found.gpa, n
            linear = (linear + n) & wrap
            size -= n
