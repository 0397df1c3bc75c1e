"""What a BIOS leaves in low memory, for guests that read it; and a way to say that there is no BIOS behind it.

Every interrupt vector leads to a stub of its own (:data:`STUBS`, :data:`STUB_SIZE` bytes each), unless the image lies
on the table or on the stubs. There are two kinds:

- one that ends the run by a write to a port, and so can be named with the call that led there
  (:mod:`vmm.observe.bios`): every vector of an image that starts in real mode, which has nothing but a BIOS to call;
  and in any image the vectors of exceptions and IRQs, behind which a BIOS has no service;
- one that reports the vector and AH on a port, sets CF as a BIOS does for a function that it has not, and returns: for
  an image that goes back to real mode from elsewhere. Xen makes such a call, and does without its result.

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
from vmm.layout import BIOS, COM1, NO_BIOS, NO_BIOS_CALL

if TYPE_CHECKING:
    from vmm.boot.claims import Claims

DATA, DATA_SIZE = 0x400, 0x100
VECTORS = 256
VECTOR_SIZE = 4
STUBS, STUB_SIZE = BIOS, 16
_SEGMENT = 0xF000
_SERVICES = range(0x10, 0x70)  # below are exceptions and the first eight IRQs; from there on the other eight
_END = bytes((0xE6, NO_BIOS, 0xCF)).ljust(STUB_SIZE, b"\x90")  # out NO_BIOS, al; iret
# push ax; mov al, VECTOR; out NO_BIOS_CALL, ax; pop ax; push bp; mov bp, sp; or byte [bp+6], CF; pop bp; iret
_CALL = ("50 b0{:02x} e7{:02x} 58 55 89e5 804e0601 5d cf").format
_WORDS = {0x400: COM1, 0x40E: places.EBDA >> 4, 0x413: places.EBDA >> 10}


def _stub(vector: int, *, ends: bool) -> bytes:
    if ends or vector not in _SERVICES:
        return _END
    return bytes.fromhex(_CALL(vector, NO_BIOS_CALL)).ljust(STUB_SIZE, b"\x90")


def leave(claims: Claims, *, real_mode: bool) -> None:
    """Write the vectors with their stubs, and the data area, each unless the image lies there.

    ``real_mode``: the image starts there, and a call ends the run.
    """
    if claims.is_free(0, VECTORS * VECTOR_SIZE) and claims.is_free(STUBS, VECTORS * STUB_SIZE):
        at = STUBS - (_SEGMENT << 4)
        table = struct.pack(f"<{2 * VECTORS}H", *(v for n in range(VECTORS) for v in (at + n * STUB_SIZE, _SEGMENT)))
        claims.memory.write(0, table)
        claims.memory.write(STUBS, b"".join(_stub(n, ends=real_mode) for n in range(VECTORS)))
    if not claims.is_free(DATA, DATA_SIZE):
        return
    area = bytearray(DATA_SIZE)
    for gpa, word in _WORDS.items():
        struct.pack_into("<H", area, gpa - DATA, word)
    claims.memory.write(DATA, area)
