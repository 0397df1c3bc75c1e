"""Interrupt lines into the in-kernel irqchip."""

from __future__ import annotations

from typing import Any

from vmm._ffi import lib
from vmm.errors import ConfigError


class GsiLine:
    """The wire of one global system interrupt. ``native`` is the C line for devices written in C."""

    __slots__ = ("_set", "gsi", "native")

    def __init__(self, vm: Any, gsi: int) -> None:
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
