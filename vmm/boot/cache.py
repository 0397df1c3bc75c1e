"""Unpacked kernels on disk, so that a kernel is unpacked once and not at every start.

    <cache>/kernels/<payload sha256>.elf    the unpacked payload
    <cache>/kernels/<payload sha256>.seal   its stamp and sha256 when it was last known to be whole
    <cache>/kernels/<image stamp>.key       the payload sha256 of the image file with that stamp

Hashing a kernel takes longer than loading it, so nothing is hashed that has a known *stamp* (`Image.stamp`:
device, inode, size, mtime, ctime): a file cannot be written and keep it. An entry whose stamp is not the
sealed one is hashed, and sealed again or thrown away. Files appear by rename, complete and synced; any number
of processes may share the cache; it may be deleted at any time. A cache that cannot be used is a note, never
an error.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.boot.image import Image
from vmm.cache_root import cache_root
from vmm.errors import ImageError

if TYPE_CHECKING:
    from vmm.boot.image import BytesLike

# Unpacked kernels take 20 to 60 MB each; builds of many kernels must not fill a disk.
KERNELS_KEPT = 16
_KEYS_KEPT = 256
# A file changed within its clock's tick after it was stamped could keep its stamp: one this young has no key
# written.
_SETTLED_NS = 2_000_000_000
_STALE_TEMPORARY_NS = 3600 * 1_000_000_000


def directory() -> str:
    """Return the directory of unpacked kernels; it need not exist yet."""
    return os.path.join(cache_root(), "kernels")


def key_of_payload(data: BytesLike) -> str:
    """The cache's key for a payload."""
    return _sha256(data)


def key_of_stamp(image: Image) -> str | None:
    """The key last seen for the file ``image`` was opened from, or None when it must be hashed."""
    if image.stamp is None:
        return None
    key = _read_text(image.stamp + ".key")
    return key if _is_sha256(key) else None


def remember_stamp(image: Image, key: str) -> None:
    """Note that the file of ``image``, as it is now, holds the payload ``key``."""
    import time

    if image.stamp is None or time.time_ns() - image.ctime_ns < _SETTLED_NS:
        return
    if _read_text(image.stamp + ".key") != key:
        _write(image.stamp + ".key", key.encode())


def fetch(key: str, name: str) -> Image | None:
    """The unpacked payload, or None. ``name`` is what errors about it will say."""
    path = os.path.join(directory(), key + ".elf")
    try:
        image = Image.open(path)
    except ImageError:
        return None
    image.name = name
    image.path = None
    stamp, _, digest = _read_text(key + ".seal").partition(" ")
    if stamp == image.stamp:
        return image
    # Copied, restored from a backup, or tampered with: only the content can tell.
    try:
        whole = _is_sha256(digest) and _sha256(image.read(0, image.size)) == digest
    except ImageError:
        whole = False
    if whole:
        _write(key + ".seal", f"{image.stamp} {digest}".encode())
        return image
    image.close()
    for suffix in (".elf", ".seal"):
        _remove(os.path.join(directory(), key + suffix))
    return None


def store(key: str, content: bytes | bytearray, notes: list[str]) -> None:
    """Keep ``content`` as the unpacked payload ``key``; says in ``notes`` when that fails."""
    try:
        os.makedirs(directory(), mode=0o700, exist_ok=True)
    except OSError as error:
        notes.append(f"not cached: {directory()}: {error.strerror}")
        return
    _prune()
    if not _write(key + ".elf", content):
        notes.append(f"not cached: {directory()} cannot be written")
        return
    try:
        with Image.open(os.path.join(directory(), key + ".elf")) as image:
            _write(key + ".seal", f"{image.stamp} {_sha256(content)}".encode())
    except ImageError:
        # Another process pruned it between the rename and here: it will be unpacked again.
        return


def _prune() -> None:
    """Drop what was not used for longest, and temporaries that a killed process left."""
    import time

    try:
        entries = [(entry, entry.stat()) for entry in os.scandir(directory())]
    except OSError:
        return
    entries.sort(key=lambda pair: max(pair[1].st_atime_ns, pair[1].st_mtime_ns), reverse=True)
    kernels = [entry.path for entry, _ in entries if entry.name.endswith(".elf")]
    for path in kernels[KERNELS_KEPT - 1 :]:
        _remove(path)
        _remove(path.removesuffix(".elf") + ".seal")
    for path in [entry.path for entry, _ in entries if entry.name.endswith(".key")][_KEYS_KEPT - 1 :]:
        _remove(path)
    for entry, info in entries:
        if entry.name.endswith(".tmp") and time.time_ns() - info.st_mtime_ns > _STALE_TEMPORARY_NS:
            _remove(entry.path)


def _write(name: str, content: bytes | bytearray) -> bool:
    """Put a file in place by rename, synced first so that no crash leaves a hollow one. False: could not."""
    path = os.path.join(directory(), name)
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_sparse(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        _remove(temporary)
        return False
    return True


def _write_sparse(fd: int, content: bytes | bytearray) -> None:
    """Write ``content`` with holes for its zero pages: a third of a kernel, which then need not be copied."""
    page = 4096
    zeros = bytes(page)
    view = memoryview(content)
    at = 0
    while at < len(content):
        end = at
        while end < len(content) and content[end : end + page] != zeros:
            end += page
        end = min(end, len(content))
        while at < end:
            at += os.pwrite(fd, view[at:end], at)
        while content[at : at + page] == zeros:
            at += page
    os.ftruncate(fd, len(content))


def _read_text(name: str) -> str:
    try:
        with open(os.path.join(directory(), name), "rb") as file:
            return file.read(512).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def _sha256(data: BytesLike) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(digit in "0123456789abcdef" for digit in text)
