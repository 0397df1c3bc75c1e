"""A Linux kernel's last words, read: what it looked for, what it had, where it was; and what its silence says."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.observe import kernel_words
from vmm.observe.kernel_words import Guest, Virtio
from vmm.observe.verdict import CAUSES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.observe.verdict import Diagnosis

DISK = Virtio("virtio-blk0", 2, ("ACKNOWLEDGE", "DRIVER", "FEATURES_OK", "DRIVER_OK"), used=True)
UNFOUND, UNTAKEN = DISK._replace(status=(), used=False), DISK._replace(status=("ACKNOWLEDGE",), used=False)

TRACE = """\
[    1.206204] CPU: 0 PID: 1 Comm: swapper/0 Not tainted 6.1.192 #1
[    1.206804] Call Trace:
[    1.206904]  <TASK>
[    1.207004]  panic+0xf0/0x292
[    1.207304]  ? rest_init+0xc0/0xc0
[    1.207404]  kernel_init+0x121/0x130
[    1.207504]  ret_from_fork+0x22/0x30
[    1.207604]  </TASK>
[    1.208004] Kernel Offset: disabled
[    1.208104] Rebooting in 1 seconds..
"""

NO_DEVICE = """\
[    0.950000] List of all partitions:
[    0.960000] VFS: Cannot open root device "vda2" or unknown-block(0,0): error -6
[    0.960100] Please append a correct "root=" boot option; here are the available partitions:
[    0.960200] 0100            4096 ram0
[    0.960300]  (driver?)
[    0.960400] fe00           65536 vda
[    0.960500]  driver: virtio_blk
[    0.960600]   fe01           32768 vda1 8f2d65d5-01
[    0.960700]
[    0.960800] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)
"""

NO_FILESYSTEM = """\
<4>[    0.585296] List of all partitions:
<4>[    0.585913] fe00          524288 vda
<4>[    0.586123]  driver: virtio_blk
<3>[    0.586471] No filesystem could mount root, tried:
<3>[    0.586497]  squashfs
<3>[    0.586498]  vfat
<3>[    0.586499]
<0>[    0.586562] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(254,0)
"""


def read(text: str, guest: Guest | None = None) -> Diagnosis:
    found = kernel_words.read(text, guest or Guest())
    assert found is not None
    assert found.cause in CAUSES
    assert found.sentence.startswith(CAUSES[found.cause])
    return found


# ---- root ----


def test_a_root_that_is_not_there_is_named_with_the_devices_that_are() -> None:
    found = read(NO_DEVICE + TRACE, Guest("root=/dev/vda2 rw", virtio=[DISK]))
    assert found.cause == "no-root"
    assert "looked for vda2 (error -6, ENXIO" in found.sentence
    assert found.sentence.endswith("it has the block devices vda (65536 KiB), vda1 (32768 KiB)")


def test_a_root_of_an_unknown_filesystem_says_which_were_tried() -> None:
    found = read(NO_FILESYSTEM, Guest("root=/dev/vda", virtio=[DISK]))
    assert found.cause == "no-root"
    assert "none of the kernel's filesystems fits: squashfs, vfat" in found.sentence
    assert "looked for /dev/vda" in found.sentence


@pytest.mark.parametrize(
    ("guest", "evidence"),
    [
        (Guest("root=/dev/vda"), "the machine has no disk: --disk FILE gives it one"),
        (Guest("root=/dev/vda"), "it has no initrd either: --initrd FILE"),
        (Guest("root=/dev/vda", virtio=[UNTAKEN]), "no driver took it: is CONFIG_VIRTIO_BLK=y"),
        (Guest("root=/dev/vda", "ttyS0", "pci", [UNFOUND]), "CONFIG_PCI and CONFIG_VIRTIO_PCI, and CONFIG_VIRTIO_BLK"),
    ],
)
def test_without_a_root_what_is_missing_is_evidence(guest: Guest, evidence: str) -> None:
    text = NO_DEVICE.replace("fe0", "xx0")
    found = read(text, guest)
    assert "it has no block device" in found.sentence
    assert any(evidence in line for line in found.evidence), found.evidence


def test_without_a_root_option_that_is_said() -> None:
    assert "no root= was given" in read(NO_FILESYSTEM).sentence


# ---- init ----


def test_a_missing_init_is_named_with_each_error() -> None:
    text = (
        "Run /init as init process\nFailed to execute /init (error -13)\nRun /sbin/init as init process\n"
        "Starting init: /bin/sh exists but couldn't execute it (error -8)\n"
        "Kernel panic - not syncing: No working init found.  Try passing init= option to kernel.\n"
    )
    found = read(text)
    assert found.cause == "missing-init"
    assert "/init: error -13, EACCES: Permission denied; /bin/sh: error -8, ENOEXEC" in found.sentence


def test_the_init_that_was_asked_for_is_named() -> None:
    found = read(
        "Kernel panic - not syncing: Requested init /sbin/nothing failed (error -2).\n", Guest("init=/sbin/nothing")
    )
    assert found.cause == "missing-init"
    assert "/sbin/nothing was asked for (/sbin/nothing: error -2, ENOENT" in found.sentence


@pytest.mark.parametrize(
    ("code", "how"), [("0x00000100", "exited with status 1"), ("0x0000000b", "was killed by signal 11")]
)
def test_an_init_that_ended_says_how(code: str, how: str) -> None:
    found = read(
        f"Run /init as init process\nKernel panic - not syncing: Attempted to kill init! exitcode={code}\n" + TRACE
    )
    assert found.cause == "init-ended"
    assert f"/init {how}" in found.sentence


# ---- panic ----


def test_a_panic_is_told_with_the_oops_before_it_and_its_trace() -> None:
    text = (
        "[    2.1] BUG: kernel NULL pointer dereference, address: 0000000000000008\n"
        "[    2.1] RIP: 0010:broken_probe+0x11/0x40\n" + TRACE.replace("1.2", "2.1")
        + "[    2.3] Kernel panic - not syncing: Fatal exception\n"
        "[    2.4] ---[ end Kernel panic - not syncing: Fatal exception ]---\n"
    )  # fmt: skip
    found = read(text)
    assert found.cause == "kernel-panic"
    assert found.sentence == (
        "kernel panic: Fatal exception, after: BUG: kernel NULL pointer dereference, address: 0000000000000008"
    )
    assert "RIP: 0010:broken_probe+0x11/0x40" in found.evidence
    trace = [line for line in found.evidence if line.startswith(("in ", "called from "))]
    assert trace[:3] == [
        "in panic+0xf0/0x292",
        "called from ? rest_init+0xc0/0xc0",
        "called from kernel_init+0x121/0x130",
    ]
    assert len(trace) == 4


def test_what_a_guest_wrote_is_made_printable() -> None:
    found = read("Kernel panic - not syncing: \x1b[2Jgone\x07" + "x" * 5000)
    assert found.sentence.startswith(r"kernel panic: \x1b[2Jgone\x07x")
    assert len(found.sentence) < 1100


# ---- images ----


def test_a_payload_that_cannot_be_unpacked_is_the_wrong_image() -> None:
    found = read("Decompressing Linux... \n\nXZ-compressed data is corrupt\n\n -- System halted")
    assert (found.cause, found.sentence.endswith("unpack itself: XZ-compressed data is corrupt")) == (
        "wrong-image",
        True,
    )


def test_an_initrd_that_cannot_be_unpacked_is_said() -> None:
    found = read("[    0.5] Initramfs unpacking failed: invalid magic at start of compressed archive\n")
    assert found.cause == "bad-initrd"
    assert "invalid magic at start" in found.sentence


def test_a_boot_that_went_well_has_no_last_words() -> None:
    assert kernel_words.read("[    0.5] Run /init as init process\nhello\n", Guest()) is None


# ---- silence ----


def test_a_console_that_this_machine_has_not_is_named() -> None:
    found = kernel_words.unheard(
        "[    0.0] Linux version 6.1\n[    0.1] Booting\n", Guest("console=ttyS1,115200 console=tty0")
    )
    assert found is not None
    assert found.cause == "no-console"
    assert "was told console=ttyS1 console=tty0, and this machine's console is ttyS0" in found.sentence
    assert found.evidence == ("its log, found in memory, has 2 lines; the last:", "Linux version 6.1", "Booting")


def test_a_kernel_that_logs_and_prints_nothing_lacks_the_consoles_driver() -> None:
    log = "[    0.0] Linux version 6.1\n[    0.5] Run /init as init process\n"
    found = kernel_words.unheard(log, Guest("console=hvc0", console="hvc0"))
    assert found is not None
    assert "is CONFIG_VIRTIO_CONSOLE=y?" in found.sentence
    assert kernel_words.unheard(log, Guest("quiet console=hvc0", console="hvc0")) is None
    panic = kernel_words.unheard(log + "Kernel panic - not syncing: no\n", Guest("quiet console=hvc0", console="hvc0"))
    assert panic is not None
    assert panic.cause == "no-console"


def test_a_kernel_whose_consoles_are_still_to_come_is_not_blamed_either() -> None:
    log = "[    0.0] Linux version 6.1\n[    0.1] ACPI: Interpreter enabled\n"
    assert kernel_words.unheard(log, Guest("console=ttyS0")) is None
    assert kernel_words.log_lines(log) == [
        "its log, found in memory, has 2 lines; the last:", "Linux version 6.1", "ACPI: Interpreter enabled",
    ]  # fmt: skip


def test_a_kernel_that_has_not_logged_yet_is_not_blamed_on_the_console() -> None:
    assert kernel_words.unheard("", Guest("console=ttyS0")) is None


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ((), "was never looked at: it needs CONFIG_VIRTIO_MMIO"),
        (("ACKNOWLEDGE",), "was found on mmio, but no driver took it: is CONFIG_VIRTIO_BLK=y"),
        (("ACKNOWLEDGE", "DRIVER"), "its driver began and never set DRIVER_OK"),
        (("ACKNOWLEDGE", "DRIVER", "FAILED"), "its driver gave up"),
    ],
)
def test_how_far_a_driver_came(status: tuple[str, ...], text: str) -> None:
    rng = Virtio("virtio-rng0", 4, (), used=False)
    lines = kernel_words.no_drivers(Guest(virtio=[rng, DISK, DISK._replace(status=status, used=False)]))
    assert len(lines) == 2
    assert text in lines[0]
    assert "CONFIG_HW_RANDOM_VIRTIO" in lines[1]


# ---- the log in memory ----


class Memory:
    """Guest memory of one region from 0."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or gpa + size > len(self.data):
            raise IndexError(gpa)
        return self.data[gpa : gpa + size]

    def search(self, pattern: bytes, start: int = 0, *, spend: Callable[[int], object]) -> int | None:
        spend(len(self.data))
        at = self.data.find(pattern, start)
        return at if at >= 0 else None


def ring(lines: list[str], first: int) -> bytes:
    """Blocks of a printk ring of texts: a number that counts up, the text, zeroes to the next multiple of 8."""
    blocks = b""
    for n, line in enumerate(lines):
        raw = line.encode()
        raw += raw[-2:] + b"\n\0" if n % 2 else b""  # as printk leaves it, where the text came with a level
        blocks += ((first + n) & (1 << 64) - 1).to_bytes(8, "little") + raw + bytes(-len(raw) % 8)
    return blocks


def test_the_log_is_found_in_memory_and_ends_where_it_ends() -> None:
    lines = [
        "Linux version 6.1.192 (gcc)",
        "Command line: console=ttyS1",
        "eight888",
        "",
        "e820: update\x01c",
        "the last",
    ]
    decoy = b"Linux version 6.1.192 (gcc)\n\0"  # linux_banner in .rodata
    data = decoy.ljust(64, b"\0") + ring(lines, (1 << 64) - 0x20000) + bytes(mmap.PAGESIZE)
    memory: Any = Memory(data)
    assert kernel_words.kernel_log(memory).splitlines() == [line.removesuffix("\x01c") for line in lines]


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(
        st.sampled_from([kernel_words._BANNER, b"\n", b"\0" * 8, b"\1" + bytes(7), b"\2" + bytes(7), b"text"]),
        max_size=200,
    )
)
@pytest.mark.hypothesis
def test_any_memory_has_a_log_or_none(parts: list[bytes]) -> None:
    memory: Any = Memory(b"".join(parts))
    assert isinstance(kernel_words.kernel_log(memory), str)


WORDS = st.sampled_from(
    f"""[    0.1] |Kernel panic - not syncing: |VFS: Unable to mount root fs on |Call Trace:| ]---|(error -|{"9" * 30}|
|Failed to execute /|) |Attempted to kill init! exitcode=0x|f|No filesystem could mount root, tried: |ext4 |\0|
|error -|Cannot open root device "|" or x: |fe00 12 vda|Requested init x failed | -- System halted|
|List of all partitions:|<4>[ 1.0] |Initramfs unpacking failed: """.split("|")
)


@settings(max_examples=examples(300), deadline=20_000)
@given(st.lists(st.one_of(WORDS, st.text(max_size=10)), max_size=60))
@pytest.mark.hypothesis
def test_whatever_a_guest_prints_is_read_to_the_end(parts: list[str]) -> None:
    found = kernel_words.read("".join(parts), Guest("root=/dev/vda init=/x", virtio=[UNFOUND]))
    assert found is None or found.cause in CAUSES


def test_only_the_options_of_the_kernel_itself_say_where_its_console_is() -> None:
    log = "[    0.0] Linux version 6.1\n[    0.5] Run /init as init process\n"
    for line in ("-- console=ttyS1 quiet", 'dyndbg="quiet console=ttyS1"'):
        found = kernel_words.unheard(log, Guest(line))
        assert found is not None and "is CONFIG_SERIAL_8250_CONSOLE=y?" in found.sentence
    assert Guest("loglevel=3 -- loglevel=7").option("loglevel") == "3"
