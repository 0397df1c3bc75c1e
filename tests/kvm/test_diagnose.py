"""Guests that die in known ways, each diagnosed: cause, sentence, evidence."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processors import takes_any_lstar

from vmm import host
from vmm.cpu import internal_error
from vmm.errors import ImageError
from vmm.machine import Machine
from vmm.observe import kernel_words, waiting
from vmm.observe.diagnose import diagnose
from vmm.observe.postmortem import report
from vmm.observe.samples import Sample
from vmm.observe.verdict import CAUSES
from vmm.outcome import KVM_EMULATION, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.observe.verdict import Diagnosis

    GuestPath = Callable[[str], str]


def diagnosis(kernel: str, append: str = "", *, timeout: float = 20, **fields: Any) -> Diagnosis:
    """Run to the end and ask why; the post-mortem screen must begin with the same."""
    from vmm.observe.postmortem import report

    with Machine(kernel=kernel, append=append, **{"memory": "16M", "rng": False, **fields}) as machine:
        outcome = machine.run(timeout)
        found = machine.diagnose()
        assert outcome.diagnosis is found
        assert found.cause in CAUSES
        assert found.sentence.startswith(CAUSES[found.cause])
        screen = " ".join(line.strip() for line in report(machine, outcome).splitlines())
        assert found.sentence in screen
        assert all(line[:80] in screen for line in found.evidence)
        return found


# (way to die, cause, what the sentence says)
_DEATHS = [
    ("pml4e", "page-fault", r"pml4e\+.*reading: linear address 0x10000000000: the PML4E at 0x\w+ is 0x0: not present"),
    ("pdpte", "page-fault", r"reading: linear address 0x140000000: the PDPTE at 0x\w+ is 0x0: not present"),
    ("pde", "page-fault", r"writing: linear address 0xc00008: the PDE at 0x\w+ is 0x0: not present"),
    ("pte", "page-fault", r"writing: linear address 0xc00008: the PTE at 0x\w+ is 0x0: not present"),
    ("read-only", "page-fault", r"the PTE at 0x\w+ is 0xc00001: write to a read-only page"),
    ("reserved-bit", "reserved-bit", r"the PDE at 0x\w+ is 0xc08\w+: reserved bits set: 15"),
    # TCG faults where the jump leads to, with RIP there; processors do at the jump (SDM vol. 2, JMP).
    ("wild-jump", "non-canonical-jump", r"(jmp \w+ at .*wild_jump.* jumps to|RIP is) 0x900000000000"),
    ("wild-read", "non-canonical-address", r"uses 0x900000000000, which is not canonical"),
    ("stack-overflow", "stack-overflow", r"recurse\+.*below the mapped stack, which begins at 0xc01000: .*the PTE at"),
    ("segment", "bad-segment", r"mov ds.*: selector 0x1238 is beyond the GDT's limit 0x47"),
    ("absent-segment", "bad-segment", r"mov es.*selector 0x40 .*: not present; #NP could"),
    ("msr", "bad-msr", r"wrmsr at .*: the processor has no MSR 0x12345"),
    ("msr-value", "bad-msr", r"wrmsr at .*: 0x900000000000 for LSTAR is not a canonical address"),
    ("opcode", "invalid-opcode", r"the bytes 06 .* at .*<opcode.* are no instruction"),
    ("zeroes", "zeroes", r"it executes zeroes at 0xc00000"),
    ("divide", "divide-error", r"div .* at .*<divide.* divides by zero"),
    ("no-stack", "bad-idt", r"no_stack.* raises #UD, and its frame cannot be stored on the stack at 0x10000000000"),
    ("empty-idt", "bad-idt", r"ud2 at .*empty_idt.* raises #UD, and the gate of vector 6 .* is not present"),
]
# What tells of these on a host that takes the registers, or that they are deaths at all, some hosts have not.
_MARKS = {
    "no-stack": pytest.mark.stops("breakpoint"),  # handlers are there: breakpoints tell whether one was entered
    "msr-value": pytest.mark.skipif(takes_any_lstar(), reason="this processor takes any value for LSTAR (QEMU's TCG)"),
}
DEATHS = [pytest.param(*death, id=death[0], marks=_MARKS.get(death[0], ())) for death in _DEATHS]


@pytest.mark.parametrize(("death", "cause", "sentence"), DEATHS)
def test_a_triple_fault_is_traced_to_what_began_it(guest: GuestPath, death: str, cause: str, sentence: str) -> None:
    found = diagnosis(guest("deaths"), f"die={death}")
    assert found.cause == cause, found
    assert re.search(sentence, found.sentence), found.sentence
    assert cause == "bad-idt" or "no IDT is loaded (base 0x0, limit 0x0)" in found.sentence


def test_an_exception_without_an_idt_is_blamed_on_the_idt(guest: GuestPath) -> None:
    found = diagnosis(guest("triple_fault"))
    assert found.cause == "missing-idt"
    assert re.search(r"ud2 at .*guest_main.* raises #UD, and no IDT is loaded", found.sentence)


def test_evidence_names_who_called_into_nothing_and_what_recursed(guest: GuestPath) -> None:
    assert any(
        re.match(r"called from 0x\w+ <zeroes\+", line) for line in diagnosis(guest("deaths"), "die=zeroes").evidence
    )
    overflow = diagnosis(guest("deaths"), "die=stack-overflow")
    assert any(re.match(r"0x\w+ <recurse\+.* times among the 256 words", line) for line in overflow.evidence)


def test_an_image_without_code_at_its_entry_is_the_wrong_image(tmp_path: Path) -> None:
    for content, sentence in (
        (bytes(4096), "the image holds zeroes at its entry point 0x100000: it ran through zeroes up to 0x200000"),
        (b"\x06" * 16, "there is no 64-bit code at the image's entry point 0x100000: the bytes 06 06"),
    ):
        image = tmp_path / "image"
        image.write_bytes(content)
        found = diagnosis(str(image), kind="flat", mode="long", memory="2M")
        assert found.cause == "wrong-image"
        assert sentence in found.sentence


def test_an_image_for_another_mode_is_suspected_where_it_ran_away_at_once(guest: GuestPath) -> None:
    found = diagnosis(guest("hello_real.bin"), kind="flat", mode="long", memory="2M")
    assert found.cause == "page-fault"
    assert found.evidence[-1] == "it never used a device: is this an image for another mode than long (--mode)?"


def test_an_image_that_ends_too_soon_is_refused_before_it_runs(guest: GuestPath, tmp_path: Path) -> None:
    image = tmp_path / "truncated"
    image.write_bytes(Path(guest("hello")).read_bytes()[:6000])
    with pytest.raises(ImageError, match="truncated: an ELF segment"):
        Machine(kernel=image, memory="16M")


def test_an_interrupt_without_an_idt_is_told_from_a_faulty_instruction(tmp_path: Path) -> None:
    image = tmp_path / "ticks"  # mov al, 0x34; out 0x43, al; mov al, 0xff; out 0x40, al (twice); sti; jmp to itself
    image.write_bytes(bytes.fromhex("b034 e643 b0ff e640 e640 fb ebfe"))
    found = diagnosis(str(image), kind="flat", mode="long", memory="2M")
    assert found.cause == "missing-idt"
    assert "came at 0x10000b, whose instruction is sound, and no IDT is loaded" in found.sentence


def test_an_end_in_order_has_nothing_to_diagnose(guest: GuestPath) -> None:
    with Machine(kernel=guest("hello"), memory="16M", rng=False) as machine:
        machine.run(timeout=120)
        assert machine.diagnose().cause == "orderly-end"


def test_a_panic_through_pvpanic_is_one(guest: GuestPath) -> None:
    assert diagnosis(guest("pvpanic")).cause == "kernel-panic"


def test_what_a_driver_made_of_each_virtio_device_is_seen(guest: GuestPath, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with Machine(kernel=guest("hello"), memory="16M", disks=[str(disk)]) as machine:
        machine.run(timeout=120)
        seen = kernel_words.guest_of(machine)
    assert [(device.name, device.status, device.used) for device in seen.virtio] == [
        ("virtio-blk0", (), False),
        ("virtio-rng0", (), False),
    ]
    assert "virtio-blk0 was never looked at" in kernel_words.no_drivers(seen)[0]


# ---- guests that go on for ever ----


@pytest.mark.parametrize(
    ("name", "append", "cause", "sentence"),
    [
        ("hang", "", "halt-interrupts-off", r"halted at .*<halt_forever.* with RFLAGS\.IF = 0"),
        ("deaths", "die=waiting", "no-wakeup", r"halted at .*<waiting\+.* with interrupts on, but no timer runs"),
        ("spin", "", "endless-loop", r"<guest_main\+.* jumps to itself, with interrupts off"),
        # Of a few instructions the samples may all be at the first: TCG is interrupted at jumps only.
        (
            "deaths",
            "die=loop",
            "endless-loop",
            r"all of \d+ samples of RIP in .* are at .*<loop> .*(to .*<loop\+|30 of)",
        ),
        ("deaths", "die=poll", "endless-loop", r"samples of RIP .*<serial_getc"),
    ],
)
@pytest.mark.parametrize("limit", ["stall", "timeout"])
def test_a_guest_that_does_not_end_is_told_by_what_it_does(
    guest: GuestPath, name: str, append: str, cause: str, sentence: str, limit: str
) -> None:
    fields = {"stall": 1.0, "timeout": 60} if limit == "stall" else {"timeout": 4.0}
    found = diagnosis(guest(name), append, **fields)
    assert found.cause == cause, found
    assert re.search(sentence, found.sentence), found.sentence


def test_evidence_says_what_could_have_woken_it_and_what_is_polled(guest: GuestPath) -> None:
    waiting = diagnosis(guest("deaths"), "die=waiting", timeout=3)
    assert {"I/O APIC: all inputs masked", "PICs: all lines masked", "PIT: not programmed"} <= set(waiting.evidence)
    polling = diagnosis(guest("deaths"), "die=poll", timeout=2)
    assert any(re.search(r"over and over: io +0x3fd/1  uart LSR -> 0x60", line) for line in polling.evidence)


def test_a_halted_guest_with_a_running_timer_is_idle_and_with_a_listening_device_waits_for_it(guest: GuestPath) -> None:
    ticking = diagnosis(guest("deaths"), "die=ticking", timeout=3)
    assert (ticking.cause, "the PIT wakes it" in ticking.sentence) == ("idle", True), ticking
    listening = diagnosis(guest("deaths"), "die=listening", timeout=3)
    assert listening.cause == "waiting-for-device"
    assert "uart (GSI 4)" in listening.sentence


def test_a_stall_ends_the_run_with_a_status_of_its_own_long_before_the_time_limit(guest: GuestPath) -> None:
    with Machine(kernel=guest("spin"), memory="16M", rng=False, stall=0.5) as machine:
        outcome = machine.run(timeout=60)
    assert (outcome.reason, outcome.status) == ("stalled", 26)
    assert outcome.seconds < 30
    assert not outcome.ok


def test_the_command_says_what_a_guest_was_doing_at_its_time_limit_and_when_it_stalls(guest: GuestPath) -> None:
    for flags, status, lines in ((["--timeout", "1"], 124, 8), (["--stall", "0.5"], 26, 100)):
        words = ["boot", "--kernel", guest("deaths"), "--append", "die=waiting", "--mem", "16M", "--rng", "off"]
        done = subprocess.run(
            [sys.executable, "-m", "vmm", *words, *flags],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert "the vCPU is halted at" in done.stderr
        assert len(done.stderr.splitlines()) <= lines


# (long-mode code at 0x100000, what the sentence says): none of them is in an endless loop
BUSY = {
    "counting": ("48ffc0 ebfb", "with other registers each time"),  # inc rax; jmp
    "copying": (
        "48c7c100000040 48c7c600001100 48c7c700001200 f3a4 ebe7",
        "with other registers each time",
    ),  # rep movsb
    "filling": (
        "48c7c700001100 48ab 4881ff00f01f00 72f5 48ffc2 ebe9",
        "with other registers each time",
    ),  # a stack of it
}


@pytest.mark.parametrize(("code", "sentence"), BUSY.values(), ids=BUSY.keys())
def test_a_guest_that_makes_progress_is_in_no_endless_loop(flat: Any, code: str, sentence: str) -> None:
    with flat(bytes.fromhex(code), memory="2M", rng=False) as machine:
        assert machine.run(timeout=2.0).reason == "timeout"
        found = machine.diagnose()
    assert found.cause == "running", found
    assert (
        sentence in found.sentence
        or "the host hardly let it run" in found.sentence
        or "it was executing" in found.sentence
    )


def test_a_guest_that_makes_progress_does_not_stall(flat: Any) -> None:
    with flat(bytes.fromhex(BUSY["counting"][0]), memory="2M", rng=False, stall=0.5) as machine:
        assert machine.run(timeout=3.0).reason == "timeout"
        assert len(machine.samples) == 32


def test_every_vcpu_is_looked_at(guest: GuestPath) -> None:
    with Machine(kernel=guest("smp"), memory="16M", cpus=2, rng=False) as machine:
        machine.run(timeout=120)
        spins = Sample(0.0, 0, 0x1000, False, 7, 0.0)
        machine.samples[:] = [
            [spins._replace(at=n / 10, ran=n / 10), spins._replace(at=n / 10, vcpu=1, rip=0x2000 + n, state=n)]
            for n in range(32)
        ]  # fmt: skip
        for vcpu in machine.vcpus:
            vcpu.set_registers(rip=0x1000)
        machine.memory.write(0x1000, bytes.fromhex("f390ebfc") + bytes(0x1000))
        found = waiting._running(machine, machine.vcpus, Outcome("timeout", registers=machine.vcpus[0].registers()))
    assert found.cause == "running"
    assert any(line.startswith("vCPU 0: endless loop: all of 32 samples") for line in found.evidence)


# ---- what this host, or this machine, has not ----


def test_a_hypercall_that_never_returns_is_named(flat: Any) -> None:
    if not host.findings().vmcall_loops:
        pytest.skip("hypercalls return on this host")
    code = bytes.fromhex("b80b000000 0f01c1 ebf7")  # mov eax, 11; vmcall; jmp to the start
    with flat(code, memory="2M", rng=False, compat="off") as machine:
        assert machine.run(timeout=2.0).reason == "timeout"
        found = machine.diagnose()
    assert found.cause == "hypercall"
    assert "vmcall at 0x100005 (rax 0xb), which KVM executes forever; see pyvmm doctor" in found.sentence


@pytest.mark.parametrize("kind", ["32-bit", "PAE"])
def test_32_bit_paging_is_named_where_it_cannot_work(flat: Any, kind: str) -> None:
    if kind not in host.findings().unpaged:
        pytest.skip(f"this host has {kind} paging")
    # mov eax, cr4; or eax, PAE or nothing; mov cr4, eax; mov eax, cr0; or eax, 1 << 31; mov cr0, eax; hlt
    pae = "20" if kind == "PAE" else "00"
    code = bytes.fromhex(f"0f20e0 0d{pae}000000 0f22e0 0f20c0 0d00000080 0f22c0 f4")
    for compat in ("auto", "off"):
        with flat(code, mode="protected", memory="2M", rng=False, compat=compat) as machine:
            machine.run(timeout=120)
            found = machine.diagnose()
        assert found.cause == "no-legacy-paging"
        assert f"mov cr0, eax at 0x100013 switches {kind} paging on (eax is 0x8" in found.sentence


def test_an_int_n_that_compatibility_would_repair_is_named(flat: Any) -> None:
    if not host.findings().syscall_broken:
        pytest.skip("INT n at CPL 3 is delivered on this host")
    # GDT behind the code: code and data of CPL 3; push ss, esp, cs, eip; retf is not emulated: by IRETQ of 64 bits
    code = bytes.fromhex("0f011425 70001000 6a23 6800800000 6802020000 6a2b 6840001000 48cf").ljust(0x40, b"\x90")
    code += bytes.fromhex("cd80").ljust(0x30, b"\x90")
    code += (0x2F).to_bytes(2, "little") + (0x100080).to_bytes(8, "little")
    code = code.ljust(0x80, b"\0") + bytes(4 * 8)
    code += b"".join(d.to_bytes(8, "little") for d in (0x00CFF3000000FFFF, 0x00AFFB000000FFFF))
    with flat(code, memory="2M", rng=False, compat="off") as machine:
        entry = machine.load()
        for table in range(entry.cr3, entry.cr3 + 0x3000, 0x1000):  # open the map of the first GiB to CPL 3
            for at in range(table, table + 0x1000, 8):
                value = int.from_bytes(machine.memory.read(at, 8), "little")
                machine.memory.write(at, (value | 4 if value & 1 else value).to_bytes(8, "little"))
        machine.run(timeout=120)
        found = machine.diagnose()
    assert found.cause == "no-int-n", found
    assert "int 0x80 at 0x100040, at CPL 3 in 64-bit code: this host's KVM raises #UD for it" in found.sentence


@pytest.mark.parametrize(("code", "which"), [("cd10 ebfc", "int 0x10 at 0x0:0x7c00"), ("0f0b", "an interrupt at 0x0:")])
def test_an_empty_interrupt_vector_table_is_named(flat: Any, code: str, which: str) -> None:
    with flat(bytes.fromhex(code), mode="real", memory="2M", rng=False) as machine:
        machine.load()
        machine.memory.fill(0, 0x500)
        machine.run(timeout=2.0)
        found = machine.diagnose()
    assert found.cause == "empty-vectors", found
    assert f"empty interrupt vector table: {which}" in found.sentence


# ---- the text screen ----

SCREEN = b"A kernel's only words"


def _text_mode(text: bytes) -> bytes:
    """Long-mode code that stores ``text`` at 0xb8000, and then dies."""
    cells = b"".join(b"\x66\xc7\x04\x25" + struct.pack("<IBB", 0xB8000 + 2 * n, c, 7) for n, c in enumerate(text))
    return cells + bytes.fromhex("0f0b")


def test_a_guest_that_writes_only_to_the_text_screen_has_it_shown(flat: Any) -> None:
    from vmm.observe.postmortem import report

    with flat(_text_mode(SCREEN), rng=False) as machine:
        assert machine.screen() is None
        outcome = machine.run(timeout=120)
        assert machine.screen() == [SCREEN.decode()]
        assert report(machine, outcome).endswith(f"text screen at 0xb8000:\n  {SCREEN.decode()}\n")


def test_the_command_shows_the_text_screen_when_asked_whatever_the_end(guest: GuestPath, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(_text_mode(SCREEN)[:-2] + bytes.fromhex("b021 e6f4"))  # mov al, 0x21; out 0xf4, al
    words = ["--kind", "flat", "--mode", "long", "--kernel", str(image), "--mem", "16M", "--rng", "off"]
    for flags, shown in (([], ""), (["--screen"], f"text screen at 0xb8000:\n  {SCREEN.decode()}\n")):
        done = subprocess.run(
            [sys.executable, "-m", "vmm", "boot", *words, *flags], capture_output=True, text=True, timeout=60,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (67, shown)
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "boot", "--kernel", guest("hello"), "--mem", "16M", "--screen"],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.stderr == "text screen at 0xb8000: guest memory holds no text there\n"


# ---- the guide ----

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "debug-a-boot.md"
SCREENS = re.findall(
    r"^    \$ pyvmm (boot --kernel (?:deaths|triple_fault) .*)\n((?:    .*\n)+)", GUIDE.read_text(), re.MULTILINE
)


def _shape(screen: str) -> str:
    """A screen without what another compiler or another run would have otherwise."""
    screen = screen.replace("registers are of a replay that died the same way", "")  # where the host resets them
    screen = re.sub(r"0x[0-9a-f]+", "0x", screen)
    screen = re.sub(r"\.c:\d+", ".c", screen)
    screen = re.sub(r"\d+ of \d+|\d+ samples|\b[\d.e-]+ s\b", "", screen)
    screen = " ".join(screen.split())
    return re.sub(
        r" to 0x <[^>]*> \(\w+\.c\)", "", screen
    )  # where samples of a short loop are all at its first instruction


@pytest.mark.parametrize(("command", "screen"), SCREENS, ids=[command for command, _ in SCREENS])
def test_screens_in_the_guide_are_what_the_command_prints(guest: GuestPath, command: str, screen: str) -> None:
    words = [guest(word) if word in ("deaths", "triple_fault") else word for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-m", "vmm", *words], capture_output=True, text=True, timeout=60, check=False
    )
    printed, at = _shape(done.stderr), 0
    for part in re.split(r"^ +\.\.\.$", screen, flags=re.MULTILINE):  # where it leaves something out
        found = printed.find(_shape(part), at)
        assert found >= 0, f"{_shape(part)!r} is not in {printed!r}"
        at = found + len(_shape(part))


def test_the_guide_has_screens() -> None:
    assert len(SCREENS) >= 4


# ---- whatever a guest leaves behind ----

_REASONS = ["triple-fault", "emulation-failure", "timeout", "stalled", "stopped", "panic", "reset", "unknown-exit"]
_VALUES = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 24), st.sampled_from([0x7FFFFFFFFFFF, 1 << 47]))


def test_whatever_a_guest_leaves_behind_there_is_a_diagnosis(guest: GuestPath) -> None:
    with Machine(kernel=guest("deaths"), append="die=loop", memory="16M") as machine:
        machine.run(timeout=0.5)
        vcpu = machine.vcpus[0]
        known = vcpu.registers()

        @settings(max_examples=examples(100), deadline=None)
        @given(
            st.dictionaries(st.sampled_from(sorted(known)), _VALUES),
            st.sampled_from(_REASONS),
            st.sampled_from([16, 32, 64]),
            st.binary(max_size=16),
            st.integers(0, (16 << 20) - 0x1000),
            st.binary(min_size=8, max_size=64),
        )
        def check(changed: dict[str, int], reason: str, bits: int, code: bytes, at: int, garbage: bytes) -> None:
            machine.memory.write(at & ~0xFFF, garbage * (0x1000 // len(garbage)))
            outcome = Outcome(reason, KVM_EMULATION, registers={**known, **changed}, bits=bits, instruction=code)
            found = diagnose(machine, outcome)
            assert found.sentence.startswith(CAUSES[found.cause])
            assert all(line.isprintable() for line in (found.sentence, *found.evidence))

        check()


def test_an_internal_error_of_kvm_is_not_blamed_on_the_instruction(guest: GuestPath) -> None:
    with Machine(kernel=guest("deaths"), append="die=loop", memory="16M") as machine:
        machine.run(timeout=0.5)
        outcome = Outcome("emulation-failure", 3, registers=machine.vcpus[0].registers(), instruction=b"\x0f\x0b")
        outcome.explanation = internal_error.sentence(3, (0x80000B0E, 0x31))
        found = diagnose(machine, outcome)
        assert found.cause == "unknown"
        assert "exit reason 0x31" in found.sentence
        screen = report(machine, outcome)
        assert "exit reason 0x31" in screen
        assert "instruction bytes" not in screen


def test_symbols_that_are_gone_when_the_guest_has_died_are_said_and_the_diagnosis_stands(
    guest: GuestPath, tmp_path: Path
) -> None:
    names = tmp_path / "System.map"
    names.write_text("0000000000100000 T start\n")
    with Machine(kernel=guest("triple_fault"), memory="16M", symbols=str(names)) as machine:
        names.unlink()
        machine.run(20)
        assert machine.diagnose().cause == "missing-idt"
        assert any("cannot read symbols" in message for message in machine.messages)
