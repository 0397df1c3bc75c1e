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
