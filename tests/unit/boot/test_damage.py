"""Damaged images of every kind: a clean error or a load inside the guest's memory, and nothing else."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from boot_images import KERNEL_AT, LINUX_NOTE, MIB, Load, bzimage, elf, multiboot_header, note, vmlinux
from boot_memory import FakeMemory
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import boot
from vmm.errors import ConfigError

RAM = FakeMemory(24 * MIB)
# Everything a load may take beside the guest's memory: a payload's bytes twice over, and small change.
HOST_MEMORY_MAX = 32 * MIB

IMAGES = {
    "bzimage": bzimage(gzip.compress(vmlinux(), mtime=0)),
    "packed": bzimage(b""),
    "vmlinux": vmlinux(),
    "pvh": elf(Load(MIB, b"\xf4" * 64), notes=note(b"Xen", 18, struct.pack("<I", MIB))),
    "elf32": elf(Load(MIB, b"\xf4" * 64), Load(2 * MIB, b"data", memsz=4096), bits=32),
    "linux notes": elf(Load(KERNEL_AT, b"x" * 64), entry=KERNEL_AT, notes=LINUX_NOTE),
    "multiboot": elf(Load(MIB, multiboot_header() + b"\xf4" * 64), bits=32),
    "kludge": multiboot_header(0x10003, MIB, MIB, MIB + 64, MIB + 4096, MIB + 32) + b"\xf4" * 64,
}

# Where the fields are: the setup header and the ELF headers, and now and then anywhere.
_SPOTS = st.one_of(st.integers(0, 0xFF), st.integers(0x1F0, 0x270), st.integers(0, 1 << 16))
_VALUES = st.one_of(
    st.integers(0, 255).map(lambda value: bytes([value])),
    st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFF000, 0x1000, MIB]).map(
        lambda value: struct.pack("<I", value)
    ),
    st.sampled_from([0, (1 << 64) - 1, 1 << 63, 1 << 32, (1 << 64) - 4096]).map(lambda value: struct.pack("<Q", value)),
)
_DAMAGE = st.lists(st.tuples(_SPOTS, _VALUES), min_size=1, max_size=4)


def damaged(image: bytes, damage: list[tuple[int, bytes]], keep: float) -> bytes:
    result = bytearray(image)
    for at, value in damage:
        at %= max(1, len(image))
        result[at : at + len(value)] = value
    return bytes(result[: max(1, int(len(result) * keep))])


def check(image: bytes, **how: object) -> None:
    tracemalloc.start()
    try:
        # A GuestMemoryError would mean that an address was used before it was checked: it is not expected here.
        entry = boot.load(RAM, image=image, initrds=[("i", b"initrd" * 999)], **how)  # type: ignore[arg-type]
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < HOST_MEMORY_MAX
    if entry.mode != "real":
        assert 0 <= entry.rip < 1 << 32
        assert entry.gdt_base + entry.gdt_limit < RAM.regions[0][1]


@pytest.mark.parametrize("name", IMAGES)
@settings(max_examples=examples(250), deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=_DAMAGE, keep=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.1]))
def test_a_damaged_image_loads_cleanly_or_is_refused_cleanly(
    name: str, damage: list[tuple[int, bytes]], keep: float
) -> None:
    check(damaged(IMAGES[name], damage, keep))


@pytest.mark.parametrize("kind", ["bzimage", "linux64", "pvh", "multiboot", "elf", "flat"])
@settings(max_examples=examples(60), deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=st.sampled_from(sorted(IMAGES.values())), damage=_DAMAGE)
def test_a_kind_forced_on_any_image_loads_cleanly_or_is_refused_cleanly(
    kind: str, image: bytes, damage: list[tuple[int, bytes]]
) -> None:
    check(damaged(image, damage, 1.0), kind=kind)


@settings(max_examples=examples(100), deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=st.binary(min_size=1, max_size=2000))
def test_noise_is_refused_cleanly(image: bytes) -> None:
    check(image)
    check(b"\x7fELF\x02\x01\x01" + image)
    check(image.ljust(0x202, b"\0")[:0x202] + b"HdrS" + image)


_REAL = os.environ.get("PYVMM_TEST_BZIMAGE", "")


@pytest.mark.skipif(not _REAL, reason="PYVMM_TEST_BZIMAGE names no kernel")
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0x1F0, 0x270), _VALUES), min_size=1, max_size=3))
def test_a_damaged_real_kernel_loads_cleanly_or_is_refused_cleanly(damage: list[tuple[int, bytes]]) -> None:
    image = bytearray(Path(_REAL).read_bytes())
    for at, value in damage:
        image[at : at + len(value)] = value
    ram = FakeMemory(96 * MIB)
    try:
        boot.load(ram, image=image, name="real")
    except ConfigError as error:
        assert "\n" not in str(error)
