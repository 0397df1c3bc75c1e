"""What a record says of a machine: every field is there because it was allowed to be, and none locates anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vmm.config import FIELDS, MachineConfig
from vmm.errors import ConfigError
from vmm.parts import Disk, Net, Share, Vsock
from vmm.snapshot import description as descriptions
from vmm.snapshot.description import Described, describe, without_places
from vmm.snapshot.origin import PLACES, USES

LOCATING = ("kernel", "initrd", "shares")  # in no record at all
SECRET = "/home/somebody/secret"
CONFIG = MachineConfig(
    kernel=SECRET,
    initrd=[SECRET],
    symbols=SECRET,
    control=SECRET,
    gdb=SECRET,
    console=f"file:{SECRET}",
    standby=f"unix:{SECRET}",
    checkpoint_dir=SECRET,
    disks=[
        Disk(SECRET, serial="a", iops=7, cache="none"),
        Disk(SECRET, overlay=SECRET, layers=[SECRET], queues=2),
        Disk(SECRET, readonly=True, sector=4096),
    ],
    nets=[
        Net("user", mtu=1400),
        Net("user", hostfwd=["tcp:127.0.0.1:8080-:80"], mac="52:54:00:00:00:01"),
        Net("tap", tap="secret", queues=2),
        Net("socket", socket=SECRET, pps=9),
    ],
    vsock=Vsock(SECRET, cid=9),
)
RECORD = describe(CONFIG, [4096, 8192, 12288])


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*map(str, value), *(text for part in value.values() for text in strings(part))]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_every_field_of_a_machine_describes_or_is_said_by_the_person() -> None:
    """A new field is in no record until somebody has decided that it locates nothing and spends nothing."""
    kinds = [*descriptions.FIELDS, *USES, *PLACES, *LOCATING]
    assert sorted(kinds) == sorted(FIELDS)


@pytest.mark.parametrize(
    ("part", "described", "locating"),
    [
        (Disk, descriptions.DISK, {"path", "overlay", "layers", "temporary"}),
        (Net, descriptions.NET, {"tap", "socket", "hostfwd"}),
        (Vsock, ("cid",), {"path"}),
        (Share, (), {"directory", "tag", "readonly"}),
    ],
    ids=["disk", "net", "vsock", "share"],
)
def test_every_field_of_a_part_describes_or_is_said_by_the_person(
    part: Any, described: tuple[str, ...], locating: set[str]
) -> None:
    assert {*described} | locating == {*part.fields} and not {*described} & locating


def test_a_record_has_nothing_in_it_that_locates() -> None:
    for text in strings(RECORD):
        assert "secret" not in text and "/" not in text and "8080" not in text


def place(record: Any = RECORD, ready: Any = (), **given: Any) -> dict[str, Any]:
    return Described(record).place(given, {number: Disk("held") for number in ready}, {}, "is not in the record")


def test_what_an_option_leaves_out_is_as_it_was() -> None:
    found = place(
        disks=["a.img", "b.img,temporary,queues=4", "c.img"],
        nets=["user", "user,mtu=1300", "tap=t", "socket=s,pps=1"],
        vsock="v",
    )
    assert found["disks"] == [
        Disk("a.img", serial="a", iops=7, cache="none"),
        Disk("b.img", temporary=True, queues=4),
        Disk("c.img", readonly=True, sector=4096),
    ]
    assert found["nets"] == [
        Net("user", mtu=1400),
        Net("user", mtu=1300, mac="52:54:00:00:00:01"),
        Net("tap", tap="t", queues=2),
        Net("socket", socket="s", pps=1),
    ]
    assert found["vsock"] == Vsock("v", cid=9)


def test_what_needs_no_place_is_not_asked_for() -> None:
    found = place(ready=[0, 2], disks=["b.img"], nets=["user,hostfwd=tcp::1-:1", "tap=t", "socket=s"], vsock="v,cid=4")
    assert [disk.path for disk in found["disks"]] == ["held", "b.img", "held"]
    assert [net.backend for net in found["nets"]] == ["user", "user", "tap", "socket"]
    assert found["nets"][1].hostfwd == ("tcp::1-:1",) and found["vsock"].cid == 4


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "disk 0 is not in the record, and its record says no place: give --disk FILE"),
        ({"disks": ["a"]}, "--disk is given 1 times, for 3: give one for each$"),
        (
            {"disks": ["a", "b", "c"]},
            "net 1 had ports of the host forwarded to it, .*: give --net user,hostfwd=",
        ),
        (
            {"disks": ["a", "b", "c"], "nets": ["user"]},
            "--net is given 1 times, for 4: .*, or for 1, 2, 3 alone",
        ),
        ({"disks": ["a", "b", "c"], "nets": ["user", "tap=t", "socket=s"]}, "says no place: give --vsock PATH"),
    ],
    ids=["disks", "too few", "nets", "one net", "vsock"],
)
def test_what_is_missing_is_named(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        place(**given)


def test_what_the_machine_has_not_is_refused() -> None:
    bare = describe(MachineConfig(), [])
    assert place(bare) == {"disks": [], "nets": [], "vsock": None}
    for given in ({"disks": ["a"]}, {"nets": ["user"]}, {"vsock": "v"}):
        with pytest.raises(ConfigError, match=r"the machine has no .*: leave out --"):
            place(bare, **given)


@pytest.mark.parametrize("where", [("config",), ("disks", 0), ("nets", 0), ("vsock",)], ids=str)
def test_a_field_more_or_less_is_refused(where: tuple[Any, ...]) -> None:
    for change in ("more", "less"):
        record = copy.deepcopy(RECORD)
        at: Any = record
        for step in where:
            at = at[step]
        if change == "more":
            at["path"] = SECRET
        else:
            at.popitem()
        with pytest.raises(ValueError, match="other fields"):
            Described(record)


def test_a_description_of_version_1_is_read_without_its_places() -> None:
    old = {
        **{name: getattr(CONFIG, name) for name in descriptions.FIELDS},
        "kernel": SECRET,
        "initrd": [SECRET],
        "shares": [],
        "disks": [disk.as_dict() for disk in CONFIG.disks],
        "nets": [{**net.as_dict(), "hostfwd": list(net.hostfwd)} for net in CONFIG.nets],
        "vsock": CONFIG.vsock.as_dict() if CONFIG.vsock else None,
    }
    found = without_places(old)
    assert found == {**RECORD, "disks": [{**disk, "size": 0} for disk in RECORD["disks"]]}
    Described(found)
    with pytest.raises(ValueError, match="share"):
        without_places({**old, "shares": [{"directory": "/", "tag": "root"}]})


def test_parts_are_bounded() -> None:
    record = copy.deepcopy(RECORD)
    record["nets"] = record["nets"][:1] * (descriptions.PARTS_MAX + 1)
    with pytest.raises(ValueError, match="no list of at most"):
        Described(record)
