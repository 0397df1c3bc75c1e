"""memtest86+, from the package archive, starts testing memory and shows its screen on the serial console."""

from __future__ import annotations

import pytest

from vmm import HostError, Machine
from vmm.linux import debian

BOOTS = False  # no Linux: it starts testing within seconds on every host


def test_memtest_starts_testing_memory() -> None:
    try:
        package = debian.fetch("memtest86+")
    except HostError as error:
        pytest.skip(f"no memtest86+: {error}")
    image = next((package.root / "boot").glob("*x64.bin"))
    with Machine(kernel=image, memory="64M", append="console=ttyS0,115200") as machine:
        machine.start()
        machine.console.expect(rb"Memtest86\+", timeout=120)
        machine.console.expect(rb"Address test", timeout=240)
        assert machine.stop().reason == "stopped"
