"""Being here puts this folder on the path: tests import `effort` from it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# No property test fails because the host is slow or busy.
settings.register_profile("any-host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-host")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``stops(kind, ...)`` where the probes found that KVM does not stop a guest at such points."""
    kinds = [kind for marker in item.iter_markers("stops") for kind in marker.args]
    if not kinds:
        return
    from vmm import host

    unstopped = sorted(set(kinds) & set(host.findings().unstopped))
    if unstopped:
        named = ", ".join(unstopped)
        pytest.skip(f"this host's KVM does not stop a guest at a debugger's {named} points (pyvmm doctor)")
