"""A processor that stopped, as the questions about its death need it: registers, and memory as it saw it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.cpu.paging import PageFault, Paging, Translation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAGE = 4096
CODE_MAX = 15  # bytes of one instruction, SDM vol. 2, 2.3.11

_CR0_PE, _EFER_LMA, _EFLAGS_VM = 1, 1 << 10, 1 << 17
RFLAGS_IF = 1 << 9


class NotRam(PageFault):
    """A translation that ends outside RAM: no fault to the processor, but no instruction or stack can be there."""


class Processor:
    """``registers`` as of ``Vcpu.registers()``, ``bits`` of its code (16, 32, 64), its ``paging``, and
    ``read(gpa, n)``, which returns RAM or raises ``IndexError``."""

    def __init__(
        self, registers: Mapping[str, int], bits: int, paging: Paging, read: Callable[[int, int], bytes]
    ) -> None:
        self.registers = registers
        self.bits = bits
        self.paging = paging
        self._read = read

    @property
    def protected(self) -> bool:
        """Whether descriptors and an IDT of gates are in use: not real mode, not virtual-8086 mode."""
        return bool(self.registers["cr0"] & _CR0_PE) and not self.registers["rflags"] & _EFLAGS_VM

    @property
    def long(self) -> bool:
        """Whether it is in IA-32e mode (whose IDT and stack frames are 64 bits wide, whatever the code)."""
        return bool(self.registers["efer"] & _EFER_LMA)

    @property
    def cpl(self) -> int:
        """Its privilege level: 0 in real mode."""
        return self.registers["cs"] & 3 if self.protected else 0

    @property
    def rip(self) -> int:
        """The linear address of the next instruction."""
        return self.linear("cs", self.registers["rip"])

    def linear(self, segment: str, offset: int) -> int:
        """``segment:offset`` as a linear address; in 64-bit code only fs and gs have a base (SDM vol. 3, 3.4.4)."""
        if self.bits == 64:
            base = self.registers[f"{segment}_base"] if segment in ("fs", "gs") else 0
            return (base + offset) & (1 << 64) - 1
        return (self.registers[f"{segment}_base"] + offset) & 0xFFFFFFFF

    def walk(self, linear: int, access: str | None, *, user: bool | None = None) -> Translation | PageFault:
        """As :meth:`Paging.walk`, at its own privilege level."""
        return self.paging.walk(self._read, linear, access, user=self.cpl == 3 if user is None else user)

    def refused(self, linear: int, size: int, access: str, *, user: bool | None = None) -> PageFault | None:
        """Why an access to ``size`` bytes would fault, or ``None``."""
        size = max(1, min(size, PAGE))
        for at in (linear, (linear + size - 1) & (1 << 64) - 1):
            found = self.walk(at, access, user=user)
            if isinstance(found, PageFault):
                return found
        return None

    def fetch(self, linear: int) -> tuple[bytes, PageFault | None]:
        """Up to 15 bytes of code at ``linear``, and why there are no more."""
        code = b""
        while len(code) < CODE_MAX:
            at = (linear + len(code)) & (1 << 64) - 1
            found = self.walk(at, "fetch")
            if isinstance(found, PageFault):
                return code, found
            n = min(CODE_MAX - len(code), PAGE - at % PAGE)
            try:
                code += self._read(found.gpa, n)
            except IndexError:
                return code, NotRam(at, "not-ram", f"mapped to {found.gpa:#x}, which is not RAM", [])
        return code, None

    def read(self, linear: int, size: int) -> bytes | None:
        """``size`` bytes as the supervisor would read them, or ``None`` where one of them cannot be."""
        data = b""
        while len(data) < size:
            at = (linear + len(data)) & (1 << 64) - 1
            found = self.walk(at, None)
            if isinstance(found, PageFault):
                return None
            n = min(size - len(data), PAGE - at % PAGE)
            try:
                data += self._read(found.gpa, n)
            except IndexError:
                return None
        return data

    def word(self, linear: int, size: int) -> int | None:
        """A little-endian number there, or ``None``."""
        data = self.read(linear, size)
        return None if data is None else int.from_bytes(data, "little")
