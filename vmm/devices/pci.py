"""The PCI host bridge: one bus of 32 slots. Its model is ``native/devices/pci.c``.

Two devices on the bus, one configuration space behind them:

==================  ===================================================================================
:class:`PciHost`    ECAM, 1 MiB: slot << 15 | register (PCI Express 4.0, 7.2.2)
:class:`PciPorts`   8 ports: CONFIG_ADDRESS, CONFIG_DATA (mechanism #1; PCI 3.0, 3.2.2.3.2)
==================  ===================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.bus import MMIO, Attachment
from vmm.devices.device import Device
from vmm.devices.saved_state import accept, checked, listed

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm
    from vmm.boot.acpi import Tables
    from vmm.devices.device import State

SLOTS = 32
NOWHERE = (1 << 64) - 1

# Header type 0 (PCI 3.0, 6.1)
_HEADER = {
    0x00: "vendor", 0x02: "device", 0x04: "command", 0x06: "status", 0x08: "revision", 0x0A: "class",
    0x0C: "cache line size", 0x0D: "latency timer", 0x0E: "header type",
    **{0x10 + 4 * bar: f"BAR {bar}" for bar in range(6)},
    0x2C: "subsystem vendor", 0x2E: "subsystem", 0x30: "expansion ROM", 0x34: "capabilities",
    0x3C: "interrupt line", 0x3D: "interrupt pin",
}  # fmt: skip


class PciHost(Device):
    """The host bridge and its bus. ``vm`` is the native machine.

    ``window``: (address, size) in which BARs are placed, in the order functions come; ``ecam`` and ``ports``: where
    the guest will find the two ways into configuration space; ``gsis``: what interrupt pins are wired to, slot n's
    to ``gsis[n % len(gsis)]``, and for a guest that uses no I/O APIC all of them to ``isa_irq``. Raises
    :class:`~vmm.errors.HostError` when there is no memory for it.
    """

    name = "pci"

    def __init__(
        self, vm: vmm_vm, *, window: tuple[int, int], ecam: int, ports: int, gsis: range, isa_irq: int
    ) -> None:
        self.window, self.ecam, self.port, self.gsis = window, ecam, ports, gsis
        self.functions: dict[int, str] = {}
        self.registers = {}
        layout = {
            "window": window[0],
            "window_size": window[1],
            "first_gsi": gsis[0],
            "n_gsis": len(gsis),
            "isa_irq": isa_irq,
        }
        out = ffi.new("vmm_pci_host **")
        check(lib.vmm_pci_host_create(vm, ffi.new("vmm_pci_layout *", layout), out))
        self.host: Any = out[0]
        self.native = (lib.vmm_pci_ecam_ops(), self.host)
        self.ports = PciPorts(self.host)
        self.name_function(0, "host bridge")

    def name_function(self, slot: int, name: str) -> None:
        """Say what sits in a slot, for traces."""
        self.functions[slot] = name
        self.registers.update({slot << 15 | at: f"{slot:02x}.0 {register}" for at, register in _HEADER.items()})

    def gsi(self, slot: int) -> int:
        """The interrupt that a slot's pin is wired to."""
        return self.gsis[slot % len(self.gsis)]

    def read(self, offset: int, size: int) -> int:
        """One read, as the bus makes it."""
        return int(self.native[0].read(self.host, offset, size))

    def write(self, offset: int, size: int, value: int) -> None:
        """One write, as the bus makes it."""
        self.native[0].write(self.host, offset, size, value)

    def reset(self) -> None:
        """Every function as at power-on: BARs where they were placed, none decoded. Not while the machine runs."""
        lib.vmm_pci_host_reset(self.host)

    def save(self) -> State:
        """CONFIG_ADDRESS, and each function's configuration space; what interrupts it is the device's to save."""
        s = self.capture()
        slots = [slot for slot in range(SLOTS) if s.present >> slot & 1]
        functions = [{"slot": slot, "config": bytes(s.config[slot])} for slot in slots]
        return {"version": 1, "address": int(s.address), "functions": functions}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded: before the devices on the bus, not while the machine runs. ``ValueError``
        for other slots, or other devices in them; nothing has changed then."""
        saved = checked(self.name, state, {"address": 0xFFFFFFFF}, values=("functions",))
        s = ffi.new("vmm_pci_host_state *", {"address": saved["address"]})
        for function in listed(self.name, saved["functions"], SLOTS):
            at = checked(f"{self.name}: a function", function, {"slot": SLOTS - 1}, {"config": 256})
            s.present |= 1 << at["slot"]
            ffi.buffer(s.config[at["slot"]])[: len(at["config"])] = at["config"]
        accept(lib.vmm_pci_host_load(self.host, s))

    def capture(self) -> Any:
        """The native record."""
        s = ffi.new("vmm_pci_host_state *")
        lib.vmm_pci_host_save(self.host, s)
        return s

    def roll_back(self, captured: Any) -> None:
        """Become what it says."""
        check(lib.vmm_pci_host_load(self.host, captured))

    def describe(self, tables: Tables) -> None:
        """The host bridge with its windows and interrupt wiring, and the table that leads to the ECAM."""
        pins = {slot: self.gsi(slot) for slot in self.functions if slot}
        tables.add_pci_host(ecam=self.ecam, ports=self.port, window=self.window, pins=pins)

    def destroy(self) -> None:
        """Free it, after its functions and once the machine's native half is gone."""
        if self.host is not None:
            lib.vmm_pci_host_destroy(self.host)
            self.host = None


class PciPorts(Device):
    """Configuration mechanism #1, the ports of a :class:`PciHost`, which has its state."""

    name = "pci-ports"
    registers = {0: "CONFIG_ADDRESS", **{4 + lane: f"CONFIG_DATA+{lane}" for lane in range(4)}}

    def __init__(self, host: Any) -> None:
        self.native = (lib.vmm_pci_ports_ops(), host)

    def read(self, offset: int, size: int) -> int:
        """One read, as the bus makes it."""
        return int(self.native[0].read(self.native[1], offset, size))

    def write(self, offset: int, size: int, value: int) -> None:
        """One write, as the bus makes it."""
        self.native[0].write(self.native[1], offset, size, value)


class BarAttachment(Attachment):
    """A function's BAR on the bus: where it is, is the guest's to say. For :meth:`vmm.bus.Bus.adopt`."""

    __slots__ = ("_bar", "_host", "_slot")

    def __init__(self, host: PciHost, slot: int, bar: int, device: Device) -> None:
        self._host, self._slot, self._bar = host, slot, bar
        info = self._info()
        super().__init__(device, MMIO, int(info.address), int(info.size), 0, None, int(info.tag))

    def _info(self) -> Any:
        info = ffi.new("vmm_pci_bar_info *")
        check(lib.vmm_pci_get_bar(self._host.host, self._slot, self._bar, info))
        return info

    def holds(self, space: int, address: int) -> bool:
        """Whether the BAR decodes ``address`` now."""
        self.base = int(self._info().address)
        return self.base != NOWHERE and super().holds(space, address)
