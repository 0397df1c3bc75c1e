"""Who a copy of a machine is: what it is given, and otherwise nobody else."""

from __future__ import annotations

import pytest

from vmm.config import MachineConfig
from vmm.devices.virtio.net import parse_mac
from vmm.errors import ConfigError
from vmm.parts import Net, Vsock
from vmm.snapshot import identity


def test_a_random_address_is_a_unicast_one_that_nobody_was_sold() -> None:
    addresses = [parse_mac(identity.random_mac()) for _ in range(200)]
    assert {address[0] & 3 for address in addresses} == {2}, "not multicast, locally administered"
    assert len(set(addresses)) == 200


def test_a_random_context_id_is_a_guests() -> None:
    assert all(Vsock("v", cid=identity.random_cid()).cid >= 3 for _ in range(200))


def test_a_copy_is_another_machine_in_nothing_but_its_identity() -> None:
    nets = (Net("user", mac="52:54:00:00:00:01", mtu=1400), Net("tap", tap="tap0"))
    was = MachineConfig(memory="64M", nets=nets, vsock=Vsock("sock", cid=7))
    one, two = (identity.another(was, {}) for _ in range(2))
    assert one.vsock and two.vsock and len({7, one.vsock.cid, two.vsock.cid}) == 3
    assert len({net.mac for config in (was, one, two) for net in config.nets}) == 6
    restored = one.with_(
        nets=tuple(net.with_(mac=before.mac) for net, before in zip(one.nets, nets, strict=True)),
        vsock=one.vsock.with_(cid=7),
    )
    assert restored == was


def test_what_is_given_is_kept() -> None:
    config = MachineConfig(nets=(Net("user", mac="52:54:00:00:00:01"), Net("user")), vsock=Vsock("sock", cid=7))
    kept = identity.another(config, {"nets": config.nets, "vsock": config.vsock})
    assert kept.vsock == config.vsock and kept.nets[0] == config.nets[0]
    assert kept.nets[1].mac is not None, "no address was given"


def test_there_are_two_kinds() -> None:
    assert (identity.asked("new"), identity.asked("same")) == (True, False)
    with pytest.raises(ConfigError, match="no identity 'mine'"):
        identity.asked("mine")
