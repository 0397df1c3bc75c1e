"""A guest in real mode that goes through a vector nobody has set is told apart by what led it there."""

from __future__ import annotations

from typing import Any

import pytest

OUT_5 = b"\xb0\x05\xe6\xf4"
CALLS = {
    "putchar": (b"\xb8\x41\x0e\xcd\x10", "int 0x10, AH=0x0e: this machine has no BIOS"),
    "read a sector": (b"\xb4\x02\xcd\x13", "int 0x13, AH=0x02: this machine has no BIOS"),
    "memory size": (b"\x31\xc0\xcd\x12", "int 0x12, AH=0x00: this machine has no BIOS"),
    # not higher: KVM's emulator takes the immediate byte for signed, and never ends
    "a vector nobody uses": (b"\x31\xc0\xcd\x7f", "int 0x7f, AH=0x00: this machine has no BIOS"),
    "divide error": (b"\x31\xc9\xf7\xf1", "exception 0 (#DE) at 0x0:0x7c02, and the guest has set no handler for it"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_bios_call_is_named(flat: Any, call: str) -> None:
    code, sentence = CALLS[call]
    machine = flat(code + OUT_5, mode="real")
    outcome = machine.run(20)
    assert (outcome.reason, outcome.status) == ("no-bios", 30)
    assert outcome.sentence.startswith(sentence)
    found = machine.diagnose()
    assert found.cause == "no-bios" and sentence in found.sentence


def test_a_call_from_another_segment_is_named(flat: Any) -> None:
    code = bytes.fromhex("ea 0500 c007 b40e cd10")  # jmp 0x7c0:5; mov ah, 0x0e; int 0x10
    assert flat(code, mode="real").run(20).sentence == "int 0x10, AH=0x0e: this machine has no BIOS"


def test_a_vector_the_guest_has_set_is_its_own(flat: Any) -> None:
    # mov word [0x80], 0x7c0e; mov word [0x82], 0; int 0x20; then the handler
    code = bytes.fromhex("c7068000 0e7c c7068200 0000 cd20")
    outcome = flat(code + OUT_5, mode="real").run(20)
    assert (outcome.reason, outcome.code) == ("debug-exit", 5)


def test_an_image_over_the_vectors_keeps_them(flat: Any) -> None:
    machine = flat(OUT_5.ljust(0x400, b"\x90"), mode="real", address=0)
    machine.load()
    assert machine.memory.read(0, 0x400) == OUT_5.ljust(0x400, b"\x90")
    assert machine.run(20).code == 5


def drops_to_real_mode(body: bytes) -> bytes:
    """A protected-mode image for 0x8000 that goes to real mode, loads the vector table at 0, and executes ``body``."""
    code = bytes.fromhex("0f0115 98800000 ea 10800000 0800").ljust(0x10, b"\x90")  # lgdt [0x8098]; jmp 8:0x8010
    # ss and ds of 64 KiB and 16 bits, which real mode keeps; CR0.PE off; jmp 0:0x8030
    code += bytes.fromhex("b81000 8ed0 8ed8 0f20c0 24fe 0f22c0 ea 3080 0000").ljust(0x20, b"\x90")
    code += bytes.fromhex("31c0 8ed0 8ed8 bc0070 0f011e a080") + body  # segments, stack, lidt [0x80a0]
    # GDT at 0x8080: 16-bit code and data
    code = code.ljust(0x88, b"\x90") + b"".join(d.to_bytes(8, "little") for d in (0x9B000000FFFF, 0x93000000FFFF))
    code = code.ljust(0x98, b"\x90") + (0x17).to_bytes(2, "little") + (0x8080).to_bytes(4, "little")
    return code.ljust(0xA0, b"\x90") + (0x3FF).to_bytes(2, "little") + bytes(4)


PUTCHAR = b"\xb8\x41\x0e\xcd\x10"  # mov ax, 0x0e41; int 0x10


def test_a_call_of_an_image_that_drops_to_real_mode_fails_and_is_named(flat: Any) -> None:
    # clc; the call; jnc: exit with 5, else with 6 if SP is as it was and AX too
    body = b"\xf8" + PUTCHAR + bytes.fromhex("730e 81fc0070 7508 3d410e 7503 b006a9 b005 e6f4")
    machine = flat(drops_to_real_mode(body), mode="protected", address=0x8000)
    outcome = machine.run(20)
    assert (outcome.reason, outcome.code) == ("debug-exit", 6)
    assert "int 0x10, AH=0x0e failed: this machine has no BIOS" in machine.diagnose().evidence


def test_an_exception_of_an_image_that_drops_to_real_mode_ends_it_by_name(flat: Any) -> None:
    machine = flat(drops_to_real_mode(PUTCHAR + b"\x31\xc9\xf7\xf1"), mode="protected", address=0x8000)
    outcome = machine.run(20)
    assert outcome.reason == "no-bios"
    assert outcome.sentence.startswith("exception 0 (#DE) at 0x0:0x80")
    assert machine.diagnose().evidence == ("int 0x10, AH=0x0e failed: this machine has no BIOS",)


@pytest.mark.parametrize(("mode", "address"), [("protected", 0), ("long", 0), ("protected", 0xFE000)])
def test_an_image_over_the_vectors_or_their_stubs_keeps_them_in_any_mode(flat: Any, mode: str, address: int) -> None:
    image = OUT_5.ljust(0x400, b"\x90")
    machine = flat(image, mode=mode, address=address)
    machine.load()
    assert machine.memory.read(address, 0x400) == image
    assert machine.memory.read(0, 4) == (image[:4] if address == 0 else bytes(4))
    assert machine.run(20).code == 5
