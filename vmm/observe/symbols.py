"""Addresses to names and lines: from ELF files, from System.map, from a Linux kernel's own memory.

    symbols = Symbols.open("vmlinux")              an ELF file, or a System.map by its looks
    symbols = Symbols.of_kernel(machine.memory)    a stripped kernel that runs: its kallsyms

``name(address)`` is ``"start_kernel+0x3e"``; ``address("start_kernel")`` the other way; ``line(address)`` a file and a
line where there is DWARF.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError
from vmm.observe.budget import Budget

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.memory import GuestMemory
    from vmm.observe.kallsyms import Kallsyms

_FAR = 0x1000  # how far past the start of a symbol without a size an address still belongs to it
_PROGRAM_MAX = 1 << 18  # bytes of one unit's line program: each of them can be a row
_ROW_COST, _ENTRY_COST = 24, 200  # bytes that a row or a symbol takes here, about: few rows are of one byte
_SAME_MAX = 64  # symbols at one address that are compared
_GIVE = "give a vmlinux that is not stripped, or its System.map"
_HEX = frozenset("0123456789abcdefABCDEF")


class Symbols:
    """Names of one program, by address. ``origin`` says where they come from; ``build_id`` is that of an ELF file, or
    ``b""``."""

    def __init__(self, entries: Iterable[tuple[int, int, str]], origin: str, *, build_id: bytes = b"") -> None:
        """``entries``: (address, size or 0, name)."""
        self._entries: Sequence[tuple[int, int, str]] = sorted(entries)
        self._addresses: Sequence[int] = [address for address, _, _ in self._entries]
        self._by_name: dict[str, int] | None = None
        self._lines: Any = None
        self.origin = origin
        self.path: str | None = None
        self.build_id = build_id
        self.notes: tuple[int, bytes] | None = None  # where the program has its ELF notes in memory, and what they are

    @classmethod
    def open(cls, path: str) -> Symbols:
        """Of an ELF file's ``.symtab`` or of a ``System.map``. Raises :class:`~vmm.errors.ConfigError`."""
        try:
            with open(path, "rb") as file:
                head = file.read(4)
        except OSError as error:
            raise ConfigError(f"cannot read symbols from {path}: {error.strerror}") from error
        symbols = cls.of_elf(path) if head == b"\x7fELF" else cls.of_map(path)
        if not symbols:
            raise ConfigError(f"{path} has no symbols: {_GIVE}")
        return symbols

    @staticmethod
    def check(path: str) -> None:
        """What :meth:`open` would refuse at a first look, which costs no more than that. Raises
        :class:`~vmm.errors.ConfigError`."""
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile

        try:
            with open(path, "rb") as file:
                line = file.readline(4096)
                there = bool(ELFFile(file).get_section_by_name(".symtab")) if line[:4] == b"\x7fELF" else bool(line)
        except OSError as error:
            raise ConfigError(f"cannot read symbols from {path}: {error.strerror}") from error
        except (ELFError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{path} is a damaged ELF file: {error}") from error
        if not there:
            raise ConfigError(f"{path} has no symbols: {_GIVE}")
        if line[:4] != b"\x7fELF":
            _map_line(path, line.decode(errors="replace"))

    @classmethod
    def of_elf(cls, path: str, budget: Budget | None = None) -> Symbols:
        """Of an ELF file; none at all where it has no symbol table, or is damaged. Without a budget the file is one
        that a person has given for its symbols."""
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        found: list[tuple[int, int, str]] = []
        build_id, notes = b"", None
        limits = budget or Budget(math.inf, 1 << 62, 1 << 62)
        try:
            with open(path, "rb") as file, limits.part("reading the image's symbols") as part:
                elf = ELFFile(file)
                build_id, notes = _notes(elf)
                table = elf.get_section_by_name(".symtab")
                for symbol in table.iter_symbols() if isinstance(table, SymbolTableSection) else ():
                    if symbol["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE") and symbol.name:
                        part.spend(kept=len(symbol.name) + _ENTRY_COST)
                        found.append((symbol["st_value"], symbol["st_size"], symbol.name))
        except Exception:  # pyelftools raises whatever a damaged file makes it stumble over
            found = []
        symbols = cls(found, path, build_id=build_id)
        symbols.path, symbols.notes = path, notes
        return symbols

    @classmethod
    def of_map(cls, path: str) -> Symbols:
        """Of a ``System.map``, as ``nm -n`` prints: lines of address, type letter and name."""
        with open(path, errors="replace") as file:
            return cls([_map_line(path, line) for line in file], path)

    @classmethod
    def of_kernel(cls, memory: GuestMemory, budget: Budget | None = None) -> Symbols | None:
        """Of a Linux kernel in guest memory, by its own kallsyms; ``None`` where there are none."""
        from vmm.observe import kallsyms

        found = kallsyms.find(memory, budget)
        return None if found is None else _KernelSymbols(found)

    def __len__(self) -> int:
        return len(self._entries)

    # ---- looking up ----

    def find(self, address: int) -> tuple[str, int] | None:
        """The symbol that ``address`` is in, and how far; of several at one place the one with a size, then a name
        that is not a label's."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0:
            return None
        start = self._addresses[at]
        same = self._entries[at]
        for _ in range(min(at, _SAME_MAX)):
            at -= 1
            if self._addresses[at] != start:
                break
            if _rank(self._entries[at]) >= _rank(same):
                same = self._entries[at]
        offset = address - start
        if offset >= (same[1] or _FAR) and offset >= _FAR:
            return None
        return same[2], offset

    def name(self, address: int) -> str | None:
        """``symbol+0x10`` for an address inside or just after a symbol, else ``None``."""
        found = self.find(address)
        if found is None:
            return None
        name, offset = found
        return f"{name}+{offset:#x}" if offset else name

    def address(self, name: str) -> int | None:
        """Where ``name`` is; the lowest place of several."""
        if self._by_name is None:
            self._by_name = {name: address for address, _, name in reversed(self._entries)}
        return self._by_name.get(name)

    def line(self, address: int, budget: Budget | None = None) -> tuple[str, int] | None:
        """Source file and line, from the DWARF of an ELF file; ``None`` where there is none for ``address``."""
        if self._lines is None:
            self._lines = _line_table(self.path, budget or Budget()) if self.path else []
        at = bisect_right(self._lines, (address, "\U0010ffff", 0)) - 1
        if at < 0 or self._lines[at][2] == 0:  # 0 ends a sequence
            return None
        return self._lines[at][1], self._lines[at][2]

    # ---- whose they are ----

    def mismatch(self, memory: Any) -> str | None:
        """A sentence, if the kernel in memory was not built with this ELF file: its notes say another build-id.

        ``memory`` reads linear addresses (``vcpu.memory``). ``None``: they agree, or nothing can be said.
        """
        if self.notes is None or not self.build_id:
            return None
        address, expected = self.notes
        try:
            there = memory.read(address, len(expected))
        except LookupError:
            return None
        if there == expected:
            return None
        running = _build_id(there)
        said = f"has build-id {running.hex()}" if running else "has none where this one has"
        return f"{self.path} is of another kernel: the one that runs {said}, the file {self.build_id.hex()}"


class _KernelSymbols(Symbols):
    """Those of kallsyms, which stay packed."""

    def __init__(self, found: Kallsyms) -> None:
        super().__init__((), "kallsyms in guest memory")
        self._entries = _Sizeless(found)
        self._addresses = found.addresses
        self._found = found

    def address(self, name: str) -> int | None:
        return self._found.address(name)


class _Sizeless(Sequence[tuple[int, int, str]]):
    """Entries of a table that has no sizes."""

    def __init__(self, found: Kallsyms) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, at: Any) -> Any:
        address, _, name = self._found[at]
        return address, 0, name


def _map_line(path: str, line: str) -> tuple[int, int, str]:
    words = line.split()
    if len(words) < 3 or not set(words[0]) <= _HEX or len(words[0]) > 16 or len(words[1]) != 1:
        raise ConfigError(f"{path} is neither an ELF file nor a System.map: {line.strip()[:60]!r}; {_GIVE}")
    return int(words[0], 16), 0, words[2]


def _rank(entry: tuple[int, int, str]) -> tuple[bool, bool]:
    return entry[1] > 0, not entry[2].startswith((".", "__pfx_", "$"))


def _notes(elf: Any) -> tuple[bytes, tuple[int, bytes] | None]:
    for section in elf.iter_sections():
        if section["sh_type"] == "SHT_NOTE" and (build_id := _build_id(section.data())):
            return build_id, ((section["sh_addr"], section.data()) if section["sh_addr"] else None)
    return b"", None


def _build_id(notes: bytes) -> bytes:
    """The NT_GNU_BUILD_ID among ELF notes (gABI, "Note Section": name size, description size, type, 4-aligned)."""
    at = 0
    while at + 12 <= len(notes):
        name, size, kind = (int.from_bytes(notes[at + n : at + n + 4], "little") for n in (0, 4, 8))
        description = at + 12 + name + -name % 4
        if kind == 3 and notes[at + 12 : at + 12 + name] == b"GNU\0" and 0 < size <= 64:
            return notes[description : description + size]
        at = description + size + -size % 4
    return b""


def _line_table(path: str, budget: Budget) -> list[tuple[int, str, int]]:
    """``(address, file, line)`` of every row of the DWARF line programs, by address; line 0 ends a sequence."""
    from elftools.elf.elffile import ELFFile

    rows: list[tuple[int, str, int]] = []
    try:
        with open(path, "rb") as file, budget.part("reading the image's line tables") as part:
            elf = ELFFile(file)
            if not elf.has_dwarf_info():
                return rows
            dwarf = elf.get_dwarf_info()
            for unit in dwarf.iter_CUs():
                part.spend()
                program = dwarf.line_program_for_CU(unit)
                if program is not None and program["unit_length"] <= _PROGRAM_MAX:
                    part.spend(kept=program["unit_length"] * _ROW_COST)
                    rows += _rows(program)
    except Exception:  # as above
        return []
    rows.sort(key=lambda row: (row[0], row[2] != 0))
    return rows


def _rows(program: Any) -> Iterable[tuple[int, str, int]]:
    files = program["file_entry"]
    first = 0 if program["version"] >= 5 else 1
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        index = state.file - first
        name = files[index].name.decode(errors="replace") if 0 <= index < len(files) else "?"
        yield state.address, name, 0 if state.end_sequence else state.line
