"""Addresses to names, from an ELF file's symbol table (pyelftools)."""

from __future__ import annotations

from bisect import bisect_right


class Symbols:
    """Functions and objects of one ELF file, by address."""

    def __init__(self, path: str) -> None:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        entries: list[tuple[int, int, str]] = []
        try:
            with open(path, "rb") as file:
                table = ELFFile(file).get_section_by_name(".symtab")
                for symbol in table.iter_symbols() if isinstance(table, SymbolTableSection) else ():
                    if symbol["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE") and symbol.name:
                        entries.append((symbol["st_value"], symbol["st_size"], symbol.name))
        except (OSError, ELFError, UnicodeDecodeError):
            entries = []  # an image without usable symbols has none
        entries.sort()
        self._entries = entries
        self._addresses = [address for address, _, _ in entries]

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, address: int) -> str | None:
        """``symbol+0x10`` for an address inside or just after a symbol, else None."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0:
            return None
        start, size, name = self._entries[at]
        offset = address - start
        if offset >= max(size, 0x1000):
            return None
        return f"{name}+{offset:#x}" if offset else name
