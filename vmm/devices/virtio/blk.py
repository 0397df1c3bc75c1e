"""The block device (virtio 1.2, 5.2) over a file of the host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.disk.image import temporary_file
from vmm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm._ffi import vmm_vm
    from vmm.disk.image import Image
    from vmm.disk.overlay import Overlay

_COUNTS = (
    "reads", "writes", "flushes", "discards", "zeroings", "bytes_read", "bytes_written", "errors", "unsupported",
)  # fmt: skip


class Blk(VirtioDevice):
    """A disk. ``path`` is a raw image or a block device; with ``overlay`` it is only read, and that file holds what
    the guest writes; with ``temporary``, a file without a name holds it and goes with the machine. ``layers``:
    overlays over ``path`` and under that file, the lowest first, only read.

    ``cache``: ``writeback`` (the host's page cache) or ``none`` (O_DIRECT); either way, data whose flush was completed
    is on stable storage. ``sector``: logical, 512 or 4096 bytes. ``iops`` and ``bps``: operations and bytes a second,
    0 for no limit. Raises :class:`~vmm.errors.ConfigError`. The model is ``native/virtio/blk.c``, the host's end
    ``native/disk``.
    """

    device_id = 2
    remembers = ("size",)  # bytes; only a disk of that size takes the state

    def __init__(
        self,
        vm: vmm_vm,
        index: int,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        serial: str = "",
        cache: str = "writeback",
        overlay: str | os.PathLike[str] | None = None,
        layers: Sequence[str] = (),
        temporary: bool = False,
        sector: int = 512,
        queues: int = 1,
        iops: int = 0,
        bps: int = 0,
    ) -> None:
        self.name = f"virtio-blk{index}"
        self.path = os.fspath(path)
        self.readonly = readonly
        self.held = 0  # logs that are open, of checkpoints or migrations: each holds the disk at its size
        self._blk: Any = None
        self._raw: Image | None = None
        self._overlay: Overlay | None = None
        over = os.fspath(overlay) if overlay else None
        if over or temporary:
            disk = self._open_overlay(over, layers, cache == "none", sector)
        else:
            disk = self._open_raw(readonly, cache == "none", sector)
        options = ffi.new("vmm_blk_options *")
        options.sector, options.queues, options.readonly = sector, queues, readonly
        options.block_exponent = (4096 // sector).bit_length() - 1  # pages of the host's cache, clusters of an overlay
        options.bytes_per_second, options.operations_per_second = bps, iops
        ffi.buffer(options.serial)[: len(serial)] = serial.encode("ascii")
        out = ffi.new("vmm_blk **")
        label = over or self.path
        try:
            check(lib.vmm_blk_create(vm, self.name.encode(), os.fsencode(label), disk, options, out))
        except BaseException:
            lib.vmm_disk_destroy(disk)
            self._close()
            raise
        self._blk = out[0]
        self.virtio = lib.vmm_blk_virtio(self._blk)

    def _open_raw(self, readonly: bool, direct: bool, sector: int) -> Any:
        from vmm.disk.image import open_raw, whole_sectors

        out = ffi.new("vmm_disk **")
        raw = self._raw = open_raw(self.path, readonly=readonly, direct=direct, sector=sector)
        try:
            check(lib.vmm_disk_open_raw(raw.fd, whole_sectors(raw.size, sector), raw.alignment, 0, out))
        except BaseException:
            self._close()
            raise
        return out[0]

    def _open_overlay(self, path: str | None, between: Sequence[str], direct: bool, sector: int) -> Any:
        from vmm.disk.overlay import Overlay

        out = ffi.new("vmm_disk **")
        over = self._overlay = Overlay(path, self.path, between=between, direct=direct, sector=sector)
        try:
            image, size = over.image, over.layout.size
            if size % sector or sector % image.alignment:
                raise ConfigError(
                    f"disk {self.path} has {size} bytes: sector={sector} does not go with that"
                    if size % sector
                    else f"overlay {image.path}: cache=none needs sector={image.alignment} on its file system"
                )
            layers = ffi.new("vmm_disk_layer[]", [layer.native() for layer in over.layers])
            check(lib.vmm_disk_open_overlay(layers, len(layers), image.alignment, 0, out))
        except BaseException:
            self._close()
            raise
        return out[0]

    def _close(self) -> None:
        for file in (self._raw, self._overlay):
            if file is not None:
                file.close()
        self._raw = self._overlay = None

    def destroy(self) -> None:
        """Free the native half, which records what an overlay holds; then close the files, and with them the locks."""
        if self._blk is not None:
            lib.vmm_blk_destroy(self._blk)
            self._blk = self.virtio = None
        self._close()

    def files(self) -> list[Image]:
        """What the disk is made of: the base first; the last takes the guest's writes, unless the disk is read-only."""
        if self._overlay is not None:
            return [layer.image for layer in reversed(self._overlay.layers)]
        return [] if self._raw is None else [self._raw]

    @property
    def size(self) -> int:
        """Bytes the guest sees."""
        return int(lib.vmm_blk_size(self._blk))

    def resize(self, new_size: int | None = None) -> int:
        """Resize the disk to this many bytes while the machine runs, and notify the guest. Return the size.

        ``None``: the file's own, which another program has changed. A file is made longer or shorter (the guest had
        better know before its disk shrinks); an overlay only grows. Raises :class:`~vmm.errors.ConfigError`, and
        :class:`~vmm.errors.StateError` while a checkpoint is open, or the disk is copied to where the machine moves.
        """
        if self.held:
            raise StateError(f"{self.name}: a checkpoint or a migration holds the disk at its size: close it first")
        follow = new_size is None
        if new_size is None:
            if self._raw is None:
                raise ConfigError(f"overlay of {self.path}: say which size it is to have")
            new_size = os.lseek(self._raw.fd, 0, os.SEEK_END)
        sector = int.from_bytes(self.config(20, 4), "little")
        if follow and self._raw is not None and not self._raw.block_device:
            from vmm.disk.image import whole_sectors

            new_size = whole_sectors(new_size, sector)
        if new_size <= 0 or new_size % sector:
            raise ConfigError(f"disk {self.path}: {new_size} bytes are not whole sectors of {sector}")
        if self._raw is not None and self._raw.block_device and not follow:
            raise ConfigError(f"disk {self.path} is a block device: resize it on the host, then call resize()")
        if self._overlay is not None:
            self._overlay.grow(new_size)
        check(lib.vmm_blk_resize(self._blk, new_size, follow))
        return new_size

    def sync(self) -> None:
        """Wait for the requests under way, and put everything on stable storage: the files then hold the disk.
        Raises :class:`~vmm.errors.HostError`."""
        check(lib.vmm_blk_sync(self._blk))

    def let_go(self) -> None:
        """Sync the paused disk and release its locks, before the machine runs on another host.
        Raises :class:`~vmm.errors.HostError`."""
        if not self.readonly:
            self.sync()
        for image in self.files():
            image.unlock()

    def take_back(self) -> None:
        """Lock the disk again after :meth:`let_go`. Raises :class:`~vmm.errors.ConfigError` if it is in use."""
        for image in self.files():
            image.lock()

    def checkpoint(self) -> DiskUndo | None:
        """A way back to what the disk holds now; ``None`` for a disk that is read-only."""
        return None if self.readonly else DiskUndo(self)

    # ---- copying it while the guest writes ----

    def dirty_log(self) -> DiskDirtyLog:
        """A log of what is written from now on."""
        return DiskDirtyLog(self)

    def in_use(self) -> Iterator[tuple[int, int]]:
        """The ranges ``(at, size)`` of the disk that are not known to be zeros, ascending, looked up as they are asked
        for. Clusters of 4096 bytes, but at the end of a layer."""
        zeros = ffi.new("int *")
        at = first = 0
        while size := int(lib.vmm_blk_extent(self._blk, at, zeros)):
            if zeros[0] and at > first:
                yield first, at - first
            at += size
            first = at if zeros[0] else first
        if at > first:
            yield first, at - first

    def read(self, at: int, buffer: memoryview) -> None:
        """What the guest would read at byte ``at``, into memory that begins a page: the guest's requests do not wait
        for it. Raises :class:`~vmm.errors.HostError`."""
        check(lib.vmm_blk_peek(self._blk, at, len(buffer), ffi.from_buffer(buffer)))

    def statistics(self) -> dict[str, Any]:
        """Since the start: reads, writes, flushes, discards, zeroings (requests completed without an error),
        bytes_read, bytes_written, errors, unsupported; throttled, how often the rate limits held requests back;
        and ``queues``, the same counts for each queue."""
        stats = ffi.new("vmm_blk_stats *")
        queues = []
        for queue in range(self.info()["queues"]):
            check(lib.vmm_blk_get_stats(self._blk, queue, stats))
            queues.append({count: int(getattr(stats, count)) for count in _COUNTS})
        total: dict[str, Any] = {count: sum(queue[count] for queue in queues) for count in _COUNTS}
        return {**total, "throttled": int(lib.vmm_blk_throttled(self._blk)), "queues": queues}


class DiskUndo:
    """What a disk held when this was made, for as much of it as has changed since; any number of them at a time.

    The old bytes lie in a file without a name, in the directory for temporary files. While there is one, the disk keeps
    its size, the guest's discards are not taken, and a write whose old bytes cannot be kept is the guest's I/O
    error. Raises :class:`~vmm.errors.HostError`.
    """

    def __init__(self, blk: Blk) -> None:
        self._blk = blk
        out = ffi.new("vmm_undo **")
        with temporary_file() as kept:
            check(lib.vmm_blk_undo_open(blk._blk, kept.fileno(), out))
        self._undo: Any = out[0]
        blk.held += 1

    def rollback(self) -> int:
        """Make the disk what it was, as often as wanted. Answers how many clusters of 4096 bytes were written.

        The machine is paused, or its guest does not use the disk. What was written is on stable storage after the next
        flush. Raises :class:`~vmm.errors.HostError` when the host fails; nothing that was kept is lost by that.
        """
        if self._undo is None or self._blk._blk is None:
            raise StateError(f"{self._blk.name}: this checkpoint of the disk is closed: make another one")
        return check(lib.vmm_blk_undo_back(self._blk._blk, self._undo))

    def close(self) -> None:
        """Forget the past. A device that is gone has done so already."""
        if self._undo is not None and self._blk._blk is not None:
            lib.vmm_blk_undo_close(self._blk._blk, self._undo)
            self._blk.held -= 1
        self._undo = None


class DiskDirtyLog:
    """The clusters of a disk that were written since this was made, or since :meth:`take`: :class:`vmm.memory.DirtyLog`
    of a disk, which cannot be resized meanwhile. Raises :class:`~vmm.errors.HostError`."""

    def __init__(self, blk: Blk) -> None:
        self._blk = blk
        out = ffi.new("vmm_disk_dirty **")
        check(lib.vmm_blk_dirty_open(blk._blk, out))
        self._log: Any = out[0]
        blk.held += 1

    def collect(self) -> int:
        """How many clusters of 4096 bytes are in the log."""
        return int(lib.vmm_blk_dirty_count(self._blk._blk, self._log))

    def take(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges ``(at, size)`` in the log, ascending, of at most ``most`` bytes each, and mark them clean.

        Writes meanwhile below the current range are returned by the next call.
        """
        at = ffi.new("uint64_t *")
        while size := int(lib.vmm_blk_dirty_take(self._blk._blk, self._log, at, most)):
            yield int(at[0]), size
            at[0] += size

    def close(self) -> None:
        """Release it. Idempotent; may be called after the device was closed."""
        if self._log is not None and self._blk._blk is not None:
            lib.vmm_blk_dirty_close(self._blk._blk, self._log)
            self._blk.held -= 1
        self._log = None
