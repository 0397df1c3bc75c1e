"""Live migration of a machine to another process, on this host or another: docs/migration.md.

    machine.migrate("unix:/run/there")                 # source: the run ends with the outcome "migrated"
    machine = migrate.receive("unix:/run/there")       # destination: the machine runs

``wire`` has the frames, ``address`` the connections; ``fence`` decides which side owns the machine after a side or the
link fails; ``source`` and ``destination`` are the two sides, ``postcopy`` transfers pages on demand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.lazy_names import imported_when_used

if TYPE_CHECKING:
    from vmm.errors import MigrationError as MigrationError
    from vmm.migrate.destination import Receiver as Receiver
    from vmm.migrate.destination import receive as receive
    from vmm.migrate.precopy import Progress as Progress
    from vmm.migrate.source import Migrated as Migrated
    from vmm.migrate.source import Migration as Migration
    from vmm.migrate.tls import Tls as Tls

_HOME = {
    "Migrated": "vmm.migrate.source",
    "Migration": "vmm.migrate.source",
    "MigrationError": "vmm.errors",
    "Progress": "vmm.migrate.precopy",
    "Receiver": "vmm.migrate.destination",
    "Tls": "vmm.migrate.tls",
    "receive": "vmm.migrate.destination",
}

__all__ = sorted(_HOME)
__getattr__ = imported_when_used(__name__, _HOME)
