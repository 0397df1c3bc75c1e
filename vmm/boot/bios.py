"""What a BIOS leaves in low memory, for guests that read it. There is no BIOS behind it.

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

from vmm.boot import layout
from vmm.layout import COM1

if TYPE_CHECKING:
    from vmm.boot.claims import Claims

DATA, DATA_SIZE = 0x400, 0x100
_WORDS = {0x400: COM1, 0x40E: layout.EBDA >> 4, 0x413: layout.EBDA >> 10}


def leave(claims: Claims) -> None:
    """Write it, unless the image lies there."""
    if not claims.is_free(DATA, DATA_SIZE):
        return
    area = bytearray(DATA_SIZE)
    for gpa, word in _WORDS.items():
        struct.pack_into("<H", area, gpa - DATA, word)
    claims.memory.write(DATA, area)
