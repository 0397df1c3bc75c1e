"""Checkpoints in process, and snapshots: the state of a machine and its memory in a directory.

The format of the directory is in docs/snapshot-format.md.

    snapshot.write("before", state, memory)                    # full
    snapshot.write("after", state, memory, parent=before, dirty=log.take())
    with snapshot.read("after") as after:
        after.check()
    snapshot.merge(after, "whole")

The modules for files know neither machines nor KVM. Each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.lazy_names import imported_when_used

if TYPE_CHECKING:
    from vmm.errors import SnapshotError as SnapshotError
    from vmm.snapshot.reading import Snapshot as Snapshot
    from vmm.snapshot.reading import read as read
    from vmm.snapshot.regions import Ram as Ram
    from vmm.snapshot.regions import Region as Region
    from vmm.snapshot.writing import merge as merge
    from vmm.snapshot.writing import write as write

_HOME = {
    "Ram": "vmm.snapshot.regions",
    "Region": "vmm.snapshot.regions",
    "Snapshot": "vmm.snapshot.reading",
    "SnapshotError": "vmm.errors",
    "merge": "vmm.snapshot.writing",
    "read": "vmm.snapshot.reading",
    "write": "vmm.snapshot.writing",
}

__all__ = sorted(_HOME)
__getattr__ = imported_when_used(__name__, _HOME)
