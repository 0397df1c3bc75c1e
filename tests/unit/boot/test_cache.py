"""The cache of unpacked kernels: found again, never trusted blindly, never in the way."""

from __future__ import annotations

import gzip
import os
from typing import TYPE_CHECKING

import pytest
from boot_images import KERNEL_AT, MIB, bzimage, vmlinux
from boot_memory import FakeMemory

from vmm import boot
from vmm.boot import cache, payload
from vmm.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

TEXT = b"KERNEL" * 1000
ELF = vmlinux(TEXT)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A bzImage in a file old enough for its stamp to be believed."""
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(gzip.compress(ELF)))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be as young as they are."""
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one name for each payload that is unpacked."""
    calls: list[str] = []
    real = payload.unpack

    def counted(data: bytes, bound: int, name: str) -> tuple[str, bytes | bytearray]:
        calls.append(name)
        return real(data, bound, name)

    monkeypatch.setattr(payload, "unpack", counted)
    return calls


def load(path: Path) -> boot.Entry:
    ram = FakeMemory(64 * MIB)
    with boot.Image.open(path) as image:
        entry = boot.load(ram, image=image, fresh=True)
    assert entry.rip == KERNEL_AT
    assert ram.read(KERNEL_AT, len(TEXT)) == TEXT
    return entry


def test_a_kernel_is_unpacked_once(kernel: Path, kernel_cache: Path, unpackings: list[str]) -> None:
    load(kernel)
    assert any("found unpacked" in note for note in load(kernel).notes)
    assert unpackings == [str(kernel)]
    assert sorted(path.suffix for path in kernel_cache.iterdir()) == [".elf", ".seal"]
    assert kernel_cache.stat().st_mode & 0o77 == 0


@pytest.mark.usefixtures("settled")
def test_a_known_file_is_not_hashed(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(kernel)
    monkeypatch.setattr(cache, "_sha256", lambda data: pytest.fail("hashed"))
    load(kernel)


def test_a_file_changed_just_now_is_hashed_next_time(kernel: Path, kernel_cache: Path) -> None:
    load(kernel)
    assert not list(kernel_cache.glob("*.key"))


@pytest.mark.usefixtures("settled")
def test_a_rewritten_kernel_is_not_taken_for_the_old_one(kernel: Path) -> None:
    load(kernel)
    other = b"OTHER!" * 1000
    kernel.write_bytes(bzimage(gzip.compress(vmlinux(other))))
    ram = FakeMemory(64 * MIB)
    with boot.Image.open(kernel) as image:
        boot.load(ram, image=image)
    assert ram.read(KERNEL_AT, len(other)) == other


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_entry_is_thrown_away(damage: str, kernel: Path, kernel_cache: Path, unpackings: list[str]) -> None:
    load(kernel)
    (entry,) = kernel_cache.glob("*.elf")
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    damaged: dict[str, bytes | bytearray] = {"flip": content, "truncate": content[:-1], "empty": b""}
    entry.write_bytes(damaged[damage])
    load(kernel)
    assert len(unpackings) == 2
    assert entry.read_bytes() == ELF


def test_an_entry_that_was_copied_is_checked_and_sealed_again(
    kernel: Path, kernel_cache: Path, unpackings: list[str]
) -> None:
    load(kernel)
    (entry,) = kernel_cache.glob("*.elf")
    (seal,) = kernel_cache.glob("*.seal")
    before = seal.read_text()
    entry.write_bytes(entry.read_bytes())
    load(kernel)
    assert unpackings == [str(kernel)]
    assert seal.read_text() != before


@pytest.mark.parametrize("seal", ["", "x", "zz zz", "a" * 600])
def test_an_entry_without_a_good_seal_is_thrown_away(
    seal: str, kernel: Path, kernel_cache: Path, unpackings: list[str]
) -> None:
    load(kernel)
    next(kernel_cache.glob("*.seal")).write_text(seal)
    load(kernel)
    assert len(unpackings) == 2


def test_a_cache_that_cannot_be_written_is_a_note(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "file"))
    assert any("not cached" in note for note in load(kernel).notes)


def test_a_write_that_fails_leaves_nothing_behind(
    kernel: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert any("cannot be written" in note for note in load(kernel).notes)
    assert not list(kernel_cache.iterdir())


def test_the_least_recently_used_kernels_go_first(kernel_cache: Path) -> None:
    keys = [f"{n:064x}" for n in range(cache.KERNELS_KEPT + 3)]
    for age, key in enumerate(keys):
        cache.store(key, ELF, [])
        for path in kernel_cache.glob(key + "*"):
            os.utime(path, (1000 + age, 1000 + age))
    stale = kernel_cache / "x.elf.1.tmp"
    stale.touch()
    os.utime(stale, (1, 1))
    cache.store("f" * 64, ELF, [])
    left = {path.stem for path in kernel_cache.glob("*.elf")}
    assert left == {*keys[-(cache.KERNELS_KEPT - 1) :], "f" * 64}
    assert {path.stem for path in kernel_cache.glob("*.seal")} == left
    assert not stale.exists()


def test_what_is_cached_is_still_bounded_by_what_the_kernel_says(kernel: Path) -> None:
    load(kernel)
    kernel.write_bytes(bzimage(gzip.compress(ELF, mtime=0)))
    image = bzimage(gzip.compress(ELF, mtime=0))
    boot.load(FakeMemory(64 * MIB), image=image)
    with pytest.raises(ImageError, match="claims to unpack"):
        boot.load(FakeMemory(64 * MIB), image=bzimage(gzip.compress(ELF, mtime=0), init_size=0x200))


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"PYVMM_CACHE": "/a"}, "/a/kernels"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/pyvmm/kernels"),
        ({"HOME": "/c"}, "/c/.cache/pyvmm/kernels"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYVMM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == where
