"""The working set: pages that a restored machine touched first, saved with the snapshot for the next restore."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.errors import HostError, SnapshotError
from vmm.snapshot import records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.snapshot.reading import Snapshot

NAME = "working-set"
PAGES_MAX = 1 << 20  # 4 GiB of pages
_PAGE_SHIFT = 12


def save(snapshot: Snapshot, gpas: Sequence[int]) -> None:
    """Save the addresses of pages, in order, in the snapshot's directory; the file is replaced atomically.

    Raises :class:`~vmm.errors.HostError`.
    """
    from array import array

    pages = array("Q", (gpa >> _PAGE_SHIFT for gpa in gpas[:PAGES_MAX])).tobytes()
    path = snapshot.file_path(NAME)
    new = f"{path}.{os.urandom(6).hex()}"
    try:
        with open(new, "xb") as file:
            file.write(records.pack({"snapshot": snapshot.id, "pages": pages}))
        os.replace(new, path)
    except OSError as error:
        raise HostError(f"cannot keep the working set {path} ({error.strerror})", errno=error.errno or 0) from error


def forget(snapshot: Snapshot) -> None:
    """Remove the file, so that a new recording is not influenced by prefetching."""
    import contextlib

    with contextlib.suppress(FileNotFoundError):
        os.unlink(snapshot.file_path(NAME))


def load(snapshot: Snapshot) -> list[int]:
    """Return the saved addresses; an empty list if there are none, or they belong to another snapshot.

    Raises :class:`~vmm.errors.SnapshotError` when the file is damaged.
    """
    from array import array

    path = snapshot.file_path(NAME)
    try:
        with open(snapshot.file_fd(NAME), "rb") as file:
            found, _ = records.unpack(path, file.read(8 * PAGES_MAX + 4096))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SnapshotError(f"cannot read {path} ({error.strerror})") from None
    pages = found.get("pages")
    if found.keys() != {"snapshot", "pages"} or not isinstance(pages, bytes) or len(pages) % 8:
        raise SnapshotError(f"{path} is no working set: remove it")
    if found["snapshot"] != snapshot.id:
        return []
    numbers = array("Q")
    numbers.frombytes(pages)
    return [number << _PAGE_SHIFT for number in numbers if number < 1 << 52 - _PAGE_SHIFT]
