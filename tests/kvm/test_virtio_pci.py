"""A driver and a device over PCI: the transport in a whole machine, which does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import Machine, layout
from vmm.bus import MMIO, PIO
from vmm.devices.pci import NOWHERE
from vmm.devices.virtio.model import Request, VirtioModel
from vmm.devices.virtio.pci import VirtioPci
from vmm.errors import ConfigError, HostError, StateError
from vmm.testing.pci import COMMAND, PciFunction, PciTransport
from vmm.testing.ring import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.devices.pci import PciHost


class Upper(VirtioModel):
    """Answers with what it read, in capitals."""

    name = "virtio-upper"
    device_id = 42
    queue_sizes = (16, 8)
    configuration = b"upper!!!"

    def handle(self, request: Request) -> None:
        request.write(request.read().upper())


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory="64M", virtio="pci", rng=True) as machine:
        machine.add(Upper())
        yield machine


@pytest.fixture
def driver(machine: Machine) -> VirtioDriver:
    return VirtioDriver.of(machine, machine.virtio[1])


def host(machine: Machine) -> PciHost:
    assert machine.pci is not None
    return machine.pci


def transport(machine: Machine, slot: int) -> VirtioPci:
    found = [device for device in machine.devices if isinstance(device, VirtioPci) and device.slot == slot]
    assert len(found) == 1
    return found[0]


def pci(driver: VirtioDriver) -> PciTransport:
    assert isinstance(driver.transport, PciTransport)
    return driver.transport


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_requests_come_back_and_the_isr_says_so(driver: VirtioDriver, packed: bool) -> None:
    driver.start(packed=packed)
    for queue in (0, 1, 0):
        assert driver.request(queue, [b"abc", b"def"], [4, 4]).data[:6] == b"ABCDEF"
    driver.wait_interrupt(1)


def test_every_device_has_a_slot_of_its_own(machine: Machine) -> None:
    assert host(machine).functions == {0: "host bridge", 1: "virtio-rng0", 2: "virtio-upper"}
    rng = VirtioDriver.of(machine, machine.virtio[0])
    rng.start()
    assert rng.transport.device_id() == 4
    assert any(rng.request(0, room=[64]).data)
    assert VirtioDriver.of(machine, machine.virtio[1]).transport.device_id() == 42


def test_configuration_is_read_and_its_change_interrupts(machine: Machine, driver: VirtioDriver) -> None:
    driver.start()
    assert driver.transport.config(0, 8) == b"upper!!!"
    generation = pci(driver).read(21, 1)
    machine.virtio[1].set_config(0, b"lower")
    driver.wait_interrupt(2)
    assert pci(driver).read(21, 1) != generation
    assert driver.transport.config(0, 8) == b"lower!!!"


def test_a_queue_is_reset_and_the_other_goes_on(driver: VirtioDriver) -> None:
    driver.start()
    for _ in range(3):
        driver.reset_queue(0)
        assert driver.request(1, [b"b"], [1]).data == b"B"
        driver.enable(0, 4)
        assert driver.request(0, [b"c"], [1]).data == b"C"
    assert not driver.broken


def test_a_device_goes_on_where_its_bar_was_moved_to(machine: Machine, driver: VirtioDriver) -> None:
    driver.start()
    assert driver.request(0, [b"a"], [1]).data == b"A"
    for address in (layout.PCI_MMIO_START + 0x100000, 1 << 40, layout.PCI_MMIO_START + 0x8000):
        pci(driver).function.move(0, address)
        assert driver.request(0, [b"a"], [1]).data == b"A"
        found = machine.bus.find(MMIO, address + 0x14)
        assert found is not None and (found.name, found.register(address + 0x14)) == ("virtio-upper", "device_status")
    pci(driver).function.write(COMMAND, 2, 0)
    assert machine.bus.find(MMIO, layout.PCI_MMIO_START + 0x8014) is None
    assert transport(machine, 2).bar.holds(MMIO, NOWHERE) is False


def test_traces_name_registers_of_configuration_space(machine: Machine) -> None:
    for slot, offset, name in ((0, 0x0A, "00.0 class"), (2, 0x04, "02.0 command"), (2, 0x10, "02.0 BAR 0")):
        found = machine.bus.find(MMIO, layout.ECAM_START + (slot << 15) + offset)
        assert found is not None and (found.name, found.register(found.base + (slot << 15) + offset)) == ("pci", name)
    ports = machine.bus.find(PIO, 0xCFC)
    assert ports is not None and (ports.name, ports.register(0xCFC)) == ("pci-ports", "CONFIG_DATA+0")


def test_faces_read_and_write_what_the_bus_does(machine: Machine, driver: VirtioDriver) -> None:
    device = transport(machine, 2)
    device.write(0x14, 1, 3)
    assert (device.read(0x14, 1), driver.transport.status()) == (3, 3)
    bridge = host(machine)
    bridge.ports.write(0, 4, 1 << 31 | 2 << 11)
    assert bridge.read(2 << 15, 4) == bridge.ports.read(4, 4) == 0x106A1AF4
    bridge.write(2 << 15 | 0x3C, 1, 99)
    assert PciFunction(machine.bus, bridge.ecam, 2).read(0x3C, 1) == 99
    bridge.reset()
    assert bridge.read(2 << 15 | 0x3C, 1) == layout.PCI_ISA_IRQ


def test_slots_that_are_taken_or_do_not_exist_are_refused(machine: Machine) -> None:
    spare = Upper()
    spare.connect(machine.native, lambda error: None)
    for slot, error in ((1, StateError), (0, StateError), (32, HostError)):
        with pytest.raises(error, match=f"slot {slot}"):
            VirtioPci(spare, host(machine), slot)
    for _ in range(29):
        machine.add(Upper())
    with pytest.raises(ConfigError, match="all 32 PCI slots are taken"):
        VirtioPci(spare, host(machine))
    spare.destroy()


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["config", "config", "bar", "bar", "ports", "status"]),
        st.integers(0, 0x7FFF) | st.integers(0, 0x3F),
        st.sampled_from([1, 2, 4, 8]),
        st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 6, 0xF, 0x8000, 0xFFFF, layout.PCI_MMIO_START]),
    ),
    max_size=60,
)


@pytest.mark.hypothesis
@settings(max_examples=examples(50), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(accesses=ACCESSES)
def test_no_access_of_one_device_s_registers_harms_it_or_another(machine: Machine, accesses: list[Any]) -> None:
    hostile = transport(machine, 2)
    function = PciFunction(machine.bus, host(machine).ecam, 2)
    for where, offset, size, value in accesses:
        value &= (1 << 8 * size) - 1
        if where == "config":
            function.write(offset & 0xFF, size, value)
        elif where == "bar":
            hostile.write(offset, size, value)
        elif where == "ports":
            machine.bus.write(PIO, 0xCF8 + offset % 8, min(size, 4), value & 0xFFFFFFFF)
        else:
            hostile.write(0x14, 1, value & 0xFF)
        hostile.read(offset, size)
        function.read(offset & 0xFF, size)
    rng = VirtioDriver.of(machine, machine.virtio[0], arena=(0x1000000, 0x1100000))
    rng.start()
    assert any(rng.request(0, room=[64]).data)
    hostile.reset()
    host(machine).reset()
    driver = VirtioDriver.of(machine, machine.virtio[1])
    driver.start()
    assert driver.request(0, [b"a"], [1]).data == b"A"
