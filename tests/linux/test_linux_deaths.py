"""Linux guests that went wrong, diagnosed from what they said, and from what they could not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm.linux import initramfs
from vmm.machine import Machine

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

pytestmark = pytest.mark.timeout(300)


def test_a_kernel_without_its_root_says_what_it_looked_for_and_the_machine_what_it_lacks(
    small_kernel: SmallKernel,
) -> None:
    with Machine(kernel=small_kernel.bzimage, append="root=/dev/vda rootfstype=ext4", memory="64M") as machine:
        outcome = machine.run(timeout=240)
        found = machine.diagnose()
    assert (outcome.reason, found.cause) == ("panic", "no-root"), outcome.console.decode(errors="replace")
    assert "the kernel looked for " in found.sentence
    assert "vda" in found.sentence
    assert "it has no block device" in found.sentence
    assert "the machine has no disk: --disk FILE gives it one" in found.evidence


def test_a_kernel_that_nobody_hears_is_found_out_through_its_log(small_kernel: SmallKernel) -> None:
    initrd = initramfs.command(["sleep", "10000"])
    with Machine(
        kernel=small_kernel.bzimage, initrd=[initrd], append="console=hvc0", memory="128M", stall=30.0
    ) as machine:
        outcome = machine.run(timeout=240)
        found = machine.diagnose()
        printed = machine.console.transcript
    assert (outcome.reason, printed) == ("stalled", b"")
    assert found.cause == "no-console"
    assert "was told console=hvc0, and this machine's console is ttyS0" in found.sentence
    assert "Run /init as init process" in found.evidence
