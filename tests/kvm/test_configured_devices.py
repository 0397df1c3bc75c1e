"""What a configuration asks for is in the machine, on either transport, in the order the guest names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm import ConfigError, Machine, MachineConfig
from vmm.boot.acpi import Tables
from vmm.host import Remedies
from vmm.machine.firmware import command_line

if TYPE_CHECKING:
    from pathlib import Path

NATIVE = Remedies(None, "off")  # of a host that needs none


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_every_part_becomes_its_device(tmp_path: Path, transport: str) -> None:
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    with Machine(
        memory="32M",
        virtio=transport,
        disks=[f"{tmp_path}/a.img", f"{tmp_path}/b.img,ro"],
        nets=f"socket={tmp_path}/link",
        vsock=f"{tmp_path}/vsock,cid=7",
        balloon=True,
        console_device="virtio",
    ) as machine:
        names = [device.name for device in machine.virtio]
        assert names == [
            "virtio-blk0", "virtio-blk1", "virtio-net0", "virtio-vsock0", "virtio-balloon0", "virtio-console0",
            "virtio-rng0",
        ]  # fmt: skip
        assert [device.name for device in machine.devices][-len(names) :] == names
        assert (tmp_path / "vsock").is_socket()
    assert not (tmp_path / "vsock").exists()


def test_devices_that_are_not_asked_for_are_not_there() -> None:
    with Machine(memory="16M", rng=False) as machine:
        assert machine.virtio == []
        assert (machine.pci is None) == (machine.config.virtio == "mmio")


def test_linux_is_told_of_the_console_it_has() -> None:
    for device, tty in (("uart", "ttyS0"), ("virtio", "hvc0")):
        config = MachineConfig(memory="16M", console_device=device)
        assert f"console={tty}" in command_line(config, "bzimage", NATIVE, Tables(), 2047, ticks=False).split()


@pytest.mark.parametrize(
    ("append", "kept", "dropped"),
    [
        ("-- console=web panic=5 clocksource=x", ["console=ttyS0", "panic=-1", "clocksource=kvm-clock"], []),
        ('dyndbg="console=a panic=1" quiet', ["console=ttyS0", "panic=-1"], []),
        ("console", ["console=ttyS0"], []),
        ("console=tty0 panic=5 mitigations=auto", [], ["console=ttyS0", "panic=-1", "mitigations=off"]),
        ("no-timer-check", [], ["no_timer_check"]),
    ],
)
def test_only_what_the_kernel_itself_is_told_keeps_words_from_being_added(
    append: str, kept: list[str], dropped: list[str]
) -> None:
    remedies = Remedies(None, "off")
    remedies.tsc_fixed = True
    line = command_line(MachineConfig(memory="16M", append=append), "bzimage", remedies, Tables(), 2047, ticks=True)
    assert line.endswith(append)
    added = line.removesuffix(append).split()
    assert set(kept) <= set(added) and not set(dropped) & set(added)


@pytest.mark.parametrize(("append", "listed"), [("acpi=off", True), ("-- acpi=off", False), ('x="a acpi=off"', False)])
def test_virtio_mmio_devices_are_listed_for_a_kernel_without_acpi_alone(append: str, listed: bool) -> None:
    tables = Tables()
    tables.virtio_mmio.append("virtio_mmio.device=4K@0xc0000000:5")
    line = command_line(MachineConfig(memory="16M", append=append), "bzimage", NATIVE, tables, 2047, ticks=False)
    assert (tables.virtio_mmio[0] in line) == listed


def test_an_image_that_takes_a_short_line_is_told_what_it_needs() -> None:
    config = MachineConfig(memory="16M", append="quiet")
    whole, short = (command_line(config, "bzimage", NATIVE, Tables(), room, ticks=True).split() for room in (2047, 120))
    assert set(short) < set(whole) and {"console=ttyS0", "panic=-1", "quiet"} <= set(short)


def test_a_disk_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Machine(memory="16M", disks=f"{tmp_path}/nowhere.img")


def test_more_devices_than_mmio_has_lines_for_names_the_other_transport(tmp_path: Path) -> None:
    disks = []
    for n in range(16):
        path = tmp_path / f"{n}.img"
        path.write_bytes(bytes(4096))
        disks.append(str(path))
    with pytest.raises(ConfigError, match="use the transport pci"):
        Machine(memory="16M", disks=disks, virtio="mmio")
    with Machine(memory="16M", disks=disks, virtio="pci") as machine:
        assert len(machine.virtio) == 17
