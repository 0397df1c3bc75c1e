"""Write snapshots: full, differential, and a chain merged into a full one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import ffi, lib
from vmm.errors import HostError, SnapshotError
from vmm.snapshot import records
from vmm.snapshot.reading import CHAIN_MAX, MEMORY, RECORDS, Snapshot, file_sum, read
from vmm.snapshot.regions import Ram, checksums_size, pages_in, pages_not_zero, words
from vmm.snapshot.replacement import Replacement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Path = str | os.PathLike[str]

_MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; mmap has the name from Python 3.12 on


def write(
    path: Path,
    state: Any,
    memory: Sequence[Ram],
    *,
    parent: Snapshot | None = None,
    dirty: Sequence[tuple[int, int]] | None = None,
    extra_files: Callable[[str], None] | None = None,
) -> Snapshot:
    """Write a snapshot of a paused machine into the directory ``path``, and return it, open.

    ``state`` is a plain value (:mod:`vmm.snapshot.cbor`). With ``parent``, a snapshot of a machine with the same
    regions, only the pages of the runs ``dirty`` of ``(gpa, bytes)`` are written. ``extra_files`` is called with a
    directory to put further files into. The snapshot takes its name when all of it is on stable storage; a previous
    one of that name is then removed, and stays unchanged if anything fails.

    Raises :class:`~vmm.errors.SnapshotError` for invalid arguments, :class:`~vmm.errors.HostError` if the host
    refuses (a full disk).
    """
    path = os.fspath(path)
    if (parent is None) != (dirty is None):
        raise SnapshotError("a differential snapshot needs both its parent and what was written since")
    if parent is not None:
        _refuse_parent(path, memory, parent)
    for gpa, size in dirty or ():
        if not any(ram.gpa <= gpa and gpa + size <= ram.gpa + ram.size for ram in memory):
            raise SnapshotError(f"{gpa:#x}+{size:#x}, written since the parent, lies outside memory")
    held = [pages_not_zero(ram) if dirty is None else pages_in(ram.gpa, ram.size, dirty) for ram in memory]
    try:
        with Replacement(path, RECORDS) as new:
            regions = _write_memory(os.path.join(new.directory, MEMORY), memory, held)
            if extra_files:
                extra_files(new.directory)
            content = {
                "state": state,
                "memory": regions,
                "files": _sums(new.directory),
                "parent": parent and {"id": parent.id},
                "nonce": os.urandom(16),
            }
            _write_records(os.path.join(new.directory, RECORDS), content)
            new.commit()
    except OSError as error:
        raise HostError(_refusal(path, error.strerror), errno=error.errno or 0) from error
    return read(path)


def merge(snapshot: Snapshot, path: Path, *, extra_files: Callable[[str], None] | None = None) -> Snapshot:
    """Merge ``snapshot`` and its parents into a full snapshot at ``path``, and return it, open.

    Every layer is checked first. ``path`` may be the differential's own, which is then replaced. Without
    ``extra_files`` its other files are copied. Raises what :func:`write` raises.
    """
    snapshot.check()
    return write(path, snapshot.state, _composed(snapshot), extra_files=extra_files or snapshot.copy_files)


def _composed(snapshot: Snapshot) -> list[Ram]:
    """Return the memory of a chain: the full snapshot's file, mapped privately, and every differential over it."""
    import mmap

    base = snapshot.layers[0].memory_fd
    view = memoryview(mmap.mmap(base, snapshot.size, mmap.MAP_PRIVATE | _MAP_NORESERVE))
    memory = [
        Ram(r.gpa, r.size, view[r.offset : r.offset + r.size], base, r.offset, private=True) for r in snapshot.regions
    ]
    by_gpa = {ram.gpa: ram.view for ram in memory}
    snapshot.overlay(lambda gpa, size: by_gpa[gpa])
    return memory


def _refuse_parent(path: str, memory: Sequence[Ram], parent: Snapshot) -> None:
    if [(ram.gpa, ram.size) for ram in memory] != [(region.gpa, region.size) for region in parent.regions]:
        raise SnapshotError(f"the machine has other memory than the snapshot {parent.path}: write a full one")
    if not beside(parent.path, path):
        raise SnapshotError(f"{path} is built on {parent.path}: a differential snapshot lies beside its parent")
    if any(os.path.realpath(layer.path) == os.path.realpath(path) for layer in parent.layers):
        raise SnapshotError(f"{path} would replace a snapshot that it is built on: give another name, or merge")
    if len(parent.layers) >= CHAIN_MAX:
        raise SnapshotError(f"{parent.path} has {CHAIN_MAX - 1} snapshots under it: merge them first")


def _write_memory(path: str, memory: Sequence[Ram], held: Sequence[bytes]) -> list[dict[str, Any]]:
    """Write the memory file, one region behind the other; return its records."""
    regions = []
    offset = 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, sum(ram.size for ram in memory))
        for ram, bitmap in zip(memory, held, strict=True):
            sums = bytearray(checksums_size(ram.size))
            rc = lib.vmm_pages_write(
                fd, offset, ffi.from_buffer(ram.view), ram.size, words(bitmap), ffi.from_buffer("uint32_t[]", sums)
            )
            if rc < 0:
                raise OSError(-rc, os.strerror(-rc))
            regions.append(
                {"gpa": ram.gpa, "size": ram.size, "offset": offset, "held": bitmap, "checksums": bytes(sums)}
            )
            offset += ram.size
    finally:
        os.close(fd)
    return regions


def _write_records(path: str, content: dict[str, Any]) -> None:
    try:
        packed = records.pack(content)
    except ValueError as error:
        raise SnapshotError(f"the state cannot be written: {error}") from None
    if len(packed) > records.SIZE_MAX:
        raise SnapshotError(f"the state is of {len(packed)} bytes, and a snapshot has room for {records.SIZE_MAX}")
    with open(path, "xb") as file:
        file.write(packed)


def _sums(directory: str) -> dict[str, dict[str, int]]:
    """Return sizes and checksums of the files that ``extra_files`` has created."""
    sums = {}
    for name in sorted(os.listdir(directory)):
        if name == MEMORY:
            continue
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            sums[name] = file_sum(fd)._asdict()
        finally:
            os.close(fd)
    return sums


def beside(one: Path, other: Path) -> bool:
    """Return whether two snapshots lie in one directory, where a differential finds its parent."""
    return os.path.dirname(os.path.realpath(one)) == os.path.dirname(os.path.realpath(other))


def _refusal(path: str, why: str | None) -> str:
    return f"cannot write the snapshot {path} ({why}): make room or give another place; nothing was replaced"
