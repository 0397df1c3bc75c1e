"""The files behind disks: what is refused and how, who may share, and the header of an overlay."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from effort import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from overlay_reader import flattened

from vmm.disk.image import OVERLAY_MAGIC as MAGIC
from vmm.disk.image import Image, open_raw
from vmm.disk.overlay import CLUSTER, Layout, Overlay, parse
from vmm.errors import ConfigError

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def refused(path: Path, *, readonly: bool = False, direct: bool = False, sector: int = 512) -> str:
    with pytest.raises(ConfigError) as error:
        open_raw(str(path), readonly=readonly, direct=direct, sector=sector)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_raw_image_is_opened_with_its_size(image: Path) -> None:
    opened = open_raw(str(image), readonly=False, direct=False, sector=4096)
    assert (opened.size, opened.alignment, opened.block_device) == (MIB, 1, False)
    opened.close()
    opened.close()


def test_what_cannot_be_a_disk_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    assert f"truncate -s 1G {path}" in refused(path)
    path.touch()
    assert "is empty" in refused(path)
    assert "neither a file nor a block device" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a block device" in refused(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("head", "name"), [(b"QFI\xfb\0\0\0\3", "qcow2"), (b"KDMV\1\0\0\0", "vmdk"), (b"vhdxfile", "vhdx")]
)
def test_an_image_of_another_format_is_refused_by_name(tmp_path: Path, head: bytes, name: str) -> None:
    path = tmp_path / f"disk.{name}"
    path.write_bytes(head + bytes(4096 - len(head)))
    message = refused(path)
    assert f"is a {name} image" in message
    assert f"qemu-img convert -O raw {path} {tmp_path / 'disk'}.img" in message
    with pytest.raises(ConfigError, match=name):  # nor is it a base
        Overlay(str(tmp_path / "top.ovl"), str(path))
    assert not (tmp_path / "top.ovl").exists()


def test_a_guest_that_writes_an_overlays_header_makes_the_monitor_open_nothing(image: Path, tmp_path: Path) -> None:
    Overlay(str(tmp_path / "top.ovl"), str(image)).close()
    forged = tmp_path / "forged.img"
    forged.write_bytes((tmp_path / "top.ovl").read_bytes())
    assert f"--disk BASE,overlay={forged}" in refused(forged)


def test_readers_share_and_a_writer_is_alone(image: Path) -> None:
    readers = [Image(str(image), readonly=True) for _ in range(2)]
    assert "is in use by another machine" in refused(image)
    for reader in readers:
        reader.close()
    writer = Image(str(image), readonly=False)
    assert "is in use by another machine" in refused(image)
    assert "is being written by another machine" in refused(image, readonly=True)
    writer.close()
    open_raw(str(image), readonly=False, direct=False, sector=512).close()


def test_bases_are_shared_and_overlays_are_not(image: Path, tmp_path: Path) -> None:
    first, second = (Overlay(str(tmp_path / name), str(image)) for name in ("a.ovl", "b.ovl"))
    with pytest.raises(ConfigError, match=r"a\.ovl is in use"):
        Overlay(str(tmp_path / "a.ovl"), str(image))
    assert "is in use" in refused(image)
    first.close()
    second.close()
    open_raw(str(image), readonly=False, direct=False, sector=512).close()


def test_a_new_overlay_shows_its_base_and_takes_no_room(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "top.ovl"
    overlay = Overlay(str(path), str(image))
    layout = overlay.layout
    assert layout.size == MIB and layout.size_max >= 16 * MIB and layout.data_at % MIB == 0
    overlay.close()
    assert flattened(image, path) == image.read_bytes()
    assert path.stat().st_blocks * 512 <= 65536
    assert parse(path.read_bytes()[:4096]) == layout


def test_an_empty_file_becomes_an_overlay_and_no_other_does(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "top.ovl"
    path.touch()
    Overlay(str(path), str(image)).close()
    path.write_bytes(b"not an overlay at all")
    with pytest.raises(ConfigError, match="is not an overlay: give another path"):
        Overlay(str(path), str(image))
    assert path.read_bytes() == b"not an overlay at all"


def test_what_cannot_be_opened_is_called_what_it_is(image: Path, tmp_path: Path) -> None:
    away = tmp_path / "away" / "top.ovl"
    with pytest.raises(ConfigError, match=f"overlay {away}: there is no such directory"):
        Overlay(str(away), str(image))
    with pytest.raises(ConfigError, match=f"overlay {away}: there is no such file; name one that is"):
        Overlay(None, str(image), between=[str(away)])


def test_an_overlay_knows_its_base_again(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "top.ovl")
    Overlay(path, str(image)).close()
    Overlay(path, str(image)).close()
    with image.open("r+b") as file:
        file.seek(1024)
        file.write(b"mounted")
    with pytest.raises(ConfigError, match="or that was written since"):
        Overlay(path, str(image))


def test_an_overlay_grows_within_its_room(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "top.ovl"
    overlay = Overlay(str(path), str(image))
    overlay.grow(3 * MIB)
    for size in (2 * MIB, overlay.layout.size_max + CLUSTER):
        with pytest.raises(ConfigError, match=r"cannot shrink|has room for"):
            overlay.grow(size)
    overlay.close()
    again = Overlay(str(path), str(image))
    assert again.layout.size == 3 * MIB
    again.close()
    assert flattened(image, path) == image.read_bytes() + bytes(2 * MIB)


def test_an_overlay_that_lost_its_end_is_made_whole(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "top.ovl"
    Overlay(str(path), str(image)).close()
    length = path.stat().st_size
    os.truncate(path, 4096)
    Overlay(str(path), str(image)).close()
    assert path.stat().st_size == length


def header(*numbers: int, version: int = 1, cluster: int = CLUSTER) -> bytes:
    body = struct.pack("<8sIIQQQQQI", MAGIC, version, cluster, *numbers)
    return body + struct.pack("<I", zlib.crc32(body))


U64 = st.one_of(st.sampled_from([0, 1, 4096, 8192, MIB, 1 << 62, (1 << 64) - 4096]), st.integers(0, (1 << 64) - 1))


@settings(max_examples=examples(300), deadline=None)
@given(numbers=st.tuples(U64, U64, U64, U64, U64), version=st.sampled_from([1, 1, 1, 0, 2]))
@example(numbers=(MIB, 4096, 4096, 8192, MIB), version=1)
def test_a_header_is_consistent_or_refused(numbers: tuple[int, ...], version: int) -> None:
    try:
        layout = parse(header(*numbers, 7, version=version))
    except ValueError as error:
        assert str(error).startswith(("is of version", "has a header that contradicts itself"))
        return
    assert layout == Layout._make((*numbers, 7)) and version == 1
    assert 0 < layout.base_size <= layout.size <= layout.bitmap_size * 8 * CLUSTER or layout.base_size == 0
    assert layout.bitmap_at >= CLUSTER and layout.bitmap_at + layout.bitmap_size <= layout.data_at
    assert not (layout.bitmap_at | layout.bitmap_size | layout.data_at) % CLUSTER


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(0, 63), st.integers(1, 255))
def test_a_damaged_header_is_refused(at: int, change: int) -> None:
    whole = bytearray(header(MIB, 4096, 4096, MIB, MIB, 7))
    parse(bytes(whole))
    whole[at] ^= change
    with pytest.raises(ValueError, match=r"damaged header|is not an overlay"):
        parse(bytes(whole))


@given(st.binary(max_size=80))
def test_any_bytes_are_refused(head: bytes) -> None:
    with pytest.raises(ValueError):
        parse(head)


def test_direct_input_and_output_says_what_it_needs(image: Path) -> None:
    try:
        opened = open_raw(str(image), readonly=True, direct=True, sector=4096)
    except ConfigError as error:
        assert "leave cache=none out" in str(error)
        return
    assert opened.alignment in (512, 4096)
    opened.close()
