"""A kernel's system calls reach it on every host, however it is made: by INT n or SYSCALL, of 32 or 64 bits, with its
own memory open to programs or not, with handlers for exceptions or without."""

from __future__ import annotations

from typing import Any

import pytest

BASE = 0x100000
GDT, TSS, IDT, PROGRAM, HANDLER, STACK = 0x200, 0x300, 0x400, 0x1600, 0x2000, 0x110000
KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA, USER_CODE_64, TASK = 0x10, 0x18, 0x23, 0x2B, 0x33, 0x38
ALL_VECTORS = tuple(range(256))


def image(code: bytes, program: bytes, handler: bytes, *, wide: bool, gates: dict[int, int]) -> bytes:
    """``code`` at BASE, ``program`` and ``handler`` behind it, with a GDT, a TSS and an IDT with these gates.

    ``gates`` are offsets of handlers by vector, all of DPL 3.
    """
    image = bytearray(0x3000)

    def put(at: int, data: bytes) -> None:
        image[at : at + len(data)] = data

    put(0, code)
    flat = [0, 0, 0x00AF9B000000FFFF if wide else 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF]
    task = (BASE + TSS & 0xFFFFFF) << 16 | 0x67 | 0x89 << 40
    put(GDT, b"".join(d.to_bytes(8, "little") for d in (*flat, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF, task, 0)))
    stack = STACK.to_bytes(8, "little") if wide else STACK.to_bytes(4, "little") + KERNEL_DATA.to_bytes(4, "little")
    put(TSS + 4, stack)
    for vector, at in gates.items():
        entry = BASE + at
        low = entry & 0xFFFF | KERNEL_CODE << 16 | 0xEE00 << 32 | entry >> 16 << 48
        put(IDT + vector * (16 if wide else 8), low.to_bytes(8, "little") + bytes(8 if wide else 0))
    put(PROGRAM, program)
    put(HANDLER, handler)
    size = 256 * (16 if wide else 8)
    put(0x1F0, (0x47).to_bytes(2, "little") + (BASE + GDT).to_bytes(8, "little"))
    put(0x1E0, (size - 1).to_bytes(2, "little") + (BASE + IDT).to_bytes(8, "little"))
    return bytes(image)


def tables(*, wide: bool) -> bytes:
    """Code that loads the tables above: lgdt; lidt; ltr."""
    address = (b"\x25" if wide else b"") + (BASE + 0x1F0).to_bytes(4, "little")
    idt = (b"\x25" if wide else b"") + (BASE + 0x1E0).to_bytes(4, "little")
    modrm = 0x04 if wide else 0x05
    lgdt, lidt = bytes((0x0F, 0x01, modrm | 0x10)) + address, bytes((0x0F, 0x01, modrm | 0x18)) + idt
    return lgdt + lidt + b"\xb8" + TASK.to_bytes(4, "little") + b"\x0f\x00\xd8"


OUT = b"\xe6\x80"  # out 0x80, al: an exit, at which the kernel's handlers are found
EXIT_AL = b"\xe6\xf4\xf4"  # out 0xf4, al; hlt


def push(value: int) -> bytes:
    """push imm32"""
    return b"\x68" + value.to_bytes(4, "little")


def leave(code_selector: int, instruction: str, *, flags: bool = True) -> bytes:
    """Code that goes to the program at CPL 3 by this return."""
    frame = push(USER_DATA) + push(0x108000) + (push(0x3002) if flags else b"") + push(code_selector)
    return frame + push(BASE + PROGRAM) + bytes.fromhex(instruction)


# IOPL 3 does not last on every host: the program's last call is what ends the run.
def calls(vector: int) -> bytes:
    """A program that makes a system call by ``int vector``, twice, and ends the run with what the second returned."""
    call = bytes((0xCD, vector))
    return b"\xb8\x40\x00\x00\x00" + call + call + b"\x3c\x42\x75\x02\xcd\x81\x0f\x0b"


ADD_AND_RETURN = b"\xff\xc0"  # inc eax; then IRET of the mode


@pytest.mark.parametrize("handlers", ["all", "its own alone"])
@pytest.mark.parametrize("mode", ["64-bit", "32-bit program", "32-bit kernel", "32-bit kernel, RETF"])
def test_int_n_reaches_a_kernel_without_lstar(flat: Any, mode: str, handlers: str) -> None:
    wide = not mode.startswith("32-bit kernel")
    selector = USER_CODE_64 if mode == "64-bit" else USER_CODE
    out = leave(selector, "48cf" if wide else "cb" if mode.endswith("RETF") else "cf", flags=not mode.endswith("RETF"))
    undefined = HANDLER + 0x40
    gates = dict.fromkeys(ALL_VECTORS, undefined) if handlers == "all" else {}
    gates |= {0x80: HANDLER, 0x81: HANDLER + 0x20}
    handler = (ADD_AND_RETURN + (b"\x48\xcf" if wide else b"\xcf")).ljust(0x20, b"\x90") + (b"\xb0\x42" + EXIT_AL)
    handler = handler.ljust(0x40, b"\x90") + b"\xb0\x06" + EXIT_AL
    machine = flat(
        image(tables(wide=wide) + OUT + out, calls(0x80), handler, wide=wide, gates=gates),
        mode="long" if wide else "protected",
    )
    user_pages(machine)
    outcome = machine.run(60)
    assert (outcome.reason, outcome.code) == ("debug-exit", 0x42), outcome.sentence


def user_pages(machine: Any) -> None:
    """Open all of a flat image's page tables to CPL 3, as kernels with one flat map have it."""
    entry = machine.load()
    if entry.mode != "long":
        return
    for table in [entry.cr3, entry.cr3 + 0x1000, *(entry.cr3 + 0x1000 * n for n in range(2, 6))]:
        for at in range(table, table + 0x1000, 8):
            if (value := int.from_bytes(machine.memory.read(at, 8), "little")) & 1:
                machine.memory.write(at, (value | 4).to_bytes(8, "little"))


def wrmsr(index: int, value: int) -> bytes:
    """mov ecx, index; mov eax, low; mov edx, high; wrmsr"""
    words = ((0xB9, index), (0xB8, value & 0xFFFFFFFF), (0xBA, value >> 32))
    return b"".join(bytes((opcode,)) + word.to_bytes(4, "little") for opcode, word in words) + b"\x0f\x30"


STAR, LSTAR, SFMASK, EFER = 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000080
SET_MSRS = wrmsr(EFER, 0x501) + wrmsr(STAR, 0x0023 << 48 | KERNEL_CODE << 32) + wrmsr(SFMASK, 0x700)


def entry() -> bytes:
    """Code that ends the run with 0x42 and its CPL, or with 0x99 where LSTAR does not read as it was set."""
    lstar = b"\xb9" + LSTAR.to_bytes(4, "little") + b"\x0f\x32\x3d" + (BASE + HANDLER).to_bytes(4, "little")
    # mov ecx, LSTAR; rdmsr; cmp eax, ...; jne wrong; mov eax, cs; and al, 3; add al, 0x42
    return lstar + bytes.fromhex("7509 8cc8 2403 0442") + EXIT_AL + b"\xb0\x99" + EXIT_AL


@pytest.mark.parametrize("pages", ["all open to CPL 3", "the kernel's own closed"])
@pytest.mark.parametrize("handlers", ["all", "none"])
def test_syscall_reaches_the_kernel_whatever_its_pages_allow(flat: Any, pages: str, handlers: str) -> None:
    gates = dict.fromkeys(ALL_VECTORS, HANDLER + 0x60) if handlers == "all" else {}
    handler = entry().ljust(0x60, b"\x90") + b"\xb0\x0e" + EXIT_AL
    code = tables(wide=True) + SET_MSRS + wrmsr(LSTAR, BASE + HANDLER) + leave(USER_CODE_64, "48cf")
    machine = flat(image(code, b"\x0f\x05\x0f\x0b", handler, wide=True, gates=gates))
    user_pages(machine)
    if pages != "all open to CPL 3":
        close_kernel(machine)
    outcome = machine.run(60)
    assert (outcome.reason, outcome.code) == ("debug-exit", 0x42), outcome.sentence
    assert machine.vcpus[0].msr(LSTAR) == BASE + HANDLER


def close_kernel(machine: Any) -> None:
    """Map the program's page and its stack's for CPL 3, and nothing else of the first 2 MiB, in 4 KiB pages."""
    entry = machine.load()
    table = 0x80000
    for n in range(512):
        address = n << 12
        user = 4 if address in (BASE + (PROGRAM & ~0xFFF), 0x107000) else 0
        machine.memory.write(table + 8 * n, (address | 3 | user).to_bytes(8, "little"))
    machine.memory.write(entry.cr3 + 0x2000, (table | 7).to_bytes(8, "little"))


def test_lstar_set_from_outside_and_by_a_snapshot_is_the_guest_s(flat: Any, tmp_path: Any) -> None:
    from vmm.machine import Machine

    code = tables(wide=True) + SET_MSRS + leave(USER_CODE_64, "48cf")  # the guest does not set it
    handler = entry().ljust(0x60, b"\x90") + b"\xb0\x0e" + EXIT_AL
    machine = flat(
        image(code, b"\x0f\x05\x0f\x0b", handler, wide=True, gates=dict.fromkeys(ALL_VECTORS, HANDLER + 0x60))
    )
    user_pages(machine)
    machine.vcpus[0].set_msr(LSTAR, BASE + HANDLER)
    machine.snapshot(tmp_path / "snap").close()
    with Machine.restore(tmp_path / "snap") as again:
        assert again.vcpus[0].msr(LSTAR) == BASE + HANDLER
        assert again.run(60).code == 0x42
    assert machine.run(60).code == 0x42


@pytest.mark.parametrize("rcx", ["of nothing", "not canonical"])
def test_a_program_that_jumps_to_where_system_calls_begin_does_not_get_in(flat: Any, rcx: str) -> None:
    # The address that KVM has for LSTAR on hosts with the repair: a #PF on all others, too. RCX is behind no SYSCALL,
    # or an alias of an address that is: SYSRET would fault with it.
    behind = BASE + PROGRAM + 0x22 if rcx == "of nothing" else BASE + PROGRAM + 0x32 | 1 << 47
    # pushfq; pop r11; movabs rcx, ...; movabs rax, ...; jmp rax
    jump = bytes.fromhex("9c 415b 48b9") + behind.to_bytes(8, "little") + bytes.fromhex("48b800f0ffff7f80ffff ffe0")
    gates = dict.fromkeys(ALL_VECTORS, HANDLER + 0x60)
    handler = entry().ljust(0x60, b"\x90") + b"\xb0\x0e" + EXIT_AL
    code = tables(wide=True) + SET_MSRS + wrmsr(SFMASK, 0) + wrmsr(LSTAR, BASE + HANDLER)
    program = jump.ljust(0x30, b"\x90") + b"\x0f\x05"
    machine = flat(image(code + leave(USER_CODE_64, "48cf"), program, handler, wide=True, gates=gates))
    user_pages(machine)
    assert machine.run(60).code == 0x0E
