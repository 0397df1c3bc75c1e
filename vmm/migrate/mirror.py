"""Mirroring of disks during a migration: each is copied while the guest writes it, as memory is.

The guest's view of the disk is sent, whatever files it consists of at the source; at the destination it becomes one
raw file, which is removed again if the migration fails.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import IO, TYPE_CHECKING, Any

from vmm._ffi import check, lib
from vmm.disk.image import Image, open_raw, temporary_file
from vmm.errors import ConfigError, HostError, MigrationError
from vmm.migrate import wire
from vmm.migrate.wire import Kind
from vmm.parts import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmm.devices.virtio.blk import Blk
    from vmm.migrate.wire import Channel, Frame
    from vmm.snapshot.description import Described

CLUSTER = 4096  # granularity of the disk's dirty log, in bytes
SIZE_MAX = (1 << 63) - 1  # of a file
SYNC_EVERY = 64 << 20  # bytes after which they are flushed, so that the final flush is short


# ---- the source ----


class MirroredDisk:
    """Send one disk of a running machine: first all its data, then what was written meanwhile. ``number`` is its index
    among the machine's disks; ``size`` is in bytes, and cannot change until :meth:`close`."""

    def __init__(self, number: int, blk: Blk) -> None:
        self.number = number
        self._blk = blk
        self._log = blk.dirty_log()  # opened before the first read
        self.size = blk.size
        self.begun = False
        """Whether the first pass over the disk is complete."""
        self._page = mmap.mmap(-1, wire.DATA_MAX)  # aligned, for O_DIRECT

    def copies(self) -> list[tuple[int, bytes]]:
        """Return ``(offset, bytes)`` of what was written since the last send. The machine must be paused."""
        return [(at, self._read(at, size)) for at, size in self._log.take(wire.DATA_MAX)]

    def remaining(self) -> int:
        """Return the bytes to send now; in the first pass an upper bound, since holes are found while sending."""
        return self._log.collect() * CLUSTER if self.begun else self._in_use()

    def _in_use(self) -> int:
        files = [os.fstat(image.fd) for image in self._blk.files()]
        blocks = sum(file.st_blocks for file in files)
        return min(self.size, blocks * 512) if all(file.st_size for file in files) else self.size

    def send(self, channel: Channel, each: Callable[[int], object] | None = None) -> None:
        """Send what remains; ``each`` is called after every frame with the bytes of disk it covered.

        Raises :class:`~vmm.errors.HostError` for data that cannot be read here.
        """
        runs = self._log.take(wire.DATA_MAX) if self.begun else self._blk.in_use()
        self.begun = True
        for start, size in runs:
            for at in range(start, start + size, wire.DATA_MAX):
                data = self._read(at, min(wire.DATA_MAX, start + size - at))
                self.send_at(channel, at, data)
                if each:
                    each(len(data))

    def send_at(self, channel: Channel, at: int, data: bytes) -> None:
        """Send one frame with ``data`` at the byte offset ``at``."""
        if data.strip(b"\0"):
            channel.send(Kind.DISK, data, address=at, disk=self.number)
        else:
            channel.send(Kind.DISK_ZEROS, len(data).to_bytes(8, "little"), address=at, disk=self.number)

    def _read(self, at: int, size: int) -> bytes:
        with memoryview(self._page) as whole, whole[:size] as part:
            self._blk.read(at, part)
            return bytes(part)

    def close(self) -> None:
        """Stop logging and allow a resize of the disk again. Idempotent."""
        self._log.close()


def chosen(mirror: bool | Sequence[int], n: int) -> list[int]:
    """Return the numbers of the disks to mirror, of ``n``. Raises :class:`~vmm.errors.ConfigError`."""
    if isinstance(mirror, bool):
        return list(range(n)) if mirror else []
    for number in mirror:
        if type(number) is not int or not 0 <= number < n:
            raise ConfigError(f"the machine has no disk {number!r} to go along: its {n} are numbered from 0")
    return sorted(set(mirror))


# ---- the destination ----


def check_sizes(sizes: list[Any], n: int) -> None:
    """Check the peer's sizes of ``n`` disks: bytes for each mirrored one, 0 for the others.

    Raises :class:`~vmm.errors.MigrationError`.
    """
    if len(sizes) != n or not all(type(size) is int and 0 <= size <= SIZE_MAX for size in sizes):
        raise MigrationError("the other side does not say which disks come along")


def coming(described: Described, sizes: Sequence[int], directory: str | None) -> dict[int, Disk]:
    """Return the mirrored disks (size above 0) as raw files in ``directory``, by number; none without a directory."""
    if directory is None:
        return {}
    place = os.path.abspath(directory)
    return {
        number: described.disk(number, Disk(os.path.join(place, f"disk{number}.img")))
        for number, size in enumerate(sizes)
        if size
    }


def check_plain(disks: Sequence[Disk], sizes: Sequence[int]) -> None:
    """Raise :class:`~vmm.errors.ConfigError` for a mirrored disk whose target is not one raw file."""
    for disk, size in zip(disks, sizes, strict=True):
        if size and (disk.overlay or disk.temporary):
            raise ConfigError(f"disk {disk.path} comes along, into one raw file: leave out overlay= and temporary")


class Images:
    """Create the files of mirrored disks. A disk with size 0 has none.

    Raises :class:`~vmm.errors.ConfigError` for a file that exists, :class:`~vmm.errors.HostError` if the host
    refuses (a full file system); after an exception no file is left.
    """

    def __init__(self, disks: Sequence[Disk], sizes: Sequence[int]) -> None:
        self._files: dict[int, _File] = {}
        self._staged: list[tuple[_File, int, int, int]] = []  # file, offset, size, offset where staged; -1: zeros
        self._staging: IO[bytes] | None = None
        self._staged_bytes = 0
        try:
            for number, (disk, size) in enumerate(zip(disks, sizes, strict=True)):
                if size:
                    self._files[number] = _File(disk, size)
        except BaseException:
            self.remove()
            raise

    def put(self, frame: Frame) -> None:
        """Write a DISK or DISK_ZEROS frame. Raises :class:`~vmm.errors.MigrationError` if it is outside its disk."""
        file, size = self._checked(frame)
        if frame.kind == Kind.DISK_ZEROS:
            file.clear(frame.address, size)
        else:
            file.write(frame.address, frame.payload)

    def _checked(self, frame: Frame) -> tuple[_File, int]:
        file = self._files.get(frame.disk)
        size = wire.cleared(frame) if frame.kind == Kind.DISK_ZEROS else len(frame.payload)
        if file is None or frame.address > file.size or size > file.size - frame.address:
            raise MigrationError(f"the other side sent bytes of disk {frame.disk} that there are not")
        return file, size

    def stage(self, frame: Frame) -> None:
        """Keep a frame until :meth:`apply` writes it. It is staged in a file without a name beside its disk, which is
        bounded by the size of all disks."""
        file, size = self._checked(frame)
        self._staged_bytes += max(size, CLUSTER)
        if self._staged_bytes > sum(-(-file.size // CLUSTER) * CLUSTER for file in self._files.values()):
            raise MigrationError("the other side sends more than it has disks, and no state")
        at = -1
        if frame.kind == Kind.DISK:
            self._staging = self._staging or temporary_file(near=file.path)
            with file.refusals("written"):
                at = self._staging.tell()
                rest = memoryview(frame.payload)
                while rest:
                    rest = rest[self._staging.write(rest) :]
        self._staged.append((file, frame.address, size, at))

    def apply(self) -> None:
        """Write what was staged into the disks."""
        for file, place, size, at in self._staged:
            if at < 0:
                file.clear(place, size)
                continue
            assert self._staging is not None
            with file.refusals("written"):
                data = os.pread(self._staging.fileno(), size, at)
            file.write(place, data)
        self._forget_staged()

    def _forget_staged(self) -> None:
        if self._staging is not None:
            self._staging.close()
        self._staging, self._staged, self._staged_bytes = None, [], 0

    def sync(self) -> None:
        """Flush everything received to stable storage."""
        for file in self._files.values():
            file.sync()

    def finish(self) -> None:
        """Flush, then close the files so that the machine can open them."""
        for file in self._files.values():
            file.finish()

    def keep(self) -> None:
        """Keep the files from now on, since the machine is here; discard what is staged."""
        self._forget_staged()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def remove(self) -> None:
        """Remove the files unless :meth:`keep` was called. Idempotent."""
        self._forget_staged()
        for file in self._files.values():
            file.remove()
        self._files.clear()


class _File:
    """One new file, locked against use by another machine."""

    def __init__(self, disk: Disk, size: int) -> None:
        self.path = disk.path
        self.size = size
        self._dirty = 0  # bytes written since the last flush
        self._image: Image | None = None
        if size % disk.sector:
            raise ConfigError(f"disk {self.path}: {size} bytes are not whole sectors of {disk.sector}")
        try:
            with self.refusals("made"):
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except HostError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise ConfigError(
                    f"disk {self.path} is here already, and nothing is written over: remove it, or name another file"
                ) from None
            raise
        self._made = os.fstat(fd)
        os.close(fd)
        try:
            with self.refusals("made as large"):
                os.truncate(self.path, size)
            # Opened as the machine will open it, so that an impossible setting is found before much is sent.
            open_raw(self.path, readonly=disk.readonly, direct=disk.cache == "none", sector=disk.sector).close()
            self._image = Image(self.path, readonly=False)
        except BaseException:
            self.remove()
            raise

    @contextlib.contextmanager
    def refusals(self, what: str) -> Iterator[None]:
        """Turn an ``OSError`` into :class:`~vmm.errors.HostError` with a sentence; ``what`` is a participle."""
        try:
            yield
        except OSError as error:
            raise HostError(
                f"disk {self.path} cannot be {what} ({error.strerror}): make room for it, or name another place",
                error.errno or 0,
            ) from error

    @property
    def _fd(self) -> int:
        assert self._image is not None
        return self._image.fd

    def write(self, at: int, data: bytes) -> None:
        rest = memoryview(data)
        with self.refusals("written"):
            while rest:
                n = os.pwrite(self._fd, rest, at)
                at, rest = at + n, rest[n:]
        self._wrote(len(data))

    def clear(self, at: int, size: int) -> None:
        check(lib.vmm_disk_clear(self._fd, at, size))
        self._wrote(size)

    def _wrote(self, size: int) -> None:
        self._dirty += size
        if self._dirty >= SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        if self._dirty:
            with self.refusals("written"):
                os.fdatasync(self._fd)
        self._dirty = 0

    def finish(self) -> None:
        with self.refusals("written"):
            os.fsync(self._fd)
            directory = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)  # its name
            finally:
                os.close(directory)
        self.close()

    def close(self) -> None:
        if self._image is not None:
            self._image.close()

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), self._made):
                os.unlink(self.path)
