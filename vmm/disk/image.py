"""Raw images and block devices: opening, checking, locking."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, HostError

if TYPE_CHECKING:
    from typing import IO, NoReturn

FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx"}
"""First bytes of images that are not raw, and what ``qemu-img`` calls them."""
OVERLAY_MAGIC = b"PYVMMOVL"
"""First bytes of an overlay file (docs/disk-overlay.md)."""


class Image:
    """An open file and its lock: shared for reading, alone for writing. Both last as long as a descriptor of it.

    ``fd``, ``path``, ``size`` in bytes, ``alignment`` that O_DIRECT asks of transfers (1 without ``direct``),
    ``block_device``. ``kind`` is what messages call it: ``disk`` or ``overlay``.
    """

    def __init__(
        self, path: str, *, readonly: bool, direct: bool = False, create: bool = False, kind: str = "disk"
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.alignment = 1
        self.fd = _open(path, readonly, create, kind)
        try:
            _lock(self.fd, path, readonly)
            self.block_device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            if direct and self.size:
                self.alignment = _go_direct(self.fd, path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def temporary(cls) -> Image:
        """Return an empty unnamed file, which no other process can open. Raises :class:`~vmm.errors.HostError`."""
        image = cls.__new__(cls)
        with temporary_file() as file:
            image.fd = os.dup(file.fileno())
        image.path, image.alignment, image.size, image.block_device = "(temporary)", 1, 0, False
        image.readonly = False
        return image

    def unlock(self) -> None:
        """Let others have it: a machine that moves. Nothing is read or written here any more."""
        import fcntl
        import struct

        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))

    def lock(self) -> None:
        """Have it again. Raises :class:`~vmm.errors.ConfigError` where another machine has it."""
        _lock(self.fd, self.path, self.readonly)

    def close(self) -> None:
        """Close it. The lock goes with the last descriptor, the native half's included."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def open_raw(path: str, *, readonly: bool, direct: bool, sector: int) -> Image:
    """A raw image or block device as a disk with sectors of ``sector`` bytes.

    A file may end within its last sector, of which the rest is zeros then: see :func:`whole_sectors`.
    """
    image = Image(path, readonly=readonly, direct=direct)
    try:
        refuse_formats(image)
        if not image.size:
            raise ConfigError(f"disk {path} is empty: give it a size with 'truncate -s 1G {path}'")
        if image.size % sector and image.block_device:
            raise ConfigError(
                f"disk {path} has {image.size} bytes, which are not whole sectors of {sector}: "
                "leave sector=4096 out, or use another device"
            )
        if sector % image.alignment:
            raise ConfigError(
                f"disk {path}: with cache=none its file system moves {image.alignment} bytes at a time: "
                f"give it sector={image.alignment}, or leave cache=none out"
            )
    except BaseException:
        image.close()
        raise
    return image


def whole_sectors(size: int, sector: int) -> int:
    """Bytes of the disk that a file of ``size`` bytes is. A write of the last sector makes the file as long."""
    return -(-size // sector) * sector


def refuse_formats(image: Image) -> None:
    """Refuse what is known not to be raw. It is opened as what the user said it is, never as what it says it is."""
    head = _first_bytes(image.fd, 8, image.alignment)
    for magic, name in FORMATS.items():
        if head.startswith(magic):
            raise ConfigError(
                f"disk {image.path} is a {name} image: convert it with "
                f"'qemu-img convert -O raw {image.path} {os.path.splitext(image.path)[0]}.img'"
            )
    if head == OVERLAY_MAGIC:
        raise ConfigError(f"disk {image.path} is an overlay: give its base, as in --disk BASE,overlay={image.path}")


def _open(path: str, readonly: bool, create: bool, kind: str) -> int:
    flags = os.O_CLOEXEC | (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_CREAT if create else 0)
    try:
        mode = os.stat(path).st_mode if not create or os.path.exists(path) else stat.S_IFREG
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"{kind} {path} is neither a file nor a block device; give one of the two")
        # A block device: EBUSY if the host has mounted it or something lies on it.
        return os.open(path, flags | (os.O_EXCL if stat.S_ISBLK(mode) and not readonly else 0), 0o666)
    except OSError as error:
        _cannot_open(path, error, create, kind)


def _cannot_open(path: str, error: OSError, create: bool, kind: str) -> NoReturn:
    import errno

    missing = f"there is no such file; make one with 'truncate -s 1G {path}'"
    if kind == "overlay":
        missing = "there is no such directory; make it first" if create else "there is no such file; name one that is"
    fixes = {
        errno.ENOENT: missing,
        errno.EACCES: "permission denied; give yourself access, or use it read-only (ro)",
        errno.EPERM: "permission denied; give yourself access, or use it read-only (ro)",
        errno.EROFS: "its file system is read-only; use it read-only too (ro)",
        errno.EBUSY: "the host uses it; unmount it first, or use it read-only (ro)",
    }
    raise ConfigError(f"{kind} {path}: {fixes.get(error.errno or 0, error.strerror)}") from error


def _lock(fd: int, path: str, readonly: bool) -> None:
    """Readers share, a writer is alone: also against others that lock images this way, as QEMU does.

    A lock of the open file, not of the process: it goes with the descriptors, and two machines in one process meet.
    """
    import fcntl
    import struct

    kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
    whole = struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0)  # struct flock
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except (BlockingIOError, PermissionError) as error:
        other = "is being written" if readonly else "is in use"
        raise ConfigError(
            f"disk {path} {other} by another machine, or is given twice: stop that one, or share the disk read-only "
            "(ro on both)"
        ) from error
    except OSError:
        pass  # a file system without locks: other users cannot be detected


def _go_direct(fd: int, path: str) -> int:
    """Switch to O_DIRECT; the smallest transfer that works then."""
    import fcntl
    import mmap

    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as page:
            for alignment in (512, 4096):
                try:
                    with memoryview(page)[:alignment] as part:
                        os.preadv(fd, [part], 0)
                    return alignment
                except OSError:
                    continue
    except OSError:
        pass
    raise ConfigError(f"disk {path}: its file system has no O_DIRECT: leave cache=none out")


def _first_bytes(fd: int, n: int, alignment: int) -> bytes:
    if alignment == 1:
        return os.pread(fd, n, 0)
    return read_page(fd, 0)[:n]


def read_page(fd: int, at: int) -> bytes:
    """4096 bytes at ``at``, or as many as there are; also with O_DIRECT."""
    import mmap

    with mmap.mmap(-1, 4096) as page:
        buffers: list[Any] = [page]
        return page[: os.preadv(fd, buffers, at)]


def temporary_file(near: str | None = None) -> IO[bytes]:
    """An empty file without a name, which goes with its last descriptor: in the directory for temporary files, or
    beside the file ``near`` where that can be. Raises :class:`~vmm.errors.HostError`."""
    import tempfile

    try:
        if near is not None:
            try:
                return tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(near)), buffering=0)
            except OSError:
                pass
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise HostError(
            f"no temporary file ({error.strerror}): name a directory with room in TMPDIR", error.errno or 0
        ) from error
