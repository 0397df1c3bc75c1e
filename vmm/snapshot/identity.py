"""The identity of a machine: generation ID, hardware addresses, context id of vsock. Two machines must not share it.

A copy of a machine gets a new one. The generation ID and the context id are announced to the guest, and Linux acts on
both; a hardware address is only read when the guest's driver starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import ConfigError
from vmm.parts import read_nets, read_vsock

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vmm.config import MachineConfig
    from vmm.snapshot.subject import Restorable

KINDS = ("new", "same")

_CID_FIRST, _CID_END = 3, 0xFFFFFFFF  # of guests: virtio 1.2, 5.10.4


def asked(kind: str) -> bool:
    """Return whether a copy gets a new identity. Raises :class:`~vmm.errors.ConfigError` for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"there is no identity {kind!r}: a copy has a new one or the same")
    return kind == "new"


def another(config: MachineConfig, given: Mapping[str, Any]) -> MachineConfig:
    """Return ``config`` with random hardware addresses and context id, except those in ``given``."""
    said = {net.mac for net in read_nets(given.get("nets")) if net.mac}
    nets = tuple(net if net.mac in said else net.with_(mac=random_mac()) for net in config.nets)
    vsock, said_vsock = config.vsock, read_vsock(given.get("vsock"))
    if vsock is not None and (said_vsock is None or "cid" not in said_vsock.said):
        vsock = vsock.with_(cid=random_cid())
    return config.with_(nets=nets, vsock=vsock)


def renew(machine: Restorable) -> None:
    """Give a machine that has loaded another's state, and does not run yet, the identity in its configuration.

    A vsock device renews itself: it compares its context id with the one in the state.
    """
    from vmm.devices.virtio.net import DEVICE_ID, parse_mac

    machine.generation_id.renew()
    interfaces = [device for device in machine.virtio if device.device_id == DEVICE_ID]
    for device, net in zip(interfaces, machine.config.nets, strict=True):
        device.set_config(0, parse_mac(net.mac))  # virtio 1.2, 5.1.4: mac comes first


def random_mac() -> str:
    """Return a locally administered unicast address (IEEE 802, 8.2) with 46 random bits."""
    import os

    octets = os.urandom(6)
    return bytes([octets[0] & 0xFC | 0x02, *octets[1:]]).hex(":")


def random_cid() -> int:
    """Return a random context id that a guest may have."""
    import random

    return random.SystemRandom().randrange(_CID_FIRST, _CID_END)
