"""Which call of the BIOS, or which interrupt, led a guest to the stubs of :mod:`vmm.boot.bios`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.boot.bios import STUB_SIZE, STUBS, VECTORS
from vmm.errors import GuestMemoryError
from vmm.observe.descriptors import VECTORS as EXCEPTIONS

if TYPE_CHECKING:
    from vmm.memory import GuestMemory
    from vmm.observe.subject import Ended

_INT = 0xCD
_NONE = "this machine has no BIOS"
_IRQ_0 = 8  # the vector a BIOS gives it; the next seven follow


def call(registers: dict[str, int], memory: GuestMemory) -> str:
    """A sentence about the call; "" where the vCPU is not in a stub. ``registers`` are of the outcome."""
    vector, rest = divmod(registers["cs_base"] + registers["rip"] - STUBS, STUB_SIZE)
    if not 0 <= vector < VECTORS or rest != 2:  # just behind the stub's OUT
        return ""
    try:
        stack = registers["ss_base"] + (registers["rsp"] & 0xFFFF)
        ip, cs = (int.from_bytes(memory.read(stack + at, 2), "little") for at in (0, 2))
        before = memory.read((cs << 4) + (ip - 2 & 0xFFFF), 2)
    except GuestMemoryError:
        return f"interrupt {vector:#x}: {_NONE}"
    if before == bytes((_INT, vector)):
        return f"int {vector:#x}, AH={registers['rax'] >> 8 & 0xFF:#04x}: {_NONE}"
    name = EXCEPTIONS.get(vector, "")
    what = f"exception {vector} ({name})" if vector < _IRQ_0 else f"interrupt {vector:#x}"
    if _IRQ_0 <= vector < _IRQ_0 + 8:  # exceptions lie there as well, and nothing tells which it was
        what += f" (IRQ {vector - _IRQ_0}{', or ' if name else ''}{name})"
    return f"{what} at {cs:#x}:{ip:#x}, and the guest has set no handler for it: {_NONE}"


def calls(machine: Ended) -> list[str]:
    """Lines about calls that were given back to the guest as failed, which it may not have expected."""
    from vmm.devices.no_bios import NoBios

    made = [call for device in machine.devices if isinstance(device, NoBios) for call in device.calls]
    return [f"int {vector:#x}, AH={ah:#04x} failed: {_NONE}" for vector, ah in made]
