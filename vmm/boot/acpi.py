r"""ACPI tables: how the guest learns of processors, interrupts, power and devices it cannot probe for.

Devices describe themselves into a :class:`Tables`; :func:`build` lays the result out::

    tables = Tables()
    tables.pm1a_event, tables.pm1a_control, tables.s5 = 0x600, 0x604, 5
    tables.dsdt.append(uart_node(0x3F8, irq=4, uid=1))
    rsdp, blobs = build(tables, cpus=2)
    for gpa, data in blobs:
        memory.write(gpa, data)

The RSDP (revision 2) leads to the XSDT, that to the FADT (revision 6; it names DSDT and FACS), the MADT, and
whatever tables devices added. The machine is a full ACPI one, not "hardware-reduced": it has PM1 registers,
an SCI and the legacy interrupt controllers. It is in ACPI mode from reset on (no SMI command port), so SCI_EN
has to read as 1; and what the guest writes to the PM1 enable register has to read back, or ACPICA reports a
failed event.

Source: ACPI 6.3; section and table numbers are its own.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import aml
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Where firmware keeps its tables, and where a guest that was handed no address looks for the RSDP (5.2.5.1).
DEFAULT_ADDRESS = 0xE0000
DEFAULT_SIZE = 0x20000

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
PCI_BUS_SIZE = 1 << 20  # of one bus in memory-mapped configuration space (PCI Firmware 3.2, 4.1.2)

_OEM_ID = b"PYVMM "
_OEM_TABLE_ID = b"PYVMM   "
_CREATOR = b"PYVM"

_PM1_EVENT_BYTES = 4
_PM1_CONTROL_BYTES = 2
_PM_TIMER_BYTES = 4

# An 8-bit APIC id or processor UID can go up to 254: 255 means "all" (5.2.12.2).
_XAPIC_LIMIT = 255
_X2APIC_LIMIT = 0xFFFF_FFFF

# MPS INTI flags (table 5-50): polarity in bits 0-1, trigger mode in bits 2-3.
_ACTIVE_HIGH, _ACTIVE_LOW = 0x1, 0x3
_EDGE, _LEVEL = 0x4, 0xC


class Tables:
    r"""What the devices of one machine tell its guest. Each ``device.describe(tables)`` adds its part.

    ``dsdt``: AML terms for ``\_SB`` (from :mod:`vmm.boot.aml`); ``aml.scope("\\...", ...)`` leads elsewhere.
    ``cmdline``: words to add to the command line of a guest that is Linux. ``virtio_mmio``: words for a Linux
    that is not to use ACPI. ``reserved``: (address, size) of what the memory map is to keep from other uses.

    Fixed hardware, zero or None where the machine has none:

    - ``pm1a_event``, ``pm1a_control``: I/O ports of the PM1 event block (4 bytes: 16-bit status, 16-bit
      enable) and of the control block (2 bytes). ACPI cannot do without them.
    - ``pm_timer``: port of the 4-byte, 32-bit PM timer.
    - ``sci``: ISA line of the SCI; level-triggered, active high. ``s5``: the SLP_TYP that powers off.
    - ``power_button``: PM1 has the fixed power button (PWRBTN_STS).
    - ``reset``: (port, value); writing the byte resets the machine.
    - ``rtc``: there is a CMOS RTC at 0x70; ``century``: its index of the century byte.
    - ``i8042``: there is a keyboard controller.
    - ``events``: set by :meth:`on_event`: what the guest runs at the edge of an interrupt line.
    - ``overrides``: set by :meth:`override` for ISA lines that do not reach the I/O APIC input of their own
      number, edge-triggered and active high. None is needed for KVM's default routing: the PIT's
      line 0 reaches input 0.
    """

    __slots__ = (
        "century",
        "cmdline",
        "dsdt",
        "events",
        "extra",
        "i8042",
        "overrides",
        "pm1a_control",
        "pm1a_event",
        "pm_timer",
        "power_button",
        "reserved",
        "reset",
        "rtc",
        "s5",
        "sci",
        "virtio_mmio",
    )

    def __init__(self) -> None:
        self.dsdt: list[aml.Term] = []
        self.events: dict[int, list[aml.Term]] = {}
        self.extra: list[bytes] = []
        self.cmdline: list[str] = []
        self.virtio_mmio: list[str] = []
        self.reserved: list[tuple[int, int]] = []
        self.pm1a_event = 0
        self.pm1a_control = 0
        self.pm_timer = 0
        self.sci = 9
        self.s5: int | None = None
        self.power_button = False
        self.reset: tuple[int, int] | None = None
        self.rtc = False
        self.century = 0
        self.i8042 = False
        self.overrides: dict[int, tuple[int, int]] = {}

    def add(self, table: bytes) -> None:
        """Add one finished table, header and checksum included (see :func:`table`), to the XSDT."""
        if len(table) < _HEADER.size or len(table) != int.from_bytes(table[4:8], "little") or sum(table) & 0xFF:
            raise ConfigError(f"ACPI: {bytes(table[:4])!r} is no table: make it with vmm.boot.acpi.table()")
        self.extra.append(bytes(table))

    def add_virtio_mmio(self, address: int, size: int, gsi: int) -> None:
        """A virtio-mmio device: ``size`` bytes of registers at ``address``, a level-triggered line ``gsi``.

        ``LNRO0005`` is the id Linux's driver binds to. A kernel with ``acpi=off`` needs the words of
        :attr:`virtio_mmio` on its command line instead; given both, it would find every device twice.
        """
        uid = len(self.virtio_mmio)
        self.virtio_mmio.append(f"virtio_mmio.device={size >> 10}K@{address:#x}:{gsi}")
        self.dsdt.append(virtio_mmio_node(address, size, gsi=gsi, uid=uid))

    def add_pci_host(self, *, ecam: int, ports: int, window: tuple[int, int], pins: dict[int, int]) -> None:
        """A PCI host bridge with bus 0 alone, its configuration space at ``ecam`` (1 MiB) and at ``ports`` (8).

        ``window``: (address, size) where BARs may be. ``pins``: slot -> GSI of its interrupt pin A.
        """
        self.dsdt += [pci_host_node(ports, window, pins), board_node(ecam, PCI_BUS_SIZE)]
        self.add(mcfg(ecam, last_bus=0))
        self.reserved.append((ecam, PCI_BUS_SIZE))

    def add_generation_id(self, address: int, gsi: int) -> None:
        """The generation ID (16 bytes) at ``address``, whose change an edge of ``gsi`` announces."""
        self.dsdt.append(generation_id_node(address))
        self.on_event(gsi, aml.notify("\\_SB.VGEN", 0x80))

    def on_event(self, gsi: int, *terms: aml.Term) -> None:
        """The guest runs ``terms`` at each rising edge of the line ``gsi``, which is for events alone."""
        self.events.setdefault(_fits(gsi, 32, "GSI"), []).extend(terms)

    def override(self, irq: int, gsi: int, *, level: bool = False, active_low: bool = False) -> None:
        """ISA line ``irq`` (0 to 15) reaches the I/O APIC at ``gsi``, with this trigger mode and polarity."""
        _fits(irq, 4, "ISA interrupt")
        flags = (_LEVEL if level else _EDGE) | (_ACTIVE_LOW if active_low else _ACTIVE_HIGH)
        self.overrides[irq] = (_fits(gsi, 32, "GSI"), flags)


def build(
    tables: Tables,
    *,
    cpus: int | Sequence[int],
    address: int = DEFAULT_ADDRESS,
    size: int = DEFAULT_SIZE,
    local_apic: int = 0xFEE00000,
    io_apic: int = 0xFEC00000,
    io_apic_id: int = 0,
) -> tuple[int, list[tuple[int, bytes]]]:
    """Lay all tables out in the reserved guest memory ``address`` .. ``address + size``.

    ``cpus`` is a number of vCPUs (their APIC ids are then 0, 1, ...) or their APIC ids in vCPU order, the
    boot processor first. Returns the address of the RSDP, which comes first in the area and so is found by a
    guest that scans 0xe0000..0xfffff, and what to write where: (gpa, bytes), ascending and not overlapping.

    Raises ConfigError when the tables need more than ``size`` bytes, when ``address`` is not 16-byte aligned
    or the area not below 4 GiB, when an APIC id is given twice or an attribute does not fit its field, and
    when no device provides the PM1 blocks.
    """
    apic_ids = range(cpus) if isinstance(cpus, int) else cpus
    if not apic_ids or len(set(apic_ids)) != len(apic_ids):
        raise ConfigError("ACPI: a machine has at least one vCPU, and each its own APIC id")
    if not (tables.pm1a_event and tables.pm1a_control):
        raise ConfigError("ACPI: the machine has no PM1 registers: attach the ACPI power-management device")
    if address % 16 or not 0 <= address <= address + size <= 1 << 32:
        raise ConfigError(f"ACPI: the area {address:#x}+{size:#x} has to be 16-byte aligned and below 4 GiB")

    blobs: list[tuple[int, bytes]] = []
    end = address + 36  # the RSDP goes first, but is written last: it names the XSDT

    def place(blob: bytes, alignment: int = 16) -> int:
        nonlocal end
        gpa = -(-end // alignment) * alignment
        end = gpa + len(blob)
        if end > address + size:
            raise ConfigError(
                f"ACPI: the tables for {len(apic_ids)} vCPUs and all devices do not fit into {size:#x} "
                "bytes; reserve more, or ask for fewer"
            )
        blobs.append((gpa, blob))
        return gpa

    facs_gpa = place(_facs(), alignment=64)  # 5.2.10 asks for the 64
    dsdt_gpa = place(_dsdt(tables, len(apic_ids)))
    listed = [
        place(_fadt(tables, facs_gpa, dsdt_gpa)),
        place(_madt(tables, apic_ids, local_apic, io_apic, io_apic_id)),
        *(place(extra) for extra in tables.extra),
    ]
    xsdt_gpa = place(table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    blobs.insert(0, (address, _rsdp(xsdt_gpa)))
    return address, blobs


# --- Tables -----------------------------------------------------------------------------------------------


def _fits(value: int, bits: int, what: str) -> int:
    if not 0 <= value < 1 << bits:
        raise ConfigError(f"ACPI: {what} {value:#x} does not fit in {bits} bits")
    return value


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((-sum(data) & 0xFF,)) + data[at + 1 :]


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with the standard header (5.2.6) around ``body``, its checksum set."""
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature, length, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR, 1)
    return _with_checksum(header + body, 9)


def _rsdp(xsdt: int) -> bytes:
    # 5.2.5.3: the first checksum is over the 20 bytes of revision 0, the second over all 36. No RSDT.
    head = _with_checksum(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM_ID, 2, 0), 8)
    return _with_checksum(head + struct.pack("<IQB3x", 36, xsdt, 0), 32)


def _facs() -> bytes:
    # 5.2.10: no hardware signature, no wake-up vectors (there is no S3), global lock free; version 2.
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _register(port: int, size: int, access: int) -> bytes:
    # Generic Address Structure (5.2.3.2) in system I/O space. Guests complain unless its width in bits
    # agrees with the length in bytes of the old-style field. A register that is absent is all zero.
    return struct.pack("<BBBBQ", 1, 8 * size, 0, access, port) if port else bytes(12)


def _fadt(tables: Tables, facs: int, dsdt: int) -> bytes:
    event = _fits(tables.pm1a_event, 16, "PM1a event port")
    control = _fits(tables.pm1a_control, 16, "PM1a control port")
    timer = _fits(tables.pm_timer, 16, "PM timer port")
    reset_port, reset_value = tables.reset or (0, 0)
    _fits(reset_port, 16, "reset port")
    _fits(reset_value, 8, "reset value")

    # Table 5-34. No sleep button, and neither does the RTC report alarms through PM1.
    flags = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6  # WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC
    flags |= (not tables.power_button) << 4  # PWR_BUTTON says that it is *not* fixed hardware
    flags |= bool(timer) << 8  # TMR_VAL_EXT
    flags |= bool(reset_port) << 10  # RESET_REG_SUP

    # IA-PC boot architecture flags (table 5-35): legacy devices, no VGA, no PCIe ASPM.
    boot_arch = 1 << 0 | tables.i8042 << 1 | 1 << 2 | 1 << 4 | (not tables.rtc) << 5

    body = b"".join(
        (
            struct.pack("<IIBBH", facs, dsdt, 0, 0, _fits(tables.sci, 4, "SCI")),
            bytes(8),  # SMI_CMD 0: in ACPI mode always; ACPI_ENABLE and the like mean nothing then
            struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0),
            struct.pack("<4B", _PM1_EVENT_BYTES, _PM1_CONTROL_BYTES, 0, _PM_TIMER_BYTES if timer else 0),
            bytes(4),  # no general-purpose events, no _CST notification
            struct.pack("<HHHH", 0xFFF, 0xFFF, 0, 0),  # latencies above 100 and 1000 us: no C2, no C3
            struct.pack("<5B", 0, 0, 0, 0, _fits(tables.century, 8, "CMOS index of the century")),
            struct.pack("<HBI", boot_arch, 0, flags),
            _register(reset_port, 1, 1),
            struct.pack("<BHB", reset_value, 0, 3),  # no ARM flags; minor revision: 6.3
            # The FACS is named by the 32-bit field or by this one, never both; the DSDT by both.
            struct.pack("<QQ", 0, dsdt),
            _register(event, _PM1_EVENT_BYTES, 2),
            _register(0, 0, 0),
            _register(control, _PM1_CONTROL_BYTES, 2),
            _register(0, 0, 0),
            _register(0, 0, 0),
            _register(timer, _PM_TIMER_BYTES, 3),
            bytes(12 * 4),  # GPE0, GPE1; sleep control and status are for hardware-reduced machines
            bytes(8),  # hypervisor vendor identity
        )
    )
    return table(b"FACP", 6, body)


def _madt(tables: Tables, apic_ids: Sequence[int], local_apic: int, io_apic: int, io_apic_id: int) -> bytes:
    head = struct.pack("<II", _fits(local_apic, 32, "local APIC address"), 1)  # PCAT_COMPAT: a pair of 8259s too
    return table(b"APIC", 5, head + b"".join(_madt_entries(tables, apic_ids, io_apic, io_apic_id)))


def _madt_entries(tables: Tables, apic_ids: Sequence[int], io_apic: int, io_apic_id: int) -> Iterator[bytes]:
    enabled = 1
    x2apic = False
    for uid, apic_id in enumerate(apic_ids):
        if not 0 <= apic_id < _X2APIC_LIMIT:
            raise ConfigError(f"ACPI: {apic_id:#x} is no APIC id")
        if apic_id < _XAPIC_LIMIT and uid < _XAPIC_LIMIT:
            yield struct.pack("<BBBBI", 0, 8, uid, apic_id, enabled)
        else:
            x2apic = True
            yield struct.pack("<BBHIII", 9, 16, 0, apic_id, enabled, uid)

    yield struct.pack(
        "<BBBBII", 1, 12, _fits(io_apic_id, 8, "I/O APIC id"), 0, _fits(io_apic, 32, "I/O APIC address"), 0
    )
    # The SCI has no trigger mode that goes without saying: left out, Linux takes it for active low.
    overrides = {tables.sci: (tables.sci, _LEVEL | _ACTIVE_HIGH), **tables.overrides}
    for irq, (gsi, flags) in sorted(overrides.items()):
        yield struct.pack("<BBBBIH", 2, 10, 0, irq, gsi, flags)

    # LINT1 of every processor is NMI; the flags "as the bus says" are all an NMI can have.
    yield struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    if x2apic:
        yield struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFF_FFFF, 1)


def _dsdt(tables: Tables, cpus: int) -> bytes:
    processors = (cpu_node(uid) for uid in range(cpus))
    events = [event_node(tables.events)] if tables.events else []
    terms = aml.scope("\\_SB", *processors, *tables.dsdt, *events)
    if tables.s5 is not None:
        # 7.4.2: SLP_TYPa, SLP_TYPb, reserved. Sleep states that are not named do not exist.
        terms += aml.name("\\_S5", [_fits(tables.s5, 3, "SLP_TYP of S5"), tables.s5, 0, 0])
    return table(b"DSDT", 2, terms)  # from revision 2 on, integers have 64 bits


def mcfg(address: int, *, segment: int = 0, first_bus: int = 0, last_bus: int = 255) -> bytes:
    """MCFG: PCI configuration space in memory, 1 MiB for each bus; ``address`` is where bus 0 would be.

    Source: PCI Firmware 3.2, 4.1.2.
    """
    if not 0 <= first_bus <= last_bus <= 255:
        raise ConfigError(f"ACPI: PCI buses {first_bus} to {last_bus}; they can be 0 to 255")
    if address % (1 << 20):
        raise ConfigError(f"ACPI: PCI configuration space at {address:#x} is not aligned to 1 MiB")
    allocation = (_fits(address, 64, "address"), _fits(segment, 16, "PCI segment"), first_bus, last_bus)
    return table(b"MCFG", 1, struct.pack("<8xQHBB4x", *allocation))


# --- Device nodes -----------------------------------------------------------------------------------------


def cpu_node(uid: int) -> aml.Term:
    """Processor ``uid``, the one that the MADT lists under this UID (8.4)."""
    if not 0 <= uid < 1 << 12:
        raise ConfigError(f"ACPI: processor {uid} has no name; there can be 4096")
    return aml.device(f"C{uid:03X}", aml.name("_HID", "ACPI0007"), aml.name("_UID", uid))


def uart_node(port: int, *, irq: int, uid: int) -> aml.Term:
    """A 16550A with its eight registers at ``port``: COM``uid``, so ``uid`` is 1 to 9."""
    if not 1 <= uid <= 9:
        raise ConfigError(f"ACPI: serial port number {uid}; it can be 1 to 9")
    return aml.device(
        f"COM{uid}",
        aml.name("_HID", aml.eisaid("PNP0501")),
        aml.name("_UID", uid),
        aml.name("_CRS", aml.resources(aml.io(port, 8), aml.irq(irq))),
    )


def rtc_node(port: int = 0x70, *, irq: int = 8) -> aml.Term:
    """The CMOS real-time clock. Its device also sets ``tables.rtc``."""
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisaid("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io(port, 2), aml.irq(irq))),
    )


def keyboard_node(*, irq: int = 1) -> aml.Term:
    """The keyboard behind an i8042 at 0x60 and 0x64. Its device also sets ``tables.i8042``."""
    return aml.device(
        "KBD",
        aml.name("_HID", aml.eisaid("PNP0303")),
        aml.name("_CRS", aml.resources(aml.io(0x60, 1), aml.io(0x64, 1), aml.irq(irq))),
    )


def virtio_mmio_node(address: int, size: int, *, gsi: int, uid: int) -> aml.Term:
    """A virtio-mmio device (virtio 1.2, 4.2.1 leaves the discovery to the platform; the id is Linux's)."""
    return aml.device(
        f"VM{uid:02X}",
        aml.name("_HID", "LNRO0005"),
        aml.name("_UID", uid),
        aml.name("_CCA", 1),
        aml.name(
            "_CRS",
            aml.resources(aml.memory32_fixed(address, size), aml.interrupt(gsi, level=True)),
        ),
    )


def pci_host_node(ports: int, window: tuple[int, int], pins: dict[int, int]) -> aml.Term:
    """A PCI host bridge with bus 0 alone: no number of another bus, so that a guest looks for no other.

    ``ports``: configuration mechanism #1; ``window``: (address, size) of memory it passes on; ``pins``: slot -> GSI
    of pin A, level-triggered and active low as PCI has it (6.2.13). It is a conventional bridge to the guest
    (PNP0A03): a PCI Express one would have to negotiate features it has not (_OSC).
    """
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisaid("PNP0A03")),
        aml.name("_UID", 0),
        aml.name("_CRS", aml.resources(aml.word_bus_number(0, 1), aml.io(ports, 8), aml.dword_memory(*window))),
        aml.name("_PRT", [[slot << 16 | 0xFFFF, 0, 0, gsi] for slot, gsi in sorted(pins.items())]),
    )


def board_node(address: int, size: int) -> aml.Term:
    """Motherboard resources. A guest uses the ECAM only if it finds it here (PCI Firmware 3.2, 4.1.2)."""
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisaid("PNP0C02")),
        aml.name("_CRS", aml.resources(aml.memory32_fixed(address, size))),
    )


def pvpanic_node(port: int) -> aml.Term:
    """pvpanic: one port that the guest writes its panic to."""
    return aml.device(
        "PEVT",
        aml.name("_HID", "QEMU0001"),
        aml.name("_STA", 0xF),  # present, enabled, shown, working
        aml.name("_CRS", aml.resources(aml.io(port, 1))),
    )


def event_node(events: dict[int, list[aml.Term]]) -> aml.Term:
    """The Generic Event Device (5.6.9): GSI -> what is done when it happens. No register says what happened, so each
    line has one meaning; a full ACPI machine may have the device beside its fixed events."""
    happened = [aml.if_(aml.equal(aml.arg(0), gsi), *terms) for gsi, terms in sorted(events.items())]
    return aml.device(
        "GED",
        aml.name("_HID", "ACPI0013"),
        aml.name("_UID", 0),
        aml.name("_CRS", aml.resources(*(aml.interrupt(gsi) for gsi in sorted(events)))),
        aml.method("_EVT", *happened, args=1, serialized=True),
    )


def generation_id_node(address: int) -> aml.Term:
    """The virtual machine generation ID at ``address``, known to drivers by its compatible id (Microsoft's "Virtual
    Machine Generation ID", 2018). Its value 0x80 of Notify says that the ID is another one now."""
    return aml.device(
        "VGEN",
        aml.name("_HID", "PVMM0001"),
        aml.name("_CID", "VM_Gen_Counter"),
        aml.name("_DDN", "VM_Gen_Counter"),
        aml.name("ADDR", [address & 0xFFFFFFFF, address >> 32]),
    )
