"""Where the loader puts things in guest-physical memory: every address and bound of vmm.boot, in one place.

    0x00000 +--------------------------------+
            | real-mode interrupt vectors    |  bios.py
    0x00400 | BIOS data area                 |  bios.py
    0x00500 | GDT                            |  protected and long mode
    0x01000 | PML4, PDPT, 4 page directories |  long mode: identity map of the first 4 GiB
    0x07000 | zero page, or start info       |  struct boot_params | hvm_start_info | multiboot information
    0x08000 | tables the start info points at|  modules, memory map, strings
    0x10000 | stack of bare-metal programs   |  grows down from 0x20000
    0x20000 | command line                   |
    0x30000 | free                           |
    0x9fc00 | EBDA, video, option ROMs, BIOS |  reserved in the e820 map
   0x100000 | kernels; initrds from the top  |
            +--------------------------------+

An image may lie on any of it: what is left of its own place then goes to the highest free pages below 640 KiB, or to
the top of low RAM (Claims.place). Nothing of this outlives the guest's own early boot: a kernel copies what it wants
and takes the rest as RAM.
"""

from __future__ import annotations

PAGE = 0x1000
MIB = 1 << 20
GIB = 1 << 30

GDT = 0x500
PAGE_TABLES = 0x1000
START_INFO = 0x7000
START_TABLES = 0x8000
START_TABLES_END = 0x10000
STACK_END = 0x10000
STACK_TOP = 0x20000
CMDLINE = 0x20000
CMDLINE_ROOM = 0x10000

EBDA = 0x9FC00
VIDEO = 0xA0000
HIGH_RAM = 0x100000

# Low RAM ends here at the latest: the 32-bit MMIO hole follows, and RAM continues at 4 GiB.
HOLE = 3 * GIB
FOUR_GIB = 4 * GIB

# Where a boot sector runs, and where a flat 32/64-bit image goes when no address is asked for.
FLAT_REAL = 0x7C00
FLAT_HIGH = HIGH_RAM

# A position-independent ELF linked at 0 cannot lie on the tables above; it is moved here whole.
ET_DYN_BASE = 2 * MIB
