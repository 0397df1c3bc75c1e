"""Initramfs archives: read back by a parser of the format and by cpio itself."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from vmm.errors import ConfigError
from vmm.linux import initramfs
from vmm.linux.initramfs import build, character_device, directory, file, symlink, tree


class Member(NamedTuple):
    mode: int
    mtime: int
    links: int
    device: tuple[int, int]
    content: bytes


def parsed(archive: bytes) -> dict[str, Member]:
    """The archive's members in its own order, by the format's document rather than by our writer."""
    members: dict[str, Member] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        words = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        _, mode, _, _, links, mtime, size, _, _, major, minor, name_size, check = words
        assert check == 0
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) & ~3
        at = (start + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return members
        members[name[:-1].decode()] = Member(mode, mtime, links, (major, minor), archive[start : start + size])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    path = tmp_path / "busybox"
    path.write_bytes(b"\x7fELF not really")
    return path


def test_every_kind_of_entry_is_read_back_as_it_was_given() -> None:
    members = parsed(
        build(
            [
                file("bin/tool", b"12345", 0o755),
                symlink("bin/link", "tool"),
                character_device("dev/console", 5, 1),
                directory("tmp", 0o1777),
            ]
        )
    )
    assert members["bin/tool"].content == b"12345"
    assert members["bin/tool"].mode == stat.S_IFREG | 0o755
    assert members["bin/link"].content == b"tool"
    assert members["bin/link"].mode == stat.S_IFLNK | 0o777
    assert members["dev/console"].mode == stat.S_IFCHR | 0o600
    assert members["dev/console"].device == (5, 1)
    assert members["tmp"].mode == stat.S_IFDIR | 0o1777
    assert members["tmp"].links == 2


def test_parents_come_by_themselves_and_before_their_children() -> None:
    names = list(parsed(build([file("a/b/c", b""), file("a.b", b""), file("a-b/x", b"")])))
    assert set(names) == {"a", "a/b", "a/b/c", "a.b", "a-b", "a-b/x"}
    for name in names:
        if "/" in name:
            assert names.index(name.rpartition("/")[0]) < names.index(name)


def test_the_same_entries_in_any_order_give_the_same_bytes() -> None:
    entries = [file("z", b"1"), directory("m"), symlink("a/l", "z")]
    assert build(entries) == build(reversed(entries))
    assert all(member.mtime == 0 for member in parsed(build(entries)).values())


def test_the_last_of_several_entries_with_one_name_counts() -> None:
    assert parsed(build([file("x", b"first"), file("/x", b"last")]))["x"].content == b"last"


def test_a_host_tree_is_taken_with_links_and_permissions(tmp_path: Path) -> None:
    host = tmp_path / "tree"
    (host / "etc/empty").mkdir(parents=True)
    (host / "etc/run").write_bytes(b"#!")
    (host / "etc/run").chmod(0o750)
    (host / "etc/to").symlink_to("/nowhere")
    (host / "loop").symlink_to(".", target_is_directory=True)
    members = parsed(build(tree(host, "opt/x")))
    assert members["opt/x/etc/run"].content == b"#!"
    assert members["opt/x/etc/run"].mode == stat.S_IFREG | 0o750
    assert members["opt/x/etc/to"].content == b"/nowhere"
    assert stat.S_ISDIR(members["opt/x/etc/empty"].mode)
    assert stat.S_ISLNK(members["opt/x/loop"].mode)
    assert not any(name.startswith("opt/x/loop/") for name in members)


@pytest.mark.parametrize("name", ["", "/", ".", "a/../b", "..", "nul\0", "x" * 4096, "TRAILER!!!"])
def test_a_name_the_unpacker_would_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        file(name, b"")


def test_an_unreadable_host_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: No such file"):
        build([file("x", tmp_path / "absent")])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_lists_what_was_written(busybox: Path) -> None:
    archive = initramfs.default(busybox).read_bytes()
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    assert listed.stderr == b""
    assert set(listed.stdout.decode().split()) == set(parsed(archive))


def test_the_default_has_a_console_an_init_and_one_busybox(busybox: Path) -> None:
    members = parsed(initramfs.default(busybox).read_bytes())
    assert members["dev/console"].device == (5, 1)
    assert members["init"].mode & 0o111
    assert members["init"].content.startswith(b"#!/bin/busybox sh\n")
    assert [n for n, m in members.items() if m.content == busybox.read_bytes()] == ["bin/busybox"]


def test_a_callers_entry_replaces_the_default_one(busybox: Path) -> None:
    archive = initramfs.default(busybox, [file("init", b"mine")]).read_bytes()
    assert parsed(archive)["init"].content == b"mine"


def test_a_command_reaches_the_guest_shell_word_by_word(busybox: Path) -> None:
    argv = ["printf", "%s|", "two words", "a'b", "$HOME", "", "-n"]
    script = parsed(initramfs.command(argv, busybox).read_bytes())["etc/argv"].content.decode()
    ran = subprocess.run(["sh", "-c", script + '"$@"'], capture_output=True, check=True)
    assert ran.stdout == b"two words|a'b|$HOME||-n|"


def test_interfaces_come_up_and_get_a_lease_where_there_is_who_gives_one(busybox: Path) -> None:
    members = parsed(initramfs.default(busybox, initramfs.network([True, False])).read_bytes())
    up = members["etc/up"].content.decode()
    assert [line.split()[4] for line in up.splitlines() if " link set " in line] == ["eth0", "eth1"]
    assert [line.split()[3] for line in up.splitlines() if " udhcpc " in line] == ["eth0"]
    assert members["etc/lease"].mode & 0o111
    for script in (members["etc/up"], members["etc/lease"], members["init"]):
        subprocess.run(["sh", "-n"], input=script.content, check=True)
    assert b"/etc/up" in members["init"].content
    assert initramfs.network([]) == []


@pytest.mark.parametrize("argv", [[], ["a\0b"]])
def test_a_command_that_cannot_be_is_refused(argv: list[str], busybox: Path) -> None:
    with pytest.raises(ConfigError):
        initramfs.command(argv, busybox)


def test_archives_are_cached_by_content(busybox: Path, cache: Path) -> None:
    first = initramfs.default(busybox)
    assert first.is_relative_to(cache)
    assert initramfs.default(busybox) == first
    busybox.write_bytes(b"\x7fELF another")
    assert initramfs.default(busybox) != first
