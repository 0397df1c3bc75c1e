"""Disks in snapshots and clones: what the guest can write is copied once, what it cannot is referred to.

A copy is sparse, and shares its blocks with the original where the host's file system can (reflink). Nobody writes it
afterwards: a machine that is made from it gets an overlay over it, of its own. So restoring costs no copy, and a
snapshot may be restored any number of times, also at the same time.

What a snapshot refers to (bases of overlays, read-only disks) is known again by size, time of the last write and inode.
What it holds is known by its checksum.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.disk.image import temporary_file
from vmm.errors import HostError, SnapshotError
from vmm.parts import Disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm.devices.device import State
    from vmm.devices.virtio.blk import Blk
    from vmm.disk.image import Image

BLOCK = 65536
_PIECE = 16 * BLOCK
_ZEROS = bytes(BLOCK)
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


def checksum(path: str) -> int:
    """CRC-32 of a file's blocks of 64 KiB that are not zeros, each after its number: holes and zeros are the same.
    Raises ``OSError``."""
    with open(path, "rb", buffering=0) as file:
        return _copy(file.fileno(), None)


def copy_disk(source: str | int, to: str | int) -> int:
    """Copy a disk's file or block device to a new file ``to`` (or a descriptor of an empty one), and see to it that the
    copy is on stable storage; its directory is the caller's to sync. Answers the :func:`checksum`.

    Of a descriptor the position is not used, and O_DIRECT does not matter. Raises
    :class:`~vmm.errors.HostError` when the host fails, or when somebody writes the source meanwhile; a new file is
    removed then.
    """
    import errno

    try:
        fd = os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666) if isinstance(to, str) else to
        try:
            return _copy_into(f"/proc/self/fd/{source}" if isinstance(source, int) else source, fd)
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


def _copy_into(source: str, to: int) -> int:
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)  # opened anew: its own flags
    try:
        before = identity(file)
        os.ftruncate(to, before["size"])
        crc = _copy(file, None if _reflink(file, to) else to)
        os.fsync(to)
        if identity(file) != before or os.fstat(to).st_size != before["size"]:
            raise HostError("a disk was written while it was copied: pause its machine, and nobody else may write it")
        return crc
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


def _copy(source: int, to: int | None) -> int:
    """The checksum of ``source``; what is not zeros is written to ``to`` on the way."""
    import zlib

    crc = 0
    for number, block in _blocks(source):
        crc = zlib.crc32(block, zlib.crc32(number.to_bytes(8, "little"), crc))
        at, rest = number * BLOCK, memoryview(block)
        while to is not None and rest:
            n = os.pwrite(to, rest, at)
            at, rest = at + n, rest[n:]
    return crc


def _blocks(fd: int) -> Iterator[tuple[int, bytes]]:
    """The blocks that are not zeros, and their numbers; the file's last may be short."""
    for start, end in _data(fd, os.lseek(fd, 0, os.SEEK_END)):
        for at in range(start, end, _PIECE):
            piece = os.pread(fd, min(_PIECE, end - at), at)
            for i in range(0, len(piece), BLOCK):
                block = piece[i : i + BLOCK]
                if block != _ZEROS[: len(block)]:
                    yield (at + i) // BLOCK, block


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where there is something: from and to, at the edges of blocks, in order, nothing twice."""
    import errno

    done = 0
    while done < size:
        try:
            start = os.lseek(fd, done, os.SEEK_DATA)
            hole = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing from here to the end
                return
            if error.errno != errno.EINVAL:
                raise
            start, hole = done, size  # a block device does not say
        done = min(size, -(-hole // BLOCK) * BLOCK)
        yield start // BLOCK * BLOCK, done


# ---- snapshots ----


def save_disks(disks: Sequence[Disk], devices: Sequence[Blk], directory: str) -> list[State]:
    """A record for each of a paused machine's disks: its files, the base first. Copied into ``directory``, a new one,
    are what the guest can write, and what no one could find again, having no name: ``disk0.img``, or ``disk0-1.ovl``
    for an overlay, the first over its base. Raises :class:`~vmm.errors.HostError`."""
    return [
        {
            "version": 1,
            "readonly": int(disk.readonly),
            "options": {name: getattr(disk, name) for name in _OPTIONS},
            "files": _save(index, disk, blk, directory),
        }
        for index, (disk, blk) in enumerate(zip(disks, devices, strict=True))
    ]


def restore_disks(states: Sequence[State], directory: str, writable: str | None = None) -> list[Disk]:
    """The disks of a machine that goes on from what :func:`save_disks` put into ``directory``, which it does not
    write: what its guest writes goes to overlays ``disk0.ovl`` in the directory ``writable``, or, without one, to files
    that go with the machine.

    Raises :class:`~vmm.errors.SnapshotError`, naming the disk, when a file the snapshot holds is damaged or one it
    refers to has changed; ``ValueError`` for what is no record of a disk.
    """
    return [_restore(index, _parsed(state), directory, writable) for index, state in enumerate(states)]


def _has_name(image: Image) -> bool:
    """Not one of :class:`FrozenDisks`."""
    return os.fstat(image.fd).st_nlink > 0


def _save(index: int, disk: Disk, blk: Blk, directory: str) -> list[State]:
    files = blk.files()
    if not disk.readonly:
        blk.sync()  # an overlay's bitmap is in memory until then
    saved = []
    for level, image in enumerate(files):
        written = level == len(files) - 1 and not disk.readonly
        if written or not _has_name(image):
            name = f"disk{index}-{level}.ovl" if level else f"disk{index}.img"
            crc = copy_disk(image.fd, os.path.join(directory, name))
            saved.append({"file": name, "size": os.stat(os.path.join(directory, name)).st_size, "crc": crc})
        else:
            saved.append({"path": os.path.abspath(image.path), **identity(image.fd)})
    return saved


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
    try:
        good = os.stat(path).st_size == file["size"] and checksum(path) == file["crc"]
    except OSError as error:
        raise SnapshotError(f"disk {path} of the snapshot cannot be read: {error.strerror}") from error
    if not good:
        raise SnapshotError(f"disk {path} of the snapshot is damaged: take the snapshot from another copy")
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
            _require(file, file=str, size=int, crc=int)
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
        blk.sync()  # an overlay's bitmap is in memory until then
        *below, written = blk.files()
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
