"""Images built by hand, field by field, so that a test can make any one of them a lie."""

from __future__ import annotations

import struct
from typing import NamedTuple

MIB = 1 << 20
KERNEL_AT = 16 * MIB
INIT_SIZE = 4 * MIB


class Load(NamedTuple):
    """A PT_LOAD (or PT_NOTE) segment and its content."""

    paddr: int
    data: bytes
    memsz: int | None = None
    vaddr: int | None = None
    filesz: int | None = None
    kind: int = 1
    offset: int | None = None


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    """One ELF note, padded to 4 bytes."""
    name += b"\0"
    return struct.pack("<3I", len(name), len(desc), kind) + _padded(name) + _padded(desc)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


LINUX_NOTE = note(b"Linux", 0x100, b"salt")


def elf(
    *loads: Load,
    bits: int = 64,
    entry: int = MIB,
    notes: bytes = b"",
    machine: int | None = None,
    kind: int = 2,
    phentsize: int | None = None,
    phnum: int | None = None,
) -> bytes:
    """An ELF executable; contents follow the headers in order, 16-byte aligned."""
    if notes:
        loads = (*loads, Load(0, notes, kind=4))
    header_size, ph_size = (64, 56) if bits == 64 else (52, 32)
    at = header_size + ph_size * len(loads)
    headers, body = b"", b""
    for load in loads:
        body += bytes(-(at + len(body)) % 16)
        offset = at + len(body) if load.offset is None else load.offset
        filesz = len(load.data) if load.filesz is None else load.filesz
        memsz = filesz if load.memsz is None else load.memsz
        vaddr = load.paddr if load.vaddr is None else load.vaddr
        if bits == 64:
            headers += struct.pack("<IIQQQQQQ", load.kind, 7, offset, vaddr, load.paddr, filesz, memsz, 4)
        else:
            headers += struct.pack("<8I", load.kind, offset, vaddr, load.paddr, filesz, memsz, 7, 4)
        body += load.data
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH",
        kind,
        machine if machine is not None else (62 if bits == 64 else 3),
        1,
        entry,
        header_size,
        0,
        0,
        header_size,
        ph_size if phentsize is None else phentsize,
        len(loads) if phnum is None else phnum,
        0,
        0,
        0,
    )
    return header + headers + body


def vmlinux(text: bytes = b"\x90" * 64, paddr: int = KERNEL_AT) -> bytes:
    """A Linux-like ELF64: linked high, loaded low, with a bss and a Linux note."""
    high = 0xFFFFFFFF80000000
    return elf(
        Load(paddr, text, vaddr=high + paddr),
        Load(paddr + MIB, b"data" * 8, memsz=0x10000, vaddr=high + paddr + MIB),
        entry=paddr,
        notes=LINUX_NOTE,
    )


FIELDS = {
    "setup_sects": (0x1F1, "B"),
    "syssize": (0x1F4, "I"),
    "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"),
    "header": (0x202, "4s"),
    "version": (0x206, "H"),
    "kernel_version": (0x20E, "H"),
    "loadflags": (0x211, "B"),
    "code32_start": (0x214, "I"),
    "initrd_addr_max": (0x22C, "I"),
    "kernel_alignment": (0x230, "I"),
    "relocatable_kernel": (0x234, "B"),
    "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"),
    "payload_offset": (0x248, "I"),
    "payload_length": (0x24C, "I"),
    "pref_address": (0x258, "Q"),
    "init_size": (0x260, "I"),
}

STUB = b"\xf4" * 0x400  # what would unpack: its 64-bit entry is at 0x200


def bzimage(payload: bytes = b"", **fields: int | bytes) -> bytes:
    """A bzImage of protocol 2.15 that carries ``payload``; ``fields`` override the setup header."""
    kernel = STUB + payload
    kernel += bytes(-len(kernel) % 16)
    setup = bytearray(1024)
    values: dict[str, int | bytes] = {
        "setup_sects": 1,
        "syssize": len(kernel) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "header": b"HdrS",
        "version": 0x020F,
        "kernel_version": 0x300 - 0x200,
        "loadflags": 1,
        "code32_start": MIB,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 0x200000,
        "relocatable_kernel": 1,
        "xloadflags": 0x7F,
        "cmdline_size": 2047,
        "payload_offset": len(STUB) if payload else 0,
        "payload_length": len(payload),
        "pref_address": KERNEL_AT,
        "init_size": INIT_SIZE,
        **fields,
    }
    setup[0x300:0x320] = b"6.1.0-test (me@here) #1".ljust(32, b"\0")
    for name, value in values.items():
        offset, code = FIELDS[name]
        struct.pack_into("<" + code, setup, offset, value)
    return bytes(setup) + kernel


def multiboot_header(flags: int = 3, *addresses: int, checksum: int | None = None) -> bytes:
    """A multiboot 1 header; ``addresses`` are header, load, load end, bss end and entry."""
    if checksum is None:
        checksum = -(0x1BADB002 + flags) & 0xFFFFFFFF
    return struct.pack(f"<III{len(addresses)}I", 0x1BADB002, flags, checksum, *addresses)
