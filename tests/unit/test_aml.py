"""The AML builder: encodings byte for byte, what it refuses, and iasl's reading of what it writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.boot import acpi, aml
from vmm.errors import ConfigError


def decode_length(encoded: bytes) -> tuple[int, int]:
    """(value, bytes used) of a PkgLength: a reading of ACPI 6.3, 20.2.4 apart from the builder's writing."""
    follow = encoded[0] >> 6
    if follow == 0:
        return encoded[0] & 0x3F, 1
    value = encoded[0] & 0xF
    for position in range(follow):
        value |= encoded[1 + position] << (4 + 8 * position)
    return value, 1 + follow


def decode_integer(term: bytes) -> int:
    if term in (b"\x00", b"\x01"):
        return term[0]
    if term == b"\xff":
        return 2**64 - 1
    size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[term[0]]
    assert len(term) == 1 + size
    return int.from_bytes(term[1:], "little")


@given(st.integers(0, 2**64 - 1) | st.sampled_from([2**n + d for n in (8, 16, 32, 63) for d in (-1, 0, 1)]))
def test_integer_reads_back_and_is_as_short_as_can_be(value: int) -> None:
    term = aml.integer(value)
    assert decode_integer(term) == value
    if 1 < value < 2**64 - 1:
        shortest = next(size for size in (1, 2, 4, 8) if value < 1 << 8 * size)
        assert len(term) == 1 + shortest


@pytest.mark.parametrize("value", [-1, 2**64])
def test_integer_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match="64 bits"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("content", "encoded"),
    [
        (0, "01"),
        (62, "3f"),  # a total of 63: the last that fits one byte
        (63, "4104"),  # 65: a total of 64 cannot be, as the second byte counts
        (4093, "4fff"),  # 4095: the last that fits two
        (4094, "810001"),  # 4097
        (2**20 - 4, "8fffff"),
        (2**20 - 3, "c1000001"),
        (2**28 - 5, "cfffffff"),
    ],
)
def test_pkg_length_at_its_edges(content: int, encoded: str) -> None:
    assert aml.pkg_length(content).hex() == encoded


@given(st.integers(0, 2**28 - 5))
def test_pkg_length_counts_itself(content: int) -> None:
    encoded = aml.pkg_length(content)
    value, used = decode_length(encoded)
    assert used == len(encoded)
    assert value == content + used


def test_pkg_length_beyond_28_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="2\\^28"):
        aml.pkg_length(2**28 - 4)


@pytest.mark.parametrize("bits", [1, 63, 64, 4095, 4096, 2**20, 2**28 - 1])
def test_field_width_counts_bits_only(bits: int) -> None:
    term = aml.field("REGN", ("WIDE", bits), access=32)
    assert term[:2] == b"\x5b\x81"
    total, used = decode_length(term[2:])
    assert total == len(term) - 2
    rest = term[2 + used :]
    assert rest[:9] == b"REGN\x03WIDE"
    assert decode_length(rest[9:]) == (bits, len(rest) - 9)


@pytest.mark.parametrize("bits", [0, -1, 2**28])
def test_field_of_impossible_width_is_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="field of"):
        aml.field("REGN", ("WIDE", bits))


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("A", b"A___"),
        ("_CRS", b"_CRS"),
        ("\\", b"\\\x00"),
        ("^", b"^\x00"),
        ("\\_SB", b"\\_SB_"),
        ("^^LNKA", b"^^LNKA"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\_SB.PCI0.S1", b"\\\x2f\x03_SB_PCI0S1__"),
    ],
)
def test_path_encoding(text: str, encoded: bytes) -> None:
    assert aml.path(text) == encoded


@pytest.mark.parametrize(
    "text",
    ["", "abcd", "TOOLONG", "1ABC", "A-B", "A..B", ".A", "A.", "\\\\A", "^\\A", "\\^A", "Ä", ".".join(["A"] * 256)],
)
def test_path_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        aml.path(text)


def test_package_counts_elements_and_nests() -> None:
    assert aml.data([1, "a", [0x1234]]) == bytes.fromhex("12 0c 03 01 0d6100 12 05 01 0b3412")


def test_package_above_255_elements_is_a_var_package() -> None:
    assert aml.package(*range(2, 257))[0] == 0x12
    large = aml.package(*[0] * 256)
    assert large[0] == 0x13
    total, used = decode_length(large[1:])
    assert total == len(large) - 1
    assert large[1 + used :] == b"\x0b\x00\x01" + bytes(256)


def test_string_that_is_not_ascii_is_refused() -> None:
    for text in ("ä", "a\0b"):
        with pytest.raises(ConfigError, match="ASCII"):
            aml.string(text)


def test_eisa_ids_as_the_specification_writes_them() -> None:
    assert aml.eisaid("PNP0303").hex() == "0c41d00303"
    assert aml.eisaid("PNP0A08").hex() == "0c41d00a08"


@pytest.mark.parametrize("text", ["PNP050", "PNP05011", "pnp0501", "PN_0501", "PNP05G1", "PNP 501"])
def test_eisa_id_of_wrong_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="EISA"):
        aml.eisaid(text)


def test_uuid_swaps_its_first_three_fields() -> None:
    raw = aml.uuid("33221100-5544-7766-8899-aabbccddeeff")
    assert raw[-16:] == bytes.fromhex("00112233445566778899aabbccddeeff")
    with pytest.raises(ConfigError, match="UUID"):
        aml.uuid("33221100")


@pytest.mark.parametrize(
    ("descriptor", "encoded"),
    [
        (aml.io(0x3F8, 8), "47 01 f803 f803 01 08"),
        (aml.irq(4), "22 1000"),
        (aml.irq(9, level=True, active_low=True, shared=True), "23 0002 18"),
        (aml.interrupt(16), "89 0600 03 01 10000000"),
        (aml.interrupt(16, 17, level=True, shared=True), "89 0a00 09 02 10000000 11000000"),
        (aml.memory32_fixed(0xC0000000, 0x1000), "86 0900 01 000000c0 00100000"),
        (aml.word_bus_number(0, 256), "88 0d00 02 0c 00 0000 0000 ff00 0000 0001"),
        (aml.word_io(0x1000, 0xF000), "88 0d00 01 0c 03 0000 0010 ffff 0000 00f0"),
        (aml.dword_memory(0xC1000000, 0x1000), "87 1700 00 0c 01 00000000 000000c1 ff0f00c1 00000000 00100000"),
        (
            aml.qword_memory(1 << 40, 1 << 32, cacheable=True),
            "8a 2b00 00 0c 03 0000000000000000 0000000000010000 ffffffff00010000 0000000000000000 0000000001000000",
        ),
    ],
)
def test_resource_descriptor_encoding(descriptor: bytes, encoded: str) -> None:
    assert descriptor == bytes.fromhex(encoded)


@pytest.mark.parametrize(
    "make",
    [
        lambda: aml.io(0xFFFF, 2),
        lambda: aml.io(0x3F8, 0),
        lambda: aml.io(0x1000, 256),
        lambda: aml.irq(16),
        lambda: aml.interrupt(),
        lambda: aml.interrupt(1 << 32),
        lambda: aml.memory32_fixed(0xFFFFF000, 0x1001),
        lambda: aml.word_io(0, 0x10000),
        lambda: aml.qword_memory((1 << 64) - 1, 2),
        lambda: aml.method("M", args=8),
        lambda: aml.arg(7),
        lambda: aml.local(8),
        lambda: aml.operation_region("R", 256, 0, 1),
        lambda: aml.field("R", ("A", 8), access=24),
    ],
)
def test_what_does_not_fit_its_field_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        make()


# --- iasl reads what the builder writes -------------------------------------------------------------------


def decompile(iasl: str, table: bytes, directory: Path) -> str:
    """The ASL that iasl makes of ``table``, which it also has to compile again without a complaint."""
    binary = directory / "table.aml"
    binary.write_bytes(table)
    taken_apart = subprocess.run([iasl, "-d", binary.name], cwd=directory, capture_output=True, text=True)
    messages = taken_apart.stdout + taken_apart.stderr
    assert taken_apart.returncode == 0, messages
    assert not any(word in messages.lower() for word in ("error", "warning", "invalid")), messages
    source = directory / "table.dsl"
    compiled = subprocess.run([iasl, "-p", "again", source.name], cwd=directory, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings, 0 Remarks" in compiled.stdout, compiled.stdout + compiled.stderr
    return source.read_text()


@pytest.fixture
def iasl() -> str:
    found = shutil.which("iasl")
    if found is None:
        pytest.skip("iasl is not installed (Debian: acpica-tools)")
    return found


def ssdt(*terms: bytes) -> bytes:
    return acpi.table(b"SSDT", 2, b"".join(terms))


def test_iasl_reads_a_virtio_mmio_device(iasl: str, tmp_path: Path) -> None:
    node = aml.device(
        "VR00",
        aml.name("_HID", "LNRO0005"),
        aml.name("_UID", 0),
        aml.name("_CCA", 1),
        aml.name("_CRS", aml.resources(aml.memory32_fixed(0xC0000000, 0x1000), aml.interrupt(16))),
    )
    asl = decompile(iasl, ssdt(aml.scope("\\_SB", node)), tmp_path)
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive" in asl
    assert "0xC0000000" in asl


def test_iasl_reads_a_pci_host_bridge(iasl: str, tmp_path: Path) -> None:
    routing = [[slot << 16 | 0xFFFF, pin, 0, 16 + (slot + pin) % 8] for slot in range(32) for pin in range(4)]
    windows = aml.resources(
        aml.word_bus_number(0, 256),
        aml.io(0xCF8, 8),
        aml.word_io(0x1000, 0xF000),
        aml.dword_memory(0xC1000000, 0x1F000000),
        aml.qword_memory(1 << 40, 1 << 38, cacheable=True),
    )
    # _OSC (ACPI 6.3, 6.2.11): grant what Arg3 asks for and bit 4 allows; an unknown UUID is error bit 2.
    negotiate = aml.method(
        "_OSC",
        aml.create_dword_field(aml.arg(3), 0, "CDW1"),
        aml.if_(
            aml.equal(aml.arg(0), aml.uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")),
            aml.create_dword_field(aml.arg(3), 8, "CDW3"),
            aml.and_(aml.path("CDW3"), 0x10, aml.local(0)),
            aml.store(aml.local(0), aml.path("CDW3")),
        ),
        aml.else_(aml.or_(aml.path("CDW1"), 4, aml.path("CDW1"))),
        aml.return_(aml.arg(3)),
        args=4,
        serialized=True,
    )
    bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisaid("PNP0A08")),
        aml.name("_CID", aml.eisaid("PNP0A03")),
        aml.name("_BBN", 0),
        aml.name("_SEG", 0),
        aml.name("_UID", 0),
        aml.name("_PRT", routing),
        aml.name("_CRS", windows),
        negotiate,
    )
    asl = decompile(iasl, ssdt(aml.scope("\\_SB", bridge)), tmp_path)
    for text in (
        "PCI Express Bus",
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode",
        "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange",
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite",
        "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite",
        'ToUUID ("33db4d5b-1ff7-401c-9657-7441c03dd766")',
        "Method (_OSC, 4, Serialized)",
        "Package (0x80)",
    ):
        assert text in asl


def test_iasl_reads_vmgenid_behind_a_generic_event_device(iasl: str, tmp_path: Path) -> None:
    generation = aml.device(
        "VGEN",
        aml.name("_HID", "TEST0002"),  # iasl wants hexadecimal digits; drivers go by the _CID
        aml.name("_CID", "VM_Gen_Counter"),
        aml.name("_DDN", "VM_Gen_Counter"),
        aml.name("ADDR", [0x1000, 0]),
    )
    event = aml.device(
        "GED",
        aml.name("_HID", "ACPI0013"),
        aml.name("_UID", 0),
        aml.name("_CRS", aml.resources(aml.interrupt(17))),
        aml.method(
            "_EVT",
            aml.if_(aml.equal(aml.arg(0), 17), aml.notify("\\_SB.VGEN", 0x80)),
            args=1,
            serialized=True,
        ),
    )
    asl = decompile(iasl, ssdt(aml.scope("\\_SB", generation, event)), tmp_path)
    assert "Notify (\\_SB.VGEN, 0x80)" in asl


def test_iasl_reads_regions_fields_and_methods(iasl: str, tmp_path: Path) -> None:
    body = aml.scope(
        "\\_SB",
        aml.device(
            "REGS",
            aml.name("_HID", "TEST0001"),
            aml.operation_region("PORT", aml.SYSTEM_IO, 0x505, 16),
            aml.field("PORT", ("LOW", 4), (None, 4), ("HIGH", 120), access=8),
            aml.operation_region("MEMO", aml.SYSTEM_MEMORY, 0xFED00000, 0x1000),
            aml.field("MEMO", (None, 4096), ("DEEP", 32), access=32),
            aml.name("BUFF", aml.buffer(bytes(range(100)))),
            aml.method("TEST", aml.if_(aml.not_(aml.path("LOW")), aml.return_("zero")), aml.return_(aml.path("DEEP"))),
            aml.method("WRIT", aml.store(aml.arg(0), aml.path("LOW")), args=1),
        ),
    )
    asl = decompile(iasl, ssdt(body), tmp_path)
    assert "OperationRegion (PORT, SystemIO, 0x0505, 0x10)" in asl
    assert "Offset (0x200)" in asl  # 4096 bits in
    assert 'Return ("zero")' in asl
