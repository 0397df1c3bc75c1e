"""Disks in snapshots and clones: writable files are copied once, read-only ones are referred to.

A copy is sparse, and shares blocks with the original where the host's file system supports reflinks. It is never
written afterwards: each machine restored from it gets an overlay of its own. So a restore copies nothing, and a
snapshot can be restored any number of times, also concurrently.

Files that a snapshot does not hold (bases of overlays, read-only disks) are named again by the user at a restore, and
identified by size and modification time. Files that it holds have a checksum in the records and a computed name
(docs/snapshot-format.md). No record has a path.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from vmm.disk.image import temporary_file
from vmm.errors import ConfigError, HostError, SnapshotError
from vmm.parts import Disk, read_disks
from vmm.snapshot.reading import RECORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmm.devices.device import State
    from vmm.devices.virtio.blk import Blk
    from vmm.disk.image import Image

VERSION = 2
LAYERS_MAX = 64  # files of a disk: each is read through the one above it
_PIECE = 1 << 20
_FICLONE = 0x40049409  # _IOW(0x94, 9, int): linux/fs.h
_IDENTITY: dict[str, type] = {"size": int, "mtime_ns": int}
_OPTIONS = ("serial", "cache", "sector", "queues", "iops", "bps")

# ---- files ----


def identity(path: str | int) -> State:
    """Return what identifies a file: ``size`` in bytes and ``mtime_ns``, which for a block device proves little. Raises
    ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, str) else path
    try:
        found = os.fstat(fd)
        return {"size": os.lseek(fd, 0, os.SEEK_END), "mtime_ns": found.st_mtime_ns}
    finally:
        if isinstance(path, str):
            os.close(fd)


def changed_since(path: str, known: State) -> str:
    """Compare a file with its recorded :func:`identity`; return the difference as the end of a sentence, or ""."""
    try:
        now = identity(path)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if now["size"] != known["size"]:
        return f"has {now['size']} bytes and not {known['size']} as then"
    return "" if now["mtime_ns"] == known["mtime_ns"] else "was written since"


def copy_disk(source: str | int, to: str | int) -> None:
    """Copy a disk's file or block device to a new file ``to`` (or a descriptor of an empty one), and flush the copy to
    stable storage; the caller flushes its directory.

    The file position and O_DIRECT of a descriptor do not matter. Raises :class:`~vmm.errors.HostError` if the host
    fails, or the source is written meanwhile; then a new file is removed.
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
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)  # opened again, for flags of its own
    try:
        before = identity(file)
        os.ftruncate(to, before["size"])
        if not _reflink(file, to):
            for start, end in _data(file, before["size"]):
                _copy_range(file, to, start, end)
        os.fsync(to)
        if identity(file) != before or os.fstat(to).st_size != before["size"]:
            raise HostError(
                "a disk was written while it was copied: pause its machine, and end other programs that write it"
            )
    finally:
        os.close(file)


def _reflink(source: int, to: int) -> bool:
    """Reflink the source's blocks into ``to`` (FICLONE); return false if the file system does not support it."""
    import fcntl

    try:
        fcntl.ioctl(to, _FICLONE, source)
    except OSError:
        return False
    return True


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` of the extents that are not holes, ascending."""
    import errno

    done = 0
    while done < size:
        try:
            start = os.lseek(fd, done, os.SEEK_DATA)
            done = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole from here to the end
                return
            if error.errno != errno.EINVAL:
                raise
            start, done = done, size  # a block device has no SEEK_DATA
        yield start, done


def _copy_range(source: int, to: int, at: int, end: int) -> None:
    """Copy a range by copy_file_range(2), else by read and write, which leaves MiBs of zeros as holes."""
    try:
        while at < end and (n := os.copy_file_range(source, to, end - at, at, at)):
            at += n
    except OSError:
        pass  # across file systems, or not supported; a real error recurs below
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
    """Save a paused machine's disks; return a record for each: its files, the base first, without paths.

    All files are copied into the new ``directory`` under :func:`held_name`, except read-only bases and disks that have
    a name. Files of the snapshot that the machine was restored from are linked (or copied), so that no snapshot needs
    another's directory. Raises :class:`~vmm.errors.HostError`.
    """
    return [
        {
            "version": VERSION,
            "readonly": int(disk.readonly),
            "options": {name: getattr(disk, name) for name in _OPTIONS},
            "files": list(_save(index, disk, blk, directory)),
        }
        for index, (disk, blk) in enumerate(zip(disks, devices, strict=True))
    ]


def held_name(index: int, level: int) -> str:
    """Return the name that a file of disk ``index`` has in its snapshot; level 0 is the base."""
    return f"disk{index}-{level}.{'ovl' if level else 'img'}"


def _has_name(image: Image) -> bool:
    """Return whether a file has a name; those of :class:`FrozenDisks` do not."""
    return os.fstat(image.fd).st_nlink > 0


def _save(index: int, disk: Disk, blk: Blk, directory: str) -> Iterator[State]:
    *below, last = blk.files()
    if below:
        blk.sync()  # writes an overlay's bitmap, which is in memory until then
    for level, image in enumerate([*below, last]):
        to = os.path.join(directory, held_name(index, level))
        if level or not _has_name(image) or (image is last and not disk.readonly):
            if image is last or not _is_snapshots(image) or not _link(image, to):
                copy_disk(image.fd, to)
        elif not _is_snapshots(image):
            yield {"held": 0, **identity(image.fd)}
            continue
        elif not _link(image, to):
            copy_disk(image.fd, to)
        yield {"held": 1}


def _is_snapshots(image: Image) -> bool:
    """Return whether a file lies in a snapshot."""
    return os.path.exists(os.path.join(os.path.dirname(os.path.abspath(image.path)), RECORDS))


def _link(image: Image, to: str) -> bool:
    """Hard-link a file that is never written; return false across file systems, or if its name was reused."""
    try:
        os.link(image.path, to, follow_symlinks=False)
    except OSError:
        return False
    if os.path.samestat(os.lstat(to), os.fstat(image.fd)):
        return True
    os.unlink(to)
    return False


class SavedDisks:
    """The disks of a machine restored from what :func:`save_disks` put into ``directory``, which is only read.

    The guest's writes go to overlays ``disk0.ovl`` in the directory ``writable``, or without one to temporary files.
    ``ready`` are disks whose files are all in the directory; ``based`` are those whose base is not, with the reason and
    a function that creates the disk from the base that the user names. Only regular files in the directory are used,
    by names computed here. The caller has checked their content.

    Raises :class:`~vmm.errors.SnapshotError` naming a missing file; ``ValueError`` for a record that is not a disk's.
    """

    def __init__(self, states: Any, directory: str, writable: str | None = None) -> None:
        if not isinstance(states, list):
            raise ValueError("no list of disks' records")
        self._directory = os.path.abspath(directory)
        self._writable = writable
        self._held: dict[int, list[os.stat_result | None]] = {}
        self.ready: dict[int, Disk] = {}
        self.based: dict[int, tuple[str, Callable[[Disk], Disk]]] = {}
        folder = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for index, state in enumerate(states):
                self._read(index, _parsed(index, state), folder)
        finally:
            os.close(folder)

    def _read(self, index: int, state: State, folder: int) -> None:
        files = state["files"]
        self._held[index] = [
            _look(folder, self._directory, held_name(index, level)) if file["held"] else None
            for level, file in enumerate(files)
        ]
        if files[0]["held"]:
            self.ready[index] = self._disk(index, state, os.path.join(self._directory, held_name(index, 0)))
            return
        known = files[0]
        what = "lies over a file" if len(files) > 1 or not state["readonly"] else "is a file that is only read,"
        why = f"{what} of {known['size']} bytes, which the snapshot does not hold"
        self.based[index] = why, lambda given: self._based(index, state, given)

    def _based(self, index: int, state: State, given: Disk) -> Disk:
        if changed := changed_since(given.path, state["files"][0]):
            raise SnapshotError(
                f"disk {given.path} {changed}: the snapshot's disk {index} needs it as it was; "
                "to put another disk in its place, give it with overlay= or temporary"
            )
        return self._disk(index, state, given.path)

    def _disk(self, index: int, state: State, base: str) -> Disk:
        options = state["options"]
        if state["readonly"]:
            return Disk(base, readonly=True, **options)
        layers = [os.path.join(self._directory, held_name(index, n)) for n in range(1, len(state["files"]))]
        place: dict[str, Any] = (
            {"temporary": True, "cache": "writeback"}
            if self._writable is None
            else {"overlay": os.path.join(os.path.abspath(self._writable), f"disk{index}.ovl")}
        )
        return Disk(base, layers=layers, **{**options, **place})

    def verify(self, disks: Sequence[Disk], devices: Sequence[Blk]) -> None:
        """Check that the files which the machine has opened are those that were checked before.

        Raises :class:`~vmm.errors.SnapshotError` if a name in the directory now leads to another file.
        """
        for index, (disk, blk) in enumerate(zip(disks, devices, strict=True)):
            held = self._held.get(index, [])
            for level, (known, image) in enumerate(zip(held, blk.files(), strict=False)):
                path = os.path.join(self._directory, held_name(index, level))
                opened = disk.path if not level else (*disk.layers, "")[level - 1]
                if known is not None and opened == path and not os.path.samestat(known, os.fstat(image.fd)):
                    raise SnapshotError(f"disk {path} of the snapshot was replaced while it was opened")


def restore_disks(
    states: Any, directory: str, writable: str | None = None, given: Sequence[Disk | str] = ()
) -> list[Disk]:
    """Return all disks of :class:`SavedDisks`; ``given`` are the bases that the directory lacks, in order."""
    saved = SavedDisks(states, directory, writable)
    bases = iter(read_disks(list(given)))
    try:
        return [
            saved.ready[index] if index in saved.ready else saved.based[index][1](next(bases))
            for index in range(len(states))
        ]
    except StopIteration:
        raise ConfigError("a base that the snapshot does not hold is not given: give a disk for each") from None


def _look(folder: int, directory: str, name: str) -> os.stat_result:
    """Return the stat result of a snapshot's file. Raises :class:`~vmm.errors.SnapshotError` unless it is regular."""
    path = os.path.join(directory, name)
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        raise SnapshotError(f"disk {path} of the snapshot is missing: take the snapshot from another copy") from None
    if not stat.S_ISREG(found.st_mode):
        raise SnapshotError(f"disk {path} of the snapshot is no regular file: it is not opened")
    return found


def _parsed(index: int, found: Any) -> State:
    """Return the checked record of a disk. Raises ``ValueError``."""
    if not isinstance(found, dict) or found.get("version") not in (1, VERSION):
        raise ValueError(f"no record of a disk of version 1 or {VERSION}")
    state: State = _without_places(index, found) if found["version"] == 1 else found
    _require(state, version=int, readonly=int, options=dict, files=list)
    _require(state["options"], serial=str, cache=str, sector=int, queues=int, iops=int, bps=int)
    for level, file in enumerate(state["files"]):
        _require(file, **{"held": int, **({} if isinstance(file, dict) and file.get("held") else _IDENTITY)})
        if level and not file["held"]:
            raise ValueError("a disk's record in which a layer is not in the snapshot")
    if not 0 < len(state["files"]) <= LAYERS_MAX or (state["readonly"] and len(state["files"]) > 1):
        raise ValueError("a disk's record without a base, or with layers that nobody writes over")
    if not state["readonly"] and len(state["files"]) == 1 and not state["files"][0]["held"]:
        raise ValueError("a disk's record in which what was written is not in the snapshot")
    return state


def _without_places(index: int, state: State) -> State:
    """Convert a record of version 1 to version 2: drop the paths of files that the snapshot does not hold."""
    files: list[State] = []
    if not isinstance(state.get("files"), list):
        raise ValueError("a disk's record without a list of its files")
    for level, file in enumerate(state["files"]):
        if isinstance(file, dict) and "path" in file:
            _require(file, path=str, size=int, mtime_ns=int, inode=int)
            files.append({"held": 0, "size": file["size"], "mtime_ns": file["mtime_ns"]})
        else:
            _require(file, file=str)
            if file["file"] != held_name(index, level):
                raise ValueError("a disk's record names a copy outside the snapshot")
            files.append({"held": 1})
    return {**state, "version": VERSION, "files": files}


def _require(value: object, **kinds: type) -> None:
    if not isinstance(value, dict) or set(value) != set(kinds) or any(type(value[n]) is not kinds[n] for n in kinds):
        raise ValueError(f"a disk's record has other fields than {', '.join(kinds)}")


# ---- clones ----


class FrozenDisks:
    """A copy of a machine's disks at one moment, for any number of clones: ``disks`` for each of them.

    Every clone writes to a temporary overlay of its own; the original continues with its own files. The cost is one
    copy of the writable files, whatever the number of clones: of a raw disk all extents that are not holes, of an
    overlay its clusters, or a reflink where the file system supports it. Copies have no name, lie beside the original
    if possible, and are freed with the last clone after :meth:`close`, which is to be called when the clones are
    created. They can be used in this process only.
    """

    def __init__(self, disks: Sequence[Disk], devices: Sequence[Blk]) -> None:
        """Copy the disks of a paused machine. Raises :class:`~vmm.errors.HostError`."""
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
        """Release the copies, except those that clones use. Idempotent."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> FrozenDisks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
