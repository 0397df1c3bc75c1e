"""Reader of a snapshot's directory: open it, check it, provide its memory."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm._ffi import check, ffi, lib
from vmm.errors import HostError, SnapshotError
from vmm.snapshot import records
from vmm.snapshot.regions import PAGE, REGIONS_MAX, Region, bitmap_size, checksums_size, words

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

RECORDS = "snapshot.pyvmm"
MEMORY = "memory"
CHAIN_MAX = 256  # longest chain from a full snapshot to its last differential: each takes two open files
_RETRIES = 8  # attempts to open a directory that is being replaced; writing one takes milliseconds


class File(NamedTuple):
    """Another file of a snapshot, such as a disk."""

    size: int
    crc32c: int


class Snapshot:
    """An open snapshot. Its files stay the same even if the directory is replaced afterwards.

    ``state`` is the plain value that was written, ``id`` the 32 bytes that identify the snapshot, ``regions`` this
    layer's part of the memory, ``parent`` the open parent of a differential, ``files`` the other files by name. Opening
    reads no memory: :meth:`check` does. A context manager.
    """

    def __init__(self, path: str, chain: int = 0) -> None:
        self.path = path
        self.parent: Snapshot | None = None
        self.memory_fd = -1
        self._directory = -1
        try:
            self._open()
            if self._parent_id is not None:
                self.parent = self._open_parent(chain + 1)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        for _ in range(_RETRIES):
            try:
                self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._read()
                return
            except FileNotFoundError as error:
                if self._directory < 0:
                    raise SnapshotError(f"there is no {self.path}: give the directory of a snapshot") from None
                replaced = os.fstat(self._directory).st_nlink == 0
                self.close()
                if not replaced:
                    raise SnapshotError(
                        f"{self.path} is no snapshot: it has no {os.path.basename(error.filename)}"
                    ) from None
            except NotADirectoryError:
                raise SnapshotError(f"{self.path} is a file: give the directory of a snapshot") from None
            except OSError as error:
                raise SnapshotError(f"cannot read the snapshot {self.path} ({error.strerror})") from None
        raise SnapshotError(f"the snapshot {self.path} is replaced faster than it can be read: try again")

    def _read(self) -> None:
        with open(self.file_fd(RECORDS), "rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, records.SIZE_MAX) + 1)
        found, self.id = records.unpack(os.path.join(self.path, RECORDS), content)
        try:
            found = _exactly(found, state=object, memory=list, files=dict, parent=object, nonce=bytes)
            self.state: Any = found["state"]
            self.regions = _regions(found["memory"])
            self.files = _files(found["files"])
            self._parent_id = _parent(found["parent"])
        except ValueError as error:
            raise SnapshotError(f"{self.path} has records that contradict themselves ({error})") from None
        self.memory_fd = self.file_fd(MEMORY)
        size, wanted = os.fstat(self.memory_fd).st_size, sum(region.size for region in self.regions)
        if size != wanted:
            raise SnapshotError(f"{self.path} is damaged: its memory has {size} bytes, not {wanted}")

    def _open_parent(self, chain: int) -> Snapshot:
        if chain >= CHAIN_MAX:
            raise SnapshotError(f"{self.path} has {CHAIN_MAX} snapshots under it: merge them")
        assert self._parent_id is not None
        path = _beside(self.path, self._parent_id)
        if path is None:
            raise SnapshotError(
                f"{self.path} is a differential snapshot without its parent, {self._parent_id.hex()[:16]}, which was "
                "replaced or lies in another directory: put the two side by side"
            )
        try:
            parent = Snapshot(path, chain)
        except SnapshotError as error:
            raise SnapshotError(f"{self.path} is a differential snapshot without its parent: {error}") from None
        if parent.id != self._parent_id or [r[:3] for r in parent.regions] != [r[:3] for r in self.regions]:
            parent.close()
            raise SnapshotError(f"{path} is another snapshot than {self.path} was made on: it was replaced since")
        return parent

    def file_fd(self, name: str) -> int:
        """Open the regular file ``name`` for reading; the caller owns the descriptor. Raises ``OSError``."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._directory)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", name)

    def file_path(self, name: str) -> str:
        """Return the path of the file ``name``, valid until the snapshot is replaced."""
        return os.path.join(self.path, name)

    @property
    def layers(self) -> list[Snapshot]:
        """Return the chain, from the full snapshot to this one."""
        chain, layer = [self], self
        while layer.parent:
            layer = layer.parent
            chain.append(layer)
        return chain[::-1]

    @property
    def size(self) -> int:
        """Bytes of guest memory."""
        return sum(region.size for region in self.regions)

    def check(self, *, files: bool = True) -> None:
        """Compare every held page of every layer with its checksum; with ``files`` this layer's other files too.

        It takes about 5 ms for 60 MiB in the page cache on one CPU, and uses several. Raises
        :class:`~vmm.errors.SnapshotError` if any byte differs from what was written.
        """
        for layer in self.layers:
            for region in layer.regions:
                rc = lib.vmm_pages_check(
                    layer.memory_fd,
                    region.offset,
                    region.size,
                    words(region.held),
                    ffi.from_buffer("uint32_t[]", region.checksums),
                )
                _whole(layer.path, MEMORY, rc)
        for name, file in self.files.items() if files else ():
            self._check_file(name, file)

    def _check_file(self, name: str, file: File) -> None:
        try:
            fd = self.file_fd(name)
        except OSError as error:
            raise SnapshotError(f"{self.path} is damaged: its {name} cannot be read ({error.strerror})") from None
        try:
            if file_sum(fd) != file:
                raise SnapshotError(f"{self.path} is damaged: its {name} is not what was written")
        finally:
            os.close(fd)

    def overlay(self, view: Callable[[int, int], memoryview]) -> None:
        """Copy the pages of every differential over a mapping of the full snapshot's memory.

        ``view(gpa, size)`` returns that memory. A full snapshot copies nothing.
        """
        for layer in self.layers[1:]:
            for region in layer.regions:
                memory = ffi.from_buffer(view(region.gpa, region.size))
                rc = lib.vmm_pages_read(layer.memory_fd, region.offset, memory, region.size, words(region.held))
                _whole(layer.path, MEMORY, rc)

    def copy_files(self, directory: str) -> None:
        """Copy the other files to another directory, as hard links if possible, since they are never written."""
        for name in self.files:
            to = os.path.join(directory, name)
            try:
                os.link(name, to, src_dir_fd=self._directory, follow_symlinks=False)
            except OSError:
                from shutil import copyfile

                fd = self.file_fd(name)
                try:
                    copyfile(f"/proc/self/fd/{fd}", to)
                finally:
                    os.close(fd)

    def close(self) -> None:
        """Close the files of all layers. Mappings stay valid."""
        for fd in (self.memory_fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self.memory_fd = self._directory = -1
        if self.parent:
            self.parent.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> Snapshot:
    """Open the snapshot in the directory ``path``, and those it is built on.

    Raises :class:`~vmm.errors.SnapshotError`. Records are checked now, memory and other files by
    :meth:`Snapshot.check`.
    """
    return Snapshot(os.fspath(path))


def file_sum(fd: int) -> File:
    """Return size and checksum of an open file. Raises :class:`~vmm.errors.HostError`."""
    crc = ffi.new("uint32_t *")
    check(lib.vmm_file_crc32c(fd, crc))
    return File(os.fstat(fd).st_size, crc[0])


def _whole(path: str, name: str, rc: int) -> None:
    if rc == -errno.EBADMSG:
        text = ffi.string(lib.vmm_error_text()).decode(errors="replace")
        raise SnapshotError(f"{path} is damaged: in its {name}, {text}")
    try:
        check(rc)
    except HostError as error:
        raise SnapshotError(f"cannot read {os.path.join(path, name)} ({error})") from None


def _exactly(value: Any, **fields: type) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise ValueError(f"fields are not {', '.join(fields)}")
    for name, kind in fields.items():
        if kind is not object and type(value[name]) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    return value


def _files(value: dict[Any, Any]) -> dict[str, File]:
    for name in value:
        if type(name) is not str or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a file beside it")
    return {name: File(**_exactly(file, size=int, crc32c=int)) for name, file in value.items()}


def _parent(value: Any) -> bytes | None:
    """Return the parent's id. The records have no path of it: see :func:`_beside`."""
    if value is None:
        return None
    parent = _exactly(value, **{"id": bytes, **({"path": str} if isinstance(value, dict) and "path" in value else {})})
    identity: bytes = parent["id"]
    return identity


def _beside(path: str, identity: bytes) -> str | None:
    """Find the snapshot with this id in the directory that contains ``path``; return its path, or ``None``.

    The id is the end of a record file: nothing else of the others is read.
    """
    folder = os.path.dirname(os.path.realpath(path))
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    for name in names:
        try:
            fd = os.open(
                os.path.join(folder, name, RECORDS), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            )
        except OSError:
            continue
        try:
            end = os.lseek(fd, 0, os.SEEK_END) - len(identity)
            if end > 0 and os.pread(fd, len(identity), end) == identity:
                return os.path.join(folder, name)
        except OSError:
            continue
        finally:
            os.close(fd)
    return None


def parse_regions(path: str, value: Any) -> tuple[Region, ...]:
    """Check and return regions from received records. Raises :class:`~vmm.errors.SnapshotError`."""
    try:
        return _regions(_exactly({"memory": value}, memory=list)["memory"])
    except ValueError as error:
        raise SnapshotError(f"{path} has records that contradict themselves ({error})") from None


def _regions(value: list[Any]) -> tuple[Region, ...]:
    """Check and return regions: ascending, in whole pages, contiguous in the file."""
    if not 0 < len(value) <= REGIONS_MAX:
        raise ValueError(f"memory is not of 1 to {REGIONS_MAX} regions")
    regions = []
    free_from = offset = 0
    for item in value:
        region = Region(**_exactly(item, gpa=int, size=int, offset=int, held=bytes, checksums=bytes))
        if region.gpa % PAGE or region.size % PAGE or region.gpa < free_from or not 0 < region.size < 1 << 52:
            raise ValueError(f"region {region.gpa:#x}+{region.size:#x} cannot be")
        if region.offset != offset or region.gpa + region.size > 1 << 52:
            raise ValueError(f"region {region.gpa:#x} lies at {region.offset:#x}")
        if len(region.held) != bitmap_size(region.size) or len(region.checksums) != checksums_size(region.size):
            raise ValueError(f"region {region.gpa:#x} has a bitmap or checksums of another size")
        if int.from_bytes(region.held[-8:], "little") >> ((region.size // PAGE - 1) % 64 + 1):
            raise ValueError(f"region {region.gpa:#x} holds pages behind its end")
        regions.append(region)
        free_from, offset = region.gpa + region.size, offset + region.size
    return tuple(regions)
