"""Every guest-physical address, port and interrupt number of the machine, in one place.

::

    guest-physical
    0x0000_0000  RAM  (low: boot structures; 0x9_fc00..0xf_ffff reserved: ACPI tables from 0xe_0000, the page in
                      place of a BIOS at 0xf_e000, the generation ID's page at 0xf_f000)
    0x0010_0000  RAM  kernel from here
    0xc000_0000  hole: device windows          <- LOW_RAM_END
    0xc000_0000    virtio-mmio registers
    0xc100_0000    PCI BARs
    0xe000_0000    PCI configuration (ECAM) of one bus, 1 MiB
    0xfec0_0000    I/O APIC
    0xfee0_0000    local APICs
    0x1_0000_0000  RAM above the hole          <- HIGH_RAM_START
"""

from __future__ import annotations

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

LOW_RAM_END = 3 * GIB
HIGH_RAM_START = 4 * GIB
MEMORY_MIN = 1 * MIB
MEMORY_MAX = 1 << 46  # physical address bits of every x86-64 KVM host

ACPI_START = 0xE0000
ACPI_SIZE = 0x1E000
BIOS = ACPI_START + ACPI_SIZE  # a page
GENERATION_ID = BIOS + PAGE  # a page of its own, below 1 MiB: every memory map reserves it

VIRTIO_MMIO_START = LOW_RAM_END
VIRTIO_MMIO_STRIDE = 0x1000
PCI_MMIO_START = LOW_RAM_END + 16 * MIB
ECAM_START = 0xE0000000
ECAM_SIZE = 1 * MIB
PCI_MMIO_SIZE = ECAM_START - PCI_MMIO_START
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000

# ports
PIT = 0x40
I8042 = 0x60
SPEAKER = 0x61
RTC = 0x70
POST = 0x80
NO_BIOS = 0xB3  # a byte; a PC's chip set has APM's status there, which only a BIOS reads
NO_BIOS_CALL = NO_BIOS + 1  # a word
SYSTEM_CONTROL_A = 0x92
DEBUG_EXIT = 0xF4
COM1 = 0x3F8
PCI_PORTS = 0xCF8  # configuration mechanism #1: 8 ports; the reset control register, 0xcf9, is a byte of them
PVPANIC = 0x505
PM_BASE = 0x600
PM1_EVENT = PM_BASE  # 4 bytes
PM1_CONTROL = PM1_EVENT + 4  # 2 bytes
PM_TIMER = PM1_CONTROL + 4  # 4 bytes
RESET = PM_TIMER + 4  # 1 byte
SLEEP_CONTROLS = (0x4004, 0xB004)  # PM1 control of VirtualBox, and of Bochs: 2 bytes each
BOCHS_SHUTDOWN = 0x8900

# interrupts
GSI_PIT = 0
GSI_I8042 = 1
GSI_COM1 = 4
GSI_EVENTS = 7  # ACPI's Generic Event Device; a parallel port's otherwise
GSI_RTC = 8
GSI_SCI = 9
GSI_FIRST_FREE = 16  # I/O APIC inputs the ISA devices do not use: 16..23
PCI_ISA_IRQ = 11  # every PCI pin, for a guest without I/O APIC
PCI_GSIS = range(GSI_FIRST_FREE, GSI_FIRST_FREE + 8)
# A line for each virtio-mmio device: first those that a guest without ACPI, which has no I/O APIC, can use too.
VIRTIO_MMIO_GSIS = (5, 10, 11, 6, 14, 15, 3, *range(GSI_FIRST_FREE, GSI_FIRST_FREE + 8))


def ram_regions(size: int) -> list[tuple[int, int]]:
    """Return ``(gpa, size)`` of each RAM region for ``size`` bytes of memory, split around the hole below 4 GiB."""
    low = min(size, LOW_RAM_END)
    regions = [(0, low)]
    if size > low:
        regions.append((HIGH_RAM_START, size - low))
    return regions
