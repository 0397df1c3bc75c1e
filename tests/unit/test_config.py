"""What a machine may be asked for: sizes, fields, and that a configuration does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import layout
from vmm.config import FIELDS, MachineConfig, read_file
from vmm.errors import ConfigError
from vmm.fields import parse_size

SCALE = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("4G", 4 << 30),
        ("65536K", 64 << 20),
        ("512", 512 << 20),
        ("1g", 1 << 30),
        ("2GiB", 2 << 30),
        ("2gb", 2 << 30),
        (" 16M ", 16 << 20),
        ("0", 0),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "B", "1T", "-1M", "+1M", "1.5G", "0x10M", "1 G", "1_000M", "MM", "1MM", "٣M", "²", "1M\n1", True, None],
)
def test_what_is_not_a_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 10**15), st.sampled_from(sorted(SCALE)), st.sampled_from(["", "B", "iB"]), st.booleans())
def test_every_number_with_a_unit_is_its_product(number: int, unit: str, suffix: str, lower: bool) -> None:
    text = f"{number}{unit}{suffix if unit else ''}"
    assert parse_size(text.lower() if lower else text) == number * SCALE[unit]


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except ConfigError as error:
        assert repr(text) in str(error)
    else:
        assert size >= 0 and size % layout.KIB == 0


@given(st.integers(layout.MEMORY_MIN, layout.MEMORY_MAX))
def test_memory_is_rounded_up_to_pages(size: int) -> None:
    memory = MachineConfig(memory=size).memory
    assert memory % layout.PAGE == 0
    assert 0 <= memory - size < layout.PAGE


@given(st.integers(layout.MEMORY_MIN, layout.MEMORY_MAX))
def test_ram_lies_around_the_hole_and_none_is_lost(size: int) -> None:
    regions = layout.ram_regions(size)
    assert sum(length for _, length in regions) == size
    assert all(length > 0 for _, length in regions)
    assert regions[0][0] == 0 and regions[0][1] <= layout.LOW_RAM_END
    assert [gpa for gpa, _ in regions[1:]] == ([layout.HIGH_RAM_START] if size > layout.LOW_RAM_END else [])


def test_defaults() -> None:
    config = MachineConfig()
    assert config.as_dict() == {name: field.read(field.default) for name, field in FIELDS.items()}
    assert (config.memory, config.cpus, config.kernel, config.console) == (256 << 20, 1, None, "none")


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("memory", "1G", 1 << 30),
        ("memory", (1 << 20) + 1, (1 << 20) + 4096),
        ("timeout", 3, 3.0),
        ("initrd", "a,b", ("a", "b")),
        ("initrd", ["a", "b"], ("a", "b")),
        ("initrd", "a,,b,c", ("a,b", "c")),
        ("initrd", "a,,,b", ("a,", "b")),
        ("initrd", ["a,b"], ("a,b",)),
        ("initrd", Path("a,b"), ("a,b",)),
        ("initrd", "", ()),
        ("address", "0x7c00", 0x7C00),
        ("address", 31744, 0x7C00),
        ("console", "unix:/run/c:1", "unix:/run/c:1"),
        ("mode", "long", "long"),
    ],
)
def test_a_field_is_read(name: str, value: Any, read: Any) -> None:
    assert getattr(MachineConfig(**{name: value}), name) == read


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", (1 << 20) - 1),
        ("memory", (1 << 46) + 1),
        ("memory", -1),
        ("memory", True),
        ("memory", None),
        ("cpus", 0),
        ("cpus", True),
        ("cpus", 1.0),
        ("cpus", "2"),
        ("kernel", 5),
        ("initrd", 5),
        ("initrd", [5]),
        ("initrd", "a\0b"),
        ("initrd", ["a\0b"]),
        ("disks", "a\0b"),
        ("append", None),
        ("append", b"bytes"),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
        ("timeout", True),
        ("timeout", "3"),
        ("console", "stdio:"),
        ("console", "file"),
        ("console", "unix:"),
        ("console", None),
        ("kind", "floppy"),
        ("kind", None),
        ("kind", ["auto"]),
        ("mode", "virtual"),
        ("unpack", "nobody"),
        ("compat", True),
        ("address", -1),
        ("address", 1 << 52),
        ("address", "here"),
        ("address", 1.5),
        ("address", True),
        ("huge_pages", "yes"),
        ("huge_pages", 1),
        ("reboot", None),
        ("colour", "red"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        MachineConfig(**{name: value})
    assert "\n" not in str(refused.value)


def test_a_configuration_does_not_change() -> None:
    config = MachineConfig(cpus=2)
    with pytest.raises(AttributeError, match="with_"):
        config.cpus = 3
    with pytest.raises(AttributeError):
        config.colour = "red"
    assert config.cpus == 2


def test_with_makes_a_changed_copy() -> None:
    config = MachineConfig(memory="64M", append="a")
    other = config.with_(append="b")
    assert (config.append, other.append, other.memory) == ("a", "b", 64 << 20)
    with pytest.raises(ConfigError, match="colour"):
        config.with_(colour="red")


def test_equal_configurations_are_equal_and_hash_alike() -> None:
    one, same, other = MachineConfig(memory="1G"), MachineConfig(memory=1 << 30), MachineConfig(memory="2G")
    assert one == same and hash(one) == hash(same)
    assert one != other and one != "1G"
    assert len({one, same, other}) == 2


def test_repr_shows_what_was_given() -> None:
    assert repr(MachineConfig(memory="1G", cpus=2)) == f"MachineConfig(memory={1 << 30}, cpus=2)"


def test_paths_of_a_machine_file_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('kernel = "image"\ninitrd = "a,/b"\n')
    fields = read_file(path)
    assert fields == {"kernel": f"{tmp_path}/image", "initrd": [f"{tmp_path}/a", "/b"]}


@given(st.binary(max_size=60))
def test_any_bytes_are_a_machine_file_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    for name in ("m.toml", "m.json"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(data)
        try:
            fields = read_file(path)
        except ConfigError as error:
            assert name in str(error)
        else:
            assert set(fields) <= set(FIELDS)
