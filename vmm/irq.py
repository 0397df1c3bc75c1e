"""Interrupt lines into the in-kernel irqchip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm._ffi import ffi, lib
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm


class GsiLine:
    """The wire of one global system interrupt. ``native`` is the C line for devices written in C."""

    __slots__ = ("_set", "gsi", "native")

    def __init__(self, vm: vmm_vm, gsi: int) -> None:
        self.gsi = gsi
        self.native = lib.vmm_vm_line(vm, gsi)
        if not self.native:
            raise ConfigError(f"interrupt line {gsi} does not exist: lines are 0..4095")
        self._set = lib.vmm_line_set

    def raise_(self) -> None:
        """Assert the line (stays asserted until :meth:`lower`)."""
        self._set(self.native, 1)

    def lower(self) -> None:
        """Deassert the line."""
        self._set(self.native, 0)

    def pulse(self) -> None:
        """Assert and deassert: one edge."""
        self._set(self.native, 1)
        self._set(self.native, 0)


CHIPS = {
    "pit": lib.VMM_STATE_PIT,
    "pic": lib.VMM_STATE_PIC_MASTER,
    "pic2": lib.VMM_STATE_PIC_SLAVE,
    "ioapic": lib.VMM_STATE_IOAPIC,
}


def chips(vm: vmm_vm) -> dict[str, bytes]:
    """Return the states of the in-kernel interrupt controllers and timer, as KVM's structs, of a machine with vCPUs.

    "pit" is absent where the machine uses the user-space PIT.
    """
    found = {}
    for name, kind in CHIPS.items():
        buffer = ffi.new("uint8_t[]", lib.vmm_state_size(kind))
        if lib.vmm_vm_get_state(vm, kind, buffer, len(buffer)) == 0:
            found[name] = bytes(buffer)
    return found
