"""Properties of this host's KVM, found by querying it and by running tiny guests, never by the host's name.

Every start calls :func:`check`, which reads the findings of an earlier probe of the same running kernel, or probes.
:mod:`vmm.cli.doctor` prints all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.host.capabilities import NEEDED, USED, capabilities, require_capabilities
from vmm.host.identity import backend, identity
from vmm.host.known import findings, probe_now
from vmm.host.remedies import Remedies

if TYPE_CHECKING:
    from vmm.config import MachineConfig

__all__ = [
    "NEEDED", "USED", "Remedies", "backend", "capabilities", "check", "findings", "identity", "probe_now",
    "require_capabilities",
]  # fmt: skip


def check(kvm: str, config: MachineConfig) -> Remedies:
    """Return the remedies for a machine of this configuration; probes once per boot of the host.

    Raises :class:`~vmm.errors.HostError` when KVM is missing, forbidden or too old.
    """
    if config.compat == "off":
        return Remedies(None, "off")
    return Remedies(findings(kvm), config.compat)
