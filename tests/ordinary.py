"""Print which tests `make test` runs on this host, as an expression for pytest's -m."""

from __future__ import annotations

from vmm import host
from vmm.errors import VmmError


def expression() -> str:
    """All but the slow ones; where guest kernel code is emulated, also none that boots a Linux of its own."""
    try:
        native = host.findings().native
    except VmmError:  # without KVM they are skipped by name
        native = True
    return "not slow" if native else "not slow and not boots"


if __name__ == "__main__":
    print(expression())
