"""ACPI tables: where they lie, what they say, and that iasl finds nothing to complain about."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from vmm.boot import acpi, aml
from vmm.errors import ConfigError


def described() -> acpi.Tables:
    """A machine with every device that has a node here."""
    tables = acpi.Tables()
    tables.pm1a_event, tables.pm1a_control, tables.pm_timer, tables.s5 = 0x600, 0x604, 0x608, 5
    tables.reset = (0x60C, 1)
    tables.rtc, tables.century, tables.i8042, tables.power_button = True, 0x32, True, True
    tables.dsdt += [
        acpi.uart_node(0x3F8, irq=4, uid=1),
        acpi.rtc_node(),
        acpi.keyboard_node(),
        acpi.pvpanic_node(0x505),
    ]
    tables.add_pci_host(ecam=0xE0000000, ports=0xCF8, window=(0xC1000000, 0x1F000000), pins={1: 17, 2: 18, 31: 23})
    tables.add_generation_id(0x1_000FF000, gsi=7)
    return tables


class Guest:
    """The tables as a guest finds them: from the RSDP on, by address, checking each checksum on the way."""

    def __init__(
        self, tables: acpi.Tables, *, cpus: int | Sequence[int] = 1, address: int = acpi.DEFAULT_ADDRESS
    ) -> None:
        rsdp, self.blobs = acpi.build(tables, cpus=cpus, address=address)
        self.base = address
        self.area = bytearray(acpi.DEFAULT_SIZE)
        for gpa, blob in self.blobs:
            assert not any(self.read(gpa, len(blob))), "tables overlap"
            self.area[gpa - address : gpa - address + len(blob)] = blob
        self.rsdp = self.read(rsdp, 36)
        assert self.rsdp[:8] == b"RSD PTR " and self.rsdp[15] == 2
        assert sum(self.rsdp[:20]) % 256 == 0 and sum(self.rsdp) % 256 == 0
        xsdt = self.table(struct.unpack_from("<Q", self.rsdp, 24)[0])
        entries = struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
        self.tables = {table[:4]: table for table in map(self.table, entries)}
        self.fadt = self.tables[b"FACP"]
        self.dsdt = self.table(struct.unpack_from("<I", self.fadt, 40)[0])
        self.madt = list(self.madt_entries())

    def read(self, gpa: int, size: int) -> bytes:
        assert self.base <= gpa and gpa + size <= self.base + len(self.area)
        return bytes(self.area[gpa - self.base : gpa - self.base + size])

    def table(self, gpa: int) -> bytes:
        assert gpa % 16 == 0
        table = self.read(gpa, int.from_bytes(self.read(gpa + 4, 4), "little"))
        assert len(table) >= 36 and sum(table) % 256 == 0
        return table

    def madt_entries(self) -> Iterator[tuple[int, bytes]]:
        rest = self.tables[b"APIC"][44:]
        while rest:
            assert 2 <= rest[1] <= len(rest)
            yield rest[0], rest[2 : rest[1]]
            rest = rest[rest[1] :]

    def madt_of(self, kind: int) -> list[bytes]:
        return [body for entry, body in self.madt if entry == kind]


def u(table: bytes, offset: int, size: int) -> int:
    return int.from_bytes(table[offset : offset + size], "little")


def test_every_table_is_found_from_the_rsdp_and_sums_to_zero() -> None:
    guest = Guest(described(), cpus=2)
    assert set(guest.tables) == {b"FACP", b"APIC", b"MCFG"}
    assert guest.dsdt[:4] == b"DSDT"


def test_a_legacy_scan_finds_the_rsdp() -> None:
    guest = Guest(described())
    found = [at for at in range(0, 0x20000, 16) if guest.area[at : at + 8] == b"RSD PTR "]
    assert found == [0]


def test_tables_can_lie_elsewhere() -> None:
    Guest(described(), address=0x7FFE0000)


def test_blobs_ascend_and_do_not_overlap() -> None:
    _, blobs = acpi.build(described(), cpus=300)
    for (first, blob), (second, _) in pairwise(blobs):
        assert first + len(blob) <= second


def test_fadt_fields_are_where_the_specification_puts_them() -> None:
    fadt = Guest(described()).fadt
    assert len(fadt) == 276 and (fadt[8], fadt[131]) == (6, 3)
    assert u(fadt, 46, 2) == 9  # SCI_INT
    assert u(fadt, 48, 4) == 0  # SMI_CMD
    assert (fadt[116], u(fadt, 120, 8), fadt[128]) == (1, 0x60C, 1)  # RESET_REG, RESET_VALUE
    assert fadt[108] == 0x32
    assert u(fadt, 109, 2) == 0b010111  # legacy devices, 8042, no VGA, no ASPM; there is an RTC
    flags = u(fadt, 112, 4)
    assert not flags & 1 << 20, "HW_REDUCED_ACPI"
    assert not flags & 1 << 4, "the power button is fixed hardware"
    assert flags & 1 << 8 and flags & 1 << 10, "32-bit timer, reset register"


# (32-bit field, its length field, extended field), ACPI 6.3 table 5-33: what Linux compares and warns about.
BLOCKS = {"PM1a_EVT": (56, 88, 148), "PM1a_CNT": (64, 89, 172), "PM_TMR": (76, 91, 208)}
ABSENT = {"PM1b_EVT": (60, 160), "PM1b_CNT": (68, 184), "PM2_CNT": (72, 196), "GPE0": (80, 220), "GPE1": (84, 232)}


def test_fadt_old_and_extended_registers_agree() -> None:
    fadt = Guest(described()).fadt
    for block, (old, length, extended) in BLOCKS.items():
        assert u(fadt, old, 4) == u(fadt, extended + 4, 8) != 0, block
        assert fadt[extended] == 1, "system I/O"
        assert fadt[extended + 1] == 8 * fadt[length], block
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)


def test_fadt_absent_registers_are_all_zero() -> None:
    tables = described()
    tables.pm_timer, tables.reset = 0, None
    fadt = Guest(tables).fadt
    for block, (old, extended) in {**ABSENT, "PM_TMR": (76, 208)}.items():
        assert not any(fadt[old : old + 4] + fadt[extended : extended + 12]), block
    assert fadt[90:96] == bytes((0,)) * 6  # PM2, timer, GPE lengths
    assert not any(fadt[116:129])
    assert not u(fadt, 112, 4) & (1 << 8 | 1 << 10)


def test_facs_is_aligned_to_64_and_named_once() -> None:
    guest = Guest(described())
    facs = u(guest.fadt, 36, 4)
    assert facs % 64 == 0 and u(guest.fadt, 132, 8) == 0
    assert guest.read(facs, 8) == b"FACS" + struct.pack("<I", 64)
    assert u(guest.fadt, 40, 4) == u(guest.fadt, 140, 8)  # DSDT, X_DSDT


def test_boot_architecture_follows_the_devices() -> None:
    tables = acpi.Tables()
    tables.pm1a_event, tables.pm1a_control = 0x600, 0x604
    fadt = Guest(tables).fadt
    assert u(fadt, 109, 2) == 0b110101  # no 8042, no RTC
    assert u(fadt, 112, 4) & 1 << 4, "no fixed power button"


@pytest.mark.parametrize("cpus", [1, 2, 64, 255, 300])
def test_madt_has_one_entry_for_each_vcpu(cpus: int) -> None:
    guest = Guest(described(), cpus=cpus)
    local = [(body[0], body[1], u(body, 2, 4)) for body in guest.madt_of(0)]
    extended = [(u(body, 10, 4), u(body, 2, 4), u(body, 6, 4)) for body in guest.madt_of(9)]
    assert local + extended == [(n, n, 1) for n in range(cpus)]
    assert len(local) == min(cpus, 255), "an 8-bit APIC id of 255 is the broadcast"
    assert guest.madt_of(4) == [b"\xff\x00\x00\x01"]
    assert len(guest.madt_of(10)) == (cpus > 255)


def test_madt_uses_the_apic_ids_given() -> None:
    guest = Guest(described(), cpus=[0, 4, 0x10000])
    assert [(body[0], body[1]) for body in guest.madt_of(0)] == [(0, 0), (1, 4)]
    assert [(u(body, 2, 4), u(body, 10, 4)) for body in guest.madt_of(9)] == [(0x10000, 2)]


def test_madt_overrides_the_sci_alone_unless_told() -> None:
    tables = described()
    assert Guest(tables).madt_of(2) == [struct.pack("<BBIH", 0, 9, 9, 0x0D)]
    tables.override(0, 2)
    tables.override(11, 11, level=True, active_low=True)
    assert Guest(tables).madt_of(2) == [
        struct.pack("<BBIH", 0, 0, 2, 0x05),
        struct.pack("<BBIH", 0, 9, 9, 0x0D),
        struct.pack("<BBIH", 0, 11, 11, 0x0F),
    ]


def test_madt_io_apic() -> None:
    assert Guest(described()).madt_of(1) == [struct.pack("<BBII", 0, 0, 0xFEC00000, 0)]


def test_dsdt_has_a_node_for_each_processor_with_its_uid() -> None:
    dsdt = Guest(described(), cpus=300).dsdt
    for uid in range(300):
        assert dsdt.count(acpi.cpu_node(uid)) == 1
    assert aml.name("\\_S5", [5, 5, 0, 0]) in dsdt


def test_without_power_off_there_is_no_s5() -> None:
    tables = described()
    tables.s5 = None
    assert b"_S5_" not in Guest(tables).dsdt


def test_an_edge_of_its_line_notifies_the_driver_of_the_generation_id() -> None:
    dsdt = Guest(described()).dsdt
    assert aml.name("ADDR", [0x000FF000, 1]) in dsdt
    happened = aml.if_(aml.equal(aml.arg(0), 7), aml.notify("\\_SB.VGEN", 0x80))
    assert aml.method("_EVT", happened, args=1, serialized=True) in dsdt
    assert aml.resources(aml.interrupt(7)) in dsdt, "edge-triggered, active high"


def test_one_event_device_serves_every_line() -> None:
    tables = described()
    tables.on_event(22, aml.notify("\\_SB.COM1", 1))
    dsdt = Guest(tables).dsdt
    assert dsdt.count(b"ACPI0013") == 1
    assert aml.resources(aml.interrupt(7), aml.interrupt(22)) in dsdt
    tables.events.clear()
    assert b"ACPI0013" not in Guest(tables).dsdt


def test_mcfg_names_its_buses() -> None:
    body = acpi.mcfg(0xE0000000, first_bus=1, last_bus=9)[36:]
    assert struct.unpack("<8xQHBB4x", body) == (0xE0000000, 0, 1, 9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pm1a_event": 0}, "attach"),
        ({"pm1a_control": 0x10000}, "16 bits"),
        ({"pm_timer": -1}, "16 bits"),
        ({"sci": 16}, "4 bits"),
        ({"s5": 8}, "3 bits"),
        ({"reset": (0x60C, 256)}, "8 bits"),
        ({"century": 256}, "8 bits"),
    ],
)
def test_hardware_that_cannot_be_described_is_refused(change: dict[str, object], says: str) -> None:
    tables = described()
    for attribute, value in change.items():
        setattr(tables, attribute, value)
    with pytest.raises(ConfigError, match=says):
        acpi.build(tables, cpus=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"cpus": 0}, "at least one"),
        ({"cpus": [0, 0]}, "its own"),
        ({"cpus": [0, 0xFFFF_FFFF]}, "no APIC id"),
        ({"cpus": [-1]}, "no APIC id"),
        ({"cpus": 1, "address": 0xE0008}, "aligned"),
        ({"cpus": 1, "address": 0xFFFF_FFF0}, "below 4 GiB"),
        ({"cpus": 1, "size": 16}, "reserve more"),
        ({"cpus": 4096}, "reserve more"),
        ({"cpus": 4097, "size": 1 << 20}, "4096"),
    ],
)
def test_impossible_layouts_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        acpi.build(described(), **arguments)  # type: ignore[arg-type]


def test_the_area_is_used_to_its_last_byte_and_not_beyond() -> None:
    _, blobs = acpi.build(described(), cpus=1)
    used = blobs[-1][0] + len(blobs[-1][1]) - acpi.DEFAULT_ADDRESS
    acpi.build(described(), cpus=1, size=used)
    with pytest.raises(ConfigError, match="reserve more"):
        acpi.build(described(), cpus=1, size=used - 1)


def test_a_table_with_a_wrong_length_or_checksum_is_refused() -> None:
    good = acpi.table(b"SSDT", 2, b"")
    for bad in (good[:-1], good + b"\0", good[:9] + bytes((good[9] ^ 1,)) + good[10:], b""):
        with pytest.raises(ConfigError, match="no table"):
            acpi.Tables().add(bad)


@pytest.mark.parametrize("cpus", [1, 2, 64, 300])
def test_iasl_takes_every_table_apart_and_compiles_it_again_without_complaint(cpus: int, tmp_path: Path) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("iasl is not installed (Debian: acpica-tools)")
    _, blobs = acpi.build(described(), cpus=cpus)
    sources = []
    for _, blob in blobs[1:]:  # the RSDP is not a table with a header: iasl reads none from a file of its own
        name = blob[:4].decode()
        (tmp_path / f"{name}.aml").write_bytes(blob)
        run = subprocess.run([iasl, "-d", f"{name}.aml"], cwd=tmp_path, capture_output=True, text=True)
        said = run.stdout + run.stderr
        assert run.returncode == 0, said
        assert not any(word in said.lower() for word in ("error", "warning", "invalid")), said
        text = (tmp_path / f"{name}.dsl").read_text()
        assert not any(word in text for word in ("**** ", "Invalid", "Unknown", "incorrect checksum")), text
        sources.append(f"{name}.dsl")
    assert sources == ["FACS.dsl", "DSDT.dsl", "FACP.dsl", "APIC.dsl", "MCFG.dsl", "XSDT.dsl"]
    for source in sources:
        run = subprocess.run([iasl, "-p", "again", source], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0 and "0 Errors, 0 Warnings, 0 Remarks" in run.stdout, run.stdout + run.stderr
