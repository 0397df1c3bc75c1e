"""Linux guests for tests: the small kernel (built once, minutes) and a busybox initramfs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm.errors import VmmError

if TYPE_CHECKING:
    from vmm.linux.debian import StockKernel
    from vmm.linux.kernel import SmallKernel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs KVM; each test boots Linux of its own unless its module says BOOTS = False."""
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if getattr(getattr(item, "module", None), "BOOTS", True):
            item.add_marker(pytest.mark.boots)
        if not usable:
            item.add_marker(pytest.mark.skip(reason="/dev/kvm is missing or may not be opened"))


@pytest.fixture(scope="session")
def small_kernel() -> SmallKernel:
    """The small kernel; skipped by name where it cannot be built."""
    from vmm.linux import kernel

    try:
        return kernel.small_kernel()
    except VmmError as error:
        pytest.skip(f"no small kernel: {error}")


@pytest.fixture(scope="session")
def linux_fields(small_kernel: SmallKernel) -> dict[str, object]:
    """The ``linux`` fixture's guest is the small kernel's on every host."""
    return {"kernel": str(small_kernel.bzimage), "memory": "128M"}


@pytest.fixture(scope="session")
def cloud_kernel() -> StockKernel:
    """Debian's stock cloud kernel; skipped by name where it cannot be had."""
    from vmm.linux import debian

    try:
        return debian.stock_kernel("cloud")
    except VmmError as error:
        pytest.skip(f"no stock kernel: {error}")
