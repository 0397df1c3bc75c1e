"""What a BIOS leaves in low memory, for guests that read it; and a way to say that there is no BIOS behind it.

For an image that starts in real mode every interrupt vector leads to a stub of its own (:data:`STUBS`,
:data:`STUB_SIZE` bytes each), which writes to a port and so ends the run: that the guest called the BIOS, with what,
can then be said (:mod:`vmm.observe.bios`).

The BIOS data area (IBM PS/2 and PC BIOS Interface Technical Reference, "Data Areas"), as far as this machine has it:

=======  =====  ===================================================================================
address  bytes
=======  =====  ===================================================================================
0x400    2      I/O port of COM1
0x40e    2      segment of the extended BIOS data area, where base memory ends
0x413    2      base memory, KiB
=======  =====  ===================================================================================
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import places
from vmm.layout import BIOS, COM1, NO_BIOS

if TYPE_CHECKING:
    from vmm.boot.claims import Claims

DATA, DATA_SIZE = 0x400, 0x100
VECTORS = 256
VECTOR_SIZE = 4
STUBS, STUB_SIZE = BIOS, 4
_SEGMENT = 0xF000
_STUB = bytes((0xE6, NO_BIOS, 0xCF, 0x90))  # out NO_BIOS, al; iret; nop
_WORDS = {0x400: COM1, 0x40E: places.EBDA >> 4, 0x413: places.EBDA >> 10}


def leave(claims: Claims, *, vectors: bool) -> None:
    """Write it, each part unless the image lies there; ``vectors``: and the interrupt vectors."""
    if vectors and claims.is_free(0, VECTORS * VECTOR_SIZE) and claims.is_free(STUBS, VECTORS * STUB_SIZE):
        at = STUBS - (_SEGMENT << 4)
        table = struct.pack(f"<{2 * VECTORS}H", *(v for n in range(VECTORS) for v in (at + n * STUB_SIZE, _SEGMENT)))
        claims.memory.write(0, table)
        claims.memory.write(STUBS, _STUB * VECTORS)
    if not claims.is_free(DATA, DATA_SIZE):
        return
    area = bytearray(DATA_SIZE)
    for gpa, word in _WORDS.items():
        struct.pack_into("<H", area, gpa - DATA, word)
    claims.memory.write(DATA, area)
