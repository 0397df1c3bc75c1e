"""bzImage and vmlinux: the two ways in, the zero page, and every lie a header can tell."""

from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING

import pytest
from boot_images import INIT_SIZE, KERNEL_AT, LINUX_NOTE, MIB, STUB, Load, bzimage, elf, vmlinux
from boot_memory import FakeMemory

from vmm import boot
from vmm.boot import places
from vmm.boot.bzimage import SetupHeader
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from pathlib import Path

PAYLOAD = gzip.compress(vmlinux(b"KERNEL" * 10))


def memory(size: int = 64 * MIB) -> FakeMemory:
    return FakeMemory(size)


def load(image: bytes, ram: FakeMemory | None = None, **how: object) -> boot.Entry:
    return boot.load(ram or memory(), image=image, name="k", **how)  # type: ignore[arg-type]


def zero_page(ram: FakeMemory, entry: boot.Entry) -> bytes:
    return ram.read(entry.registers["rsi"], 4096)


def u32(page: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", page, offset)[0])


def test_a_payload_is_unpacked_on_the_host_and_entered_at_its_elf_entry() -> None:
    ram = memory()
    entry = load(bzimage(PAYLOAD), ram)
    assert (entry.kind, entry.mode, entry.rip) == ("bzimage", "long", KERNEL_AT)
    assert ram.read(KERNEL_AT, 60) == b"KERNEL" * 10
    assert ram.read(KERNEL_AT + MIB, 32) == b"data" * 8
    assert any("6.1.0-test" in note and "2.15" in note for note in entry.notes)


def test_a_packed_kernel_is_entered_at_its_64_bit_entry() -> None:
    ram = memory()
    entry = load(bzimage(PAYLOAD), ram, unpack="guest")
    assert entry.rip == KERNEL_AT + 0x200
    assert ram.read(KERNEL_AT, len(STUB) + len(PAYLOAD)) == STUB + PAYLOAD
    assert u32(zero_page(ram, entry), 0x214) == KERNEL_AT


def test_a_kernel_that_cannot_be_relocated_is_loaded_at_code32_start() -> None:
    ram = memory()
    entry = load(bzimage(relocatable_kernel=0, pref_address=MIB), ram)
    assert entry.rip == MIB + 0x200
    assert ram.read(MIB, len(STUB)) == STUB


@pytest.mark.parametrize(
    ("payload", "why"),
    [(b"", "no payload"), (b"\x01\x02\x03" * 20, "unknown payload format"), (gzip.compress(bytes(99)), "no ELF")],
    ids=["empty", "unknown", "not-an-elf"],
)
def test_what_cannot_be_unpacked_here_is_left_to_the_guest(payload: bytes, why: str) -> None:
    entry = load(bzimage(payload))
    assert entry.rip == KERNEL_AT + 0x200
    assert any(why in note for note in entry.notes)
    with pytest.raises(ImageError, match="leave the unpacking to the guest"):
        load(bzimage(payload), unpack="host")


def test_the_zero_page_holds_the_setup_header_and_what_a_loader_adds() -> None:
    ram = FakeMemory(64 * MIB, 16 * MIB)
    image = bzimage(PAYLOAD, loadflags=0x03)
    entry = load(image, ram, cmdline="console=ttyS0 x=1", initrds=[("i", b"INITRD")], acpi_rsdp=0xE0000)
    page = zero_page(ram, entry)
    assert page[0x1F1] == image[0x1F1] and page[0x202:0x208] == image[0x202:0x208]
    assert page[0x230:0x23C] == image[0x230:0x23C]
    assert page[0x210] == 0xFF  # type_of_loader: undefined
    assert page[0x211] == 0x01  # loaded high, and no KASLR_FLAG left from whoever built the image
    assert page[0x1EF] == 0  # sentinel
    assert page[0x26C:0x290] == bytes(0x24)
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0000,)
    assert ram.read(u32(page, 0x228), 18) == b"console=ttyS0 x=1\0"
    ramdisk = u32(page, 0x218)
    assert ram.read(ramdisk, u32(page, 0x21C)) == b"INITRD"
    assert ramdisk % 4096 == 0 and ramdisk + 4096 == 64 * MIB
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    assert entries == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xA0000, 0x60000, 2),
        (0x100000, 63 * MIB, 1),
        (4096 * MIB, 16 * MIB, 1),
    ]


def test_initrds_are_joined_each_at_a_multiple_of_four() -> None:
    ram = memory()
    entry = load(bzimage(PAYLOAD), ram, initrds=[("a", b"aaaaa"), ("b", b"bb"), ("c", b"c")])
    page = zero_page(ram, entry)
    assert ram.read(u32(page, 0x218), u32(page, 0x21C)) == b"aaaaa\0\0\0bb\0\0c"


@pytest.mark.parametrize("unpack", ["host", "guest"])
def test_an_initrd_keeps_clear_of_the_running_kernel_and_below_its_limit(unpack: str) -> None:
    ram = memory()
    limit = KERNEL_AT + INIT_SIZE + 0x2FFF
    entry = load(bzimage(PAYLOAD, initrd_addr_max=limit), ram, initrds=[("i", bytes(0x2000))], unpack=unpack)
    ramdisk = u32(zero_page(ram, entry), 0x218)
    assert ramdisk >= KERNEL_AT + INIT_SIZE and ramdisk + 0x2000 <= limit + 1
    below = load(bzimage(PAYLOAD, initrd_addr_max=limit), ram, initrds=[("i", bytes(0x4000))], unpack=unpack)
    assert u32(zero_page(ram, below), 0x218) == KERNEL_AT - 0x4000


def test_an_initrd_larger_than_memory_says_how_much_is_needed() -> None:
    with pytest.raises(ImageError, match=r"^big: initrd of 67108864 bytes \(64M\) does not fit.*at least 8[45]M"):
        load(bzimage(PAYLOAD), initrds=[("big", bytes(64 * MIB))])


@pytest.mark.parametrize("unpack", ["host", "guest"])
def test_too_little_memory_says_how_much_is_needed(unpack: str) -> None:
    with pytest.raises(ImageError, match="at least 20M"):
        load(bzimage(PAYLOAD), memory(18 * MIB), unpack=unpack)
    assert load(bzimage(PAYLOAD), memory(20 * MIB), unpack=unpack)


def test_a_command_line_may_be_as_long_as_the_kernel_says_and_no_longer() -> None:
    assert load(bzimage(PAYLOAD, cmdline_size=100), cmdline="x" * 100)
    with pytest.raises(ConfigError, match="101 bytes long, more than the 100 that k takes"):
        load(bzimage(PAYLOAD, cmdline_size=100), cmdline="x" * 101)
    with pytest.raises(ConfigError, match="65535"):
        load(bzimage(PAYLOAD, cmdline_size=0xFFFFFFFF), cmdline="x" * 70_000)
    with pytest.raises(ConfigError, match="NUL"):
        load(bzimage(PAYLOAD), cmdline="a\0b")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": 0x0205}, "protocol 2.05 is older than 2.06"),
        ({"boot_flag": 0x1234}, "boot flag 0x1234"),
        ({"setup_sects": 200}, "truncated"),
        ({"syssize": 0x1000}, "truncated"),
        ({"syssize": 0}, "truncated"),
        ({"loadflags": 0}, "zImage"),
        ({"kernel_alignment": 0x300000}, "alignment 0x300000"),
        ({"kernel_alignment": 0}, "alignment 0x0"),
        ({"payload_offset": 0xFFFFFFF0}, "payload at 0xfffffff0"),
        ({"payload_length": 0x10000}, "payload at"),
        ({"pref_address": 0x1000}, "pref_address 0x1000"),
        ({"pref_address": 1 << 40}, "pref_address 0x10000000000"),
        ({"code32_start": 0x10000}, "code32_start 0x10000"),
        ({"code32_start": 0, "version": 0x0207}, "begins in real mode and needs a BIOS"),
        ({"initrd_addr_max": 5}, "initrd_addr_max 0x5"),
        ({"init_size": 0xFFFFFFFF}, "running kernel needs guest memory"),
        ({"init_size": 0x100}, "claims to unpack to"),
        ({"jump": 0x10EB}, "setup header ends at 0x212"),
        ({"jump": 0xFFEB}, "setup header ends at 0x301"),
        ({"cmdline_size": 0}, "no command line"),
    ],
)
def test_a_header_that_lies_is_refused_by_the_field(fields: dict[str, int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(bzimage(PAYLOAD, **fields))


def test_fields_younger_than_the_protocol_have_their_documented_values() -> None:
    header = SetupHeader(boot.Image.of(bzimage(PAYLOAD, version=0x0206, cmdline_size=300), "k"))
    assert (header.cmdline_size, header.payload_length, header.pref_address, header.init_size) == (300, 0, MIB, 0)
    with pytest.raises(AttributeError, match="cannot be changed"):
        header.init_size = 1


def test_an_old_kernel_without_init_size_is_unpacked_within_guest_memory() -> None:
    assert load(bzimage(PAYLOAD, version=0x0208)).rip == KERNEL_AT


def test_a_kernel_with_only_a_32_bit_entry_is_refused() -> None:
    with pytest.raises(ImageError, match="no 64-bit entry point"):
        load(bzimage(PAYLOAD, xloadflags=0x7E), unpack="guest")
    thirty_two = gzip.compress(elf(Load(KERNEL_AT, b"x"), bits=32, entry=KERNEL_AT))
    with pytest.raises(ImageError, match="32-bit kernel; only 64-bit"):
        load(bzimage(thirty_two, xloadflags=0))


def test_a_corrupt_payload_is_an_error_and_not_left_to_the_guest() -> None:
    damaged = bytearray(PAYLOAD)
    damaged[len(damaged) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="gzip payload is damaged"):
        load(bzimage(bytes(damaged)))


def test_relocations_after_the_unpacked_elf_are_ignored() -> None:
    assert load(bzimage(gzip.compress(vmlinux() + bytes(5000)))).rip == KERNEL_AT


def test_a_vmlinux_is_entered_by_the_64_bit_boot_protocol(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(vmlinux(b"TEXT"))
    ram = memory()
    with boot.Image.open(tmp_path / "vmlinux") as image:
        assert boot.identify(image) == "linux64"
        entry = boot.load(ram, image=image, cmdline="root=/dev/vda")
    assert (entry.kind, entry.rip, entry.symbols) == ("linux64", KERNEL_AT, str(tmp_path / "vmlinux"))
    page = zero_page(ram, entry)
    assert page[0x202:0x206] == b"HdrS" and page[0x210] == 0xFF
    assert ram.read(u32(page, 0x228), 14) == b"root=/dev/vda\0"
    assert ram.read(KERNEL_AT, 4) == b"TEXT"


def test_an_older_vmlinux_is_known_by_its_banner() -> None:
    image = elf(Load(KERNEL_AT, bytes(3 << 20) + b"Linux version 3.2.1"), entry=KERNEL_AT)
    assert boot.identify(image) == "linux64"
    assert boot.identify(elf(Load(KERNEL_AT, b"Linux is a kernel"), entry=KERNEL_AT)) == "elf64"


def test_a_virtual_entry_point_is_translated() -> None:
    high = 0xFFFFFFFF81000000
    image = elf(Load(KERNEL_AT, b"x" * 64, vaddr=high), entry=high + 8, notes=LINUX_NOTE)
    assert load(image).rip == KERNEL_AT + 8


def test_linux_is_entered_with_the_segments_its_protocol_names() -> None:
    ram = memory()
    entry = load(bzimage(PAYLOAD), ram)
    assert (entry.cs, entry.ds, entry.ss) == (0x10, 0x18, 0x18)
    code, data = struct.unpack("<2Q", ram.read(entry.gdt_base + 0x10, 16))
    # Intel SDM vol. 3, 3.4.5: L and P and code, execute/read, DPL 0 | P, read/write, G, D/B, flat.
    assert code >> 40 & 0x9F == 0x9B and code >> 53 & 1 == 1 and code >> 54 & 1 == 0
    assert data >> 40 & 0x9F == 0x93 and data >> 55 & 1 == 1 and data & 0xFFFF == 0xFFFF and data >> 16 & 0xFFFFFF == 0
    assert entry.gdt_limit >= 0x1F


def test_the_page_tables_map_the_first_4_gib_to_themselves_in_2_mib_pages() -> None:
    ram = memory()
    entry = load(bzimage(PAYLOAD), ram)

    def translate(address: int) -> int:
        table = entry.cr3
        item: int
        for shift in (39, 30):
            (item,) = struct.unpack("<Q", ram.read(table + (address >> shift & 511) * 8, 8))
            assert item & 0x83 == 0x03, "present, writable, and no 1 GiB page"
            table = item & ~0xFFF
        (item,) = struct.unpack("<Q", ram.read(table + (address >> 21 & 511) * 8, 8))
        assert item & 0x83 == 0x83
        return (item & ~0x1FFFFF) | address & 0x1FFFFF

    for address in (0, 0x1FFFFF, 0x200000, KERNEL_AT + 5, (1 << 30) - 1, 1 << 30, 0xC0000000, 0xFFFFFFFF):
        assert translate(address) == address
    assert places.PAGE_TABLES + 6 * 4096 <= places.START_INFO
