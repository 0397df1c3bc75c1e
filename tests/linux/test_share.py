"""A guest mounts directories of the host: reads, writes, and is refused what it may not."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from users import ordinary_user

from vmm.devices.virtio import fs
from vmm.errors import HostError
from vmm.linux import initramfs
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(900)  # a minute alone where kernel code is emulated

BIG = 16 << 20
MANY = 500  # names: more than one READDIR answer holds


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ordinary user's directory with a secret in it and two directories to share; skipped without virtiofsd."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)  # it is not the ordinary user's
    try:
        fs.find_server()
    except HostError as error:
        pytest.skip(str(error))
    place = Path(tempfile.mkdtemp(prefix="vmm-share-"))
    with ordinary_user() as user:
        pass
    os.chown(place, user, -1)
    place.chmod(0o755)
    with ordinary_user():
        (place / "secret").write_text("the host's own\n")
        for name in ("work", "fixed"):
            (place / name).mkdir()
            (place / name / "hello").write_text(f"from the host to {name}\n")
    yield place
    shutil.rmtree(place)


def machine_with(place: Path, kernel: Path, program: str) -> Machine:
    """A machine that runs ``program`` in a shell, its shares served for an ordinary user."""
    initrd = initramfs.command(["sh", "-c", program])
    machine = Machine(kernel=kernel, initrd=[initrd], memory="128M")
    with ordinary_user():
        machine.add(fs.Fs(machine.native, 0, place / "work", "work"))
        machine.add(fs.Fs(machine.native, 1, place / "fixed", "fixed", readonly=True))
    return machine


MOUNT = "mkdir -p /work /fixed; mount -t virtiofs work /work && mount -t virtiofs fixed /fixed || exit 9\n"


def printed(machine: Machine) -> str:
    """What the guest said."""
    return machine.console.transcript.decode(errors="replace").replace("\r", "")


def test_files_go_both_ways_and_what_may_not_be_is_refused(small_kernel: SmallKernel, place: Path) -> None:
    work, fixed = place / "work", place / "fixed"
    data = random.Random(16).randbytes(BIG)
    (work / "big").write_bytes(data)
    (work / "outside").symlink_to(place / "secret")
    (work / "above").symlink_to("../secret")
    os.mkfifo(work / "pipe")
    (fixed / "many").mkdir()
    for number in range(MANY):
        (fixed / "many" / f"name-{number}").touch()
    program = f"""{MOUNT}
        cat /work/hello /fixed/hello
        sha256sum /work/big; dd if=/work/big of=/work/copy bs=128k count=8 && echo copied
        mkdir /work/new && echo first > /work/new/file && mv /work/new/file /work/new/moved && echo made
        ln /work/new/moved /work/new/linked && ln -s ../../../etc/passwd /work/new/escape && echo linked
        cat /work/outside; cat /work/above; cat /work/../secret
        mknod /work/disk b 7 0; mknod /work/zero c 1 5
        echo no > /fixed/hello; rm /fixed/hello; mkdir /fixed/new; chmod 777 /fixed/hello; echo > /fixed/many/name-0
        mount -o remount,rw /fixed; echo no > /fixed/hello
        set -- /fixed/many/*; echo $#
        umount /work && umount /fixed && echo over"""
    with machine_with(place, small_kernel.bzimage, program) as machine:
        outcome = machine.run(timeout=800)
        text = printed(machine)
        assert machine.messages == []
    assert outcome.reason == "power-off", text[-3000:]
    assert "from the host to work\nfrom the host to fixed\n" in text
    for word in (f"{hashlib.sha256(data).hexdigest()}  /work/big", "copied", "made", "linked", f"\n{MANY}\n", "over"):
        assert word in text, f"{word!r} is not in: {text[-3000:]}"
    # What the guest wrote is the sharing user's on the host.
    assert (work / "copy").read_bytes() == data[: 1 << 20]
    assert (work / "new" / "moved").read_text() == "first\n"
    assert (work / "new" / "moved").stat().st_nlink == 2
    assert (work / "copy").stat().st_uid == place.stat().st_uid
    # Links are the guest's to follow, in its own tree; nothing outside the directory was reached.
    assert str((work / "new" / "escape").readlink()) == "../../../etc/passwd"
    assert "the host's own" not in text
    assert text.count("No such file or directory") >= 3
    assert not (work / "disk").exists() and not (work / "zero").exists()
    assert text.count("Operation not permitted") == 2, text[-3000:]
    # Nothing of the read-only share changed, not its permissions either.
    assert text.count("Read-only file system") == 6, text[-3000:]
    assert (fixed / "hello").read_text() == "from the host to fixed\n"
    assert (fixed / "hello").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in fixed.iterdir()) == ["hello", "many"]
