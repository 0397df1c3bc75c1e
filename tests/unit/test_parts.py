"""Parts of a machine: text and objects are the same, and what cannot be is refused in a sentence that names the fix."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.config import MachineConfig, read_file
from vmm.errors import ConfigError
from vmm.parts import Disk, Net, Part, Share, Vsock, parse_hostfwd, read_disks, read_shares, read_vsock

SAME = [
    (Disk, "root.img", Disk("root.img")),
    (Disk, "a,,b.img,ro,serial=root", Disk("a,b.img", readonly=True, serial="root")),
    (Disk, "d.img,cache=none,sector=4096,queues=4", Disk("d.img", cache="none", sector=4096, queues=4)),
    (Disk, "d.img,overlay=top.ovl,iops=100,bps=10M", Disk("d.img", overlay="top.ovl", iops=100, bps=10 << 20)),
    (Net, "user", Net()),
    (Net, "user,hostfwd=tcp::8080-:80,hostfwd=udp:127.0.0.1:53-:53",
     Net("user", hostfwd=("tcp::8080-:80", "udp:127.0.0.1:53-:53"))),
    (Net, "tap=tap0,mac=52:54:00:AB:cd:ef,mtu=1400", Net("tap", tap="tap0", mac="52:54:00:ab:cd:ef", mtu=1400)),
    (Net, "socket=/tmp/l,queues=2,pps=5,bps=1000", Net("socket", socket="/tmp/l", queues=2, pps=5, bps=1000)),
    (Share, "/a:b:tag,ro", Share("/a:b", "tag", readonly=True)),
    (Vsock, "/tmp/v,cid=9", Vsock("/tmp/v", cid=9)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "part"), SAME, ids=[text for _, text, _ in SAME])
def test_text_and_object_are_the_same(kind: type[Part], text: str, part: Part) -> None:
    assert kind.parse(text) == part
    assert hash(kind.parse(text)) == hash(part)
    assert copy.deepcopy(part) == part
    assert pickle.loads(pickle.dumps(part)) == part


BAD = [
    (Disk, "", "path of a file"),
    (Disk, "d,oops", "write it as name=value"),
    (Disk, "d,size=5", "has no field 'size': it has path"),
    (Disk, "d,cache=maybe", "writeback, none"),
    (Disk, "d,sector=1000", "give 512 or 4096"),
    (Disk, "d,queues=0", "give 1 to 16"),
    (Disk, "d,serial=" + "x" * 21, "up to 20"),
    (Disk, "d,ro,overlay=o", "give one of the two"),
    (Disk, "d,bps=fast", "a number of bytes a second"),
    (Net, "wire", "write user, tap=NAME or socket=PATH"),
    (Net, "tap=", "write user, tap=NAME"),
    (Net, "user,mac=52:54:00:12:34", "write 52:54:00:12:34:56"),
    (Net, "user,mac=01:00:5e:00:00:01", "multicast"),
    (Net, "tap=t,hostfwd=tcp::1-:2", "hostfwd is for --net user"),
    (Net, "user,hostfwd=tcp:80:80", "write tcp::8080-:80"),
    (Net, "user,hostfwd=tcp::0-:80", "write tcp::8080-:80"),
    (Net, "user,tap=t", "goes with the backend tap"),
    (Net, "user,mtu=5", "give 68 to 65535"),
    (Share, "nothing", "write DIR:TAG"),
    (Share, "d:", "1 to 36 bytes"),
    (Share, "d:" + "t" * 37, "1 to 36 bytes"),
    (Vsock, "p,cid=2", "give 3 to"),
]


@pytest.mark.parametrize(("kind", "text", "said"), BAD, ids=[text or "empty" for _, text, _ in BAD])
def test_what_cannot_be_is_refused(kind: type[Part], text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        kind.parse(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.text(max_size=60))
@settings(max_examples=examples(200))
def test_any_text_is_a_part_or_one_sentence(text: str) -> None:
    for kind in (Disk, Net, Share, Vsock):
        try:
            part = kind.parse(text)
        except ConfigError as error:
            assert str(error)
        else:
            assert part == kind(**part.as_dict())


def test_parts_do_not_change() -> None:
    disk = Disk("d")
    with pytest.raises(AttributeError, match="make another"):
        disk.readonly = True
    assert disk.with_(readonly=True).readonly
    assert not disk.readonly
    assert repr(disk) == "Disk(path='d')"


def test_lists_take_objects_texts_tables_and_paths() -> None:
    given: list[object] = [Disk("a"), "b,ro", {"path": "c", "queues": 2}, Path("d,e")]
    found = read_disks(given)
    assert found == (Disk("a"), Disk("b", readonly=True), Disk("c", queues=2), Disk("d,e"))
    assert read_disks(None) == ()
    assert read_vsock(None) is None
    with pytest.raises(ConfigError, match="not a disk"):
        read_disks(5)


def test_shares_are_told_apart_by_their_tags() -> None:
    assert [share.tag for share in read_shares(["a:one", "a:two"])] == ["one", "two"]
    with pytest.raises(ConfigError, match="two shares have the tag 'one': give each its own"):
        read_shares(["a:one", "b:two", "c:one"])


def test_a_machine_files_paths_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(
        'disks = ["d.img,overlay=o"]\nnets = ["socket=link"]\nshares = ["src:t"]\nvsock = "v"\nrng = false\n'
    )
    config = MachineConfig(**read_file(file))
    assert config.disks[0].path == str(tmp_path / "d.img")
    assert config.disks[0].overlay == str(tmp_path / "o")
    assert config.nets[0].socket == str(tmp_path / "link")
    assert config.shares[0].directory == str(tmp_path / "src")
    assert config.vsock is not None and config.vsock.path == str(tmp_path / "v")
    assert not config.rng


def test_forwarded_ports_are_taken_apart() -> None:
    assert parse_hostfwd("tcp::8080-:80") == ("tcp", "", 8080, 80)
    assert parse_hostfwd("udp:127.0.0.1:53-:5353") == ("udp", "127.0.0.1", 53, 5353)
