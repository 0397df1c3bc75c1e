"""An image file as the loader reads it: bounded reads, straight into guest memory where possible.

Files are read with pread rather than mapped: a file that shrinks while it is being loaded is then a short
read and an ImageError, not a SIGBUS, and the kernel copies from the page cache to guest memory without a
second mapping.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from vmm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap

    BytesLike = bytes | bytearray | memoryview | mmap


class Image:
    """A readable image: an open file or a buffer.

    ``name`` is what errors call it; ``size`` is in bytes; ``path`` is None for a buffer; ``stamp`` identifies
    the file's present content without reading it (device, inode, size, mtime and ctime: no write leaves all
    five as they were), and is None for a buffer.
    """

    __slots__ = ("_fd", "_view", "ctime_ns", "name", "path", "size", "stamp")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.path: str | None = None
        self.stamp: str | None = None
        self.ctime_ns = 0
        self._fd = -1
        self._view: memoryview | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Image:
        """Open the file at ``path``. ImageError: missing, unreadable, a directory, or empty."""
        name = os.fspath(path)
        try:
            # O_NONBLOCK: opening a FIFO by mistake must not hang.
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"{name}: cannot be opened for reading: {reason}") from None
        info = os.fstat(fd)
        image = cls(name, info.st_size)
        image._fd = fd
        image.path = name
        if not stat.S_ISREG(info.st_mode):
            image.close()
            raise ImageError(f"{name}: not a regular file; give the path of an image file")
        if info.st_size == 0:
            image.close()
            raise ImageError(f"{name}: the file is empty")
        image.ctime_ns = info.st_ctime_ns
        image.stamp = f"{info.st_dev:x}-{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}-{info.st_ctime_ns:x}"
        return image

    @classmethod
    def of(cls, data: BytesLike, name: str) -> Image:
        """Wrap a buffer. ImageError: it is empty."""
        view = memoryview(data).cast("B")
        if not view.nbytes:
            raise ImageError(f"{name}: the image is empty")
        image = cls(name, view.nbytes)
        image._view = view
        return image

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``. ImageError: the image ends before."""
        self._check(offset, size)
        if self._view is not None:
            return bytes(self._view[offset : offset + size])
        data = bytearray(size)
        self._fill(offset, memoryview(data))
        return bytes(data)

    def head(self, size: int) -> bytes:
        """The first ``size`` bytes, or as many as there are."""
        return self.read(0, min(size, self.size))

    def read_into(self, offset: int, target: memoryview, *, zeroed: bool = False) -> None:
        """Fill ``target`` from ``offset``. ImageError: the image ends before.

        ``zeroed`` says that ``target`` holds zeros: the holes of a sparse file are then skipped.
        """
        self._check(offset, target.nbytes)
        if self._view is not None:
            target[:] = self._view[offset : offset + target.nbytes]
            return
        end = offset + target.nbytes
        for start, stop in self._extents(offset, end) if zeroed else ((offset, end),):
            self._fill(start, target[start - offset : stop - offset])

    def close(self) -> None:
        """Give the file or buffer back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._view is not None:
            self._view.release()
            self._view = None

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ImageError(
                f"{self.name}: truncated or lying: {size:#x} bytes are wanted at offset {offset:#x}, "
                f"but the image has {self.size:#x}; fetch or build it again"
            )

    def _extents(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """The pieces of [offset, end) that are not holes."""
        while offset < end:
            try:
                offset = os.lseek(self._fd, offset, os.SEEK_DATA)
                stop = min(os.lseek(self._fd, offset, os.SEEK_HOLE), end)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                    return
                stop = end  # a file system that does not know: all is data
            if offset < stop:
                yield offset, stop
            offset = max(stop, offset)

    def _fill(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < target.nbytes:
            try:
                count = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise ImageError(f"{self.name}: cannot be read at {offset + done:#x}: {error.strerror}") from None
            if count == 0:
                raise ImageError(f"{self.name}: the file shrank while it was being loaded; start again")
            done += count
