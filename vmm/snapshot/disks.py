"""Disks in snapshots and clones: what the guest can write is copied once, what it cannot is referred to.

A copy is sparse, and shares its blocks with the original where the host's file system can (reflink). Nobody writes it
afterwards: a machine that is made from it gets an overlay over it, of its own. So restoring costs no copy, and a
snapshot may be restored any number of times, also at the same time.

What a snapshot refers to (bases of overlays, read-only disks) is known again by size, time of the last write and inode.
What it holds has its checksum among its records (docs/snapshot-format.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.disk.image import temporary_file
from vmm.errors import HostError, SnapshotError
from vmm.parts import Disk
from vmm.snapshot.reading import RECORDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm.devices.device import State
    from vmm.devices.virtio.blk import Blk
    from vmm.disk.image import Image

_PIECE = 1 << 20
_FICLONE = 0x40049409  # _IOW(0x94, 9, int): linux/fs.h
_OPTIONS = ("serial", "cache", "sector", "queues", "iops", "bps")

# ---- files ----


def identity(path: str | int) -> State:
    """By what a file is known again: ``size`` in bytes, ``mtime_ns``, ``inode``. A block device's says little.
    Raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, str) else path
    try:
        found = os.fstat(fd)
        return {"size": os.lseek(fd, 0, os.SEEK_END), "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}
    finally:
        if isinstance(path, str):
            os.close(fd)


def changed_since(path: str, known: State) -> str:
    """What is different from :func:`identity`'s answer of then, as the end of a sentence about it; "": nothing."""
    try:
        now = identity(path)
    except OSError as error:
        return f"cannot be opened any more ({error.strerror})"
    if now["inode"] != known["inode"]:
        return "is another file now"
    if now["size"] != known["size"]:
        return f"has {now['size']} bytes and not {known['size']} as then"
    return "" if now["mtime_ns"] == known["mtime_ns"] else "was written since"


def copy_disk(source: str | int, to: str | int) -> None:
    """Copy a disk's file or block device to a new file ``to`` (or a descriptor of an empty one), and see to it that the
    copy is on stable storage; its directory is the caller's to sync.

    Of a descriptor the position is not used, and O_DIRECT does not matter. Raises
    :class:`~vmm.errors.HostError` when the host fails, or when somebody writes the source meanwhile; a new file is
    removed then.
    """
    import errno

    try:
        fd = os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666) if isinstance(to, str) else to
        try:
            _copy_into(f"/proc/self/fd/{source}" if isinstance(source, int) else source, fd)
        except BaseException:
            if isinstance(to, str):
                os.unlink(to)
            raise
        finally:
            if isinstance(to, str):
                os.close(fd)
    except OSError as error:
        where = f" to {to}" if isinstance(to, str) else ""
        fix = ": make room, or name another place" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else ""
        raise HostError(f"copying a disk{where}: {error.strerror}{fix}", error.errno or 0) from error


def _copy_into(source: str, to: int) -> None:
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)  # opened anew: its own flags
    try:
        before = identity(file)
        os.ftruncate(to, before["size"])
        if not _reflink(file, to):
            for start, end in _data(file, before["size"]):
                _copy_range(file, to, start, end)
        os.fsync(to)
        if identity(file) != before or os.fstat(to).st_size != before["size"]:
            raise HostError("a disk was written while it was copied: pause its machine, and nobody else may write it")
    finally:
        os.close(file)


def _reflink(source: int, to: int) -> bool:
    """Let both files share their blocks until one of them is written. False: the file system cannot."""
    import fcntl

    try:
        fcntl.ioctl(to, _FICLONE, source)
    except OSError:
        return False
    return True


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where there is something, from and to, in order."""
    import errno

    done = 0
    while done < size:
        try:
            start = os.lseek(fd, done, os.SEEK_DATA)
            done = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing from here to the end
                return
            if error.errno != errno.EINVAL:
                raise
            start, done = done, size  # a block device does not say
        yield start, done


def _copy_range(source: int, to: int, at: int, end: int) -> None:
    """Within the kernel where it can, else through here; MiBs of zeros become holes then."""
    try:
        while at < end and (n := os.copy_file_range(source, to, end - at, at, at)):
            at += n
    except OSError:
        pass  # two file systems, or one that cannot; a real error comes again
    while at < end and (piece := os.pread(source, min(_PIECE, end - at), at)):
        if not piece.strip(b"\0"):
            at += len(piece)
            continue
        rest = memoryview(piece)
        while rest:
            n = os.pwrite(to, rest, at)
            at, rest = at + n, rest[n:]


# ---- snapshots ----


def save_disks(disks: Sequence[Disk], devices: Sequence[Blk], directory: str) -> list[State]:
    """A record for each of a paused machine's disks: its files, the base first.

    Copied into ``directory``, a new one, is what the guest can write, and what nobody could find again, having no
    name: ``disk0-0.img`` or, over a base, ``disk0-1.ovl``. A file of another snapshot, on which the machine began, is
    linked there (or copied): no snapshot needs another's directory. Raises :class:`~vmm.errors.HostError`.
    """
    return [
        {
            "version": 1,
            "readonly": int(disk.readonly),
            "options": {name: getattr(disk, name) for name in _OPTIONS},
            "files": list(_save(index, disk, blk, directory)),
        }
        for index, (disk, blk) in enumerate(zip(disks, devices, strict=True))
    ]


def restore_disks(states: list[State], directory: str, writable: str | None = None) -> list[Disk]:
    """The disks of a machine that goes on from what :func:`save_disks` put into ``directory``, which it does not
    write: what its guest writes goes to overlays ``disk0.ovl`` in the directory ``writable``, or, without one, to files
    that go with the machine. That the directory's files are what was written has been checked.

    Raises :class:`~vmm.errors.SnapshotError`, naming the disk, when a file that is referred to has changed;
    ``ValueError`` for what is no record of a disk.
    """
    if not isinstance(states, list):
        raise ValueError("no list of disks' records")
    return [_restore(index, _parsed(state), directory, writable) for index, state in enumerate(states)]


def _has_name(image: Image) -> bool:
    """Not one of :class:`FrozenDisks`."""
    return os.fstat(image.fd).st_nlink > 0


def _save(index: int, disk: Disk, blk: Blk, directory: str) -> Iterator[State]:
    *below, last = blk.files()
    if below:
        blk.sync()  # an overlay's bitmap is in memory until then
    for level, image in enumerate([*below, last]):
        name = f"disk{index}-{level}.{'ovl' if level else 'img'}"
        to = os.path.join(directory, name)
        if (image is last and not disk.readonly) or not _has_name(image):
            copy_disk(image.fd, to)
        elif not _is_snapshots(image):
            yield {"path": os.path.abspath(image.path), **identity(image.fd)}
            continue
        elif not _link(image, to):
            copy_disk(image.fd, to)
        yield {"file": name}


def _is_snapshots(image: Image) -> bool:
    """Whether a file lies in a snapshot."""
    return os.path.exists(os.path.join(os.path.dirname(os.path.abspath(image.path)), RECORDS))


def _link(image: Image, to: str) -> bool:
    """Give a file that nobody writes another name. False: another file system, or another file has its name now."""
    try:
        os.link(image.path, to)
    except OSError:
        return False
    if os.path.samestat(os.stat(to), os.fstat(image.fd)):
        return True
    os.unlink(to)
    return False


def _restore(index: int, state: State, directory: str, writable: str | None) -> Disk:
    base, *layers = [_found(file, os.path.abspath(directory)) for file in state["files"]]
    if state["readonly"]:
        return Disk(base, readonly=True, **state["options"])
    if writable is None:
        place = {"temporary": True, "cache": "writeback"}
    else:
        place = {"overlay": os.path.join(os.path.abspath(writable), f"disk{index}.ovl")}
    return Disk(base, layers=layers, **{**state["options"], **place})


def _found(file: State, directory: str) -> str:
    """The path of a record's file, which is what it was."""
    if "path" in file:
        changed = changed_since(file["path"], file)
        if changed:
            raise SnapshotError(f"disk {file['path']} {changed}: the snapshot refers to it, give it back as it was")
        return str(file["path"])
    path = os.path.join(directory, file["file"])
    if not os.path.exists(path):
        raise SnapshotError(f"disk {path} of the snapshot is missing: take the snapshot from another copy")
    return path


def _parsed(state: State) -> State:
    """A record that can be one. Raises ``ValueError``."""
    if not isinstance(state, dict) or state.get("version") != 1:
        raise ValueError("no record of a disk of version 1")
    _require(state, version=int, readonly=int, options=dict, files=list)
    _require(state["options"], serial=str, cache=str, sector=int, queues=int, iops=int, bps=int)
    for file in state["files"]:
        if isinstance(file, dict) and "path" in file:
            _require(file, path=str, size=int, mtime_ns=int, inode=int)
        else:
            _require(file, file=str)
            if file["file"] != os.path.basename(file["file"]):
                raise ValueError("a disk's record names a copy outside the snapshot")
    if not state["files"] or (state["readonly"] and len(state["files"]) > 1):
        raise ValueError("a disk's record without a base, or with layers that nobody writes over")
    return state


def _require(value: object, **kinds: type) -> None:
    if not isinstance(value, dict) or set(value) != set(kinds) or any(type(value[n]) is not kinds[n] for n in kinds):
        raise ValueError(f"a disk's record has other fields than {', '.join(kinds)}")


# ---- clones ----


class FrozenDisks:
    """Disks as they are now, for any number of clones of a machine: ``disks`` for each of them.

    Every clone writes into a temporary overlay of its own. The original goes on with its own files and does not disturb
    them. Cost: one copy, whatever the number of clones, of what the guest can write: of a raw disk all that is not a
    hole, of an overlay what was written into it; blocks are shared instead where the file system can. Copies have
    no name, lie beside the original where that can be, and go with the last clone, once this is closed: do so when
    the clones' machines are made. In this process only.
    """

    def __init__(self, disks: Sequence[Disk], devices: Sequence[Blk]) -> None:
        """The machine is paused. Raises :class:`~vmm.errors.HostError`."""
        self._files: list[int] = []
        try:
            self.disks = [self._freeze(disk, blk) for disk, blk in zip(disks, devices, strict=True)]
        except BaseException:
            self.close()
            raise

    def _freeze(self, disk: Disk, blk: Blk) -> Disk:
        if disk.readonly:
            return disk
        *below, written = blk.files()
        if below:
            blk.sync()
        base, *layers = [
            *(image.path if _has_name(image) else self._hold(image) for image in below),
            self._copy(written),
        ]
        fields = {"path": base, "layers": layers, "overlay": None, "temporary": True, "cache": "writeback"}
        return Disk(**{**disk.as_dict(), **fields})

    def _hold(self, image: Image) -> str:
        self._files.append(os.dup(image.fd))
        return f"/proc/self/fd/{self._files[-1]}"

    def _copy(self, image: Image) -> str:
        with temporary_file(near=image.path) as file:
            self._files.append(os.dup(file.fileno()))
        copy_disk(image.fd, self._files[-1])
        return f"/proc/self/fd/{self._files[-1]}"

    def close(self) -> None:
        """Make no more clones. A second close does nothing."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> FrozenDisks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
