"""What the transports of a virtio device have in common: between them and their device, the whole state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import lib
from vmm.devices.device import Device
from vmm.devices.saved_state import checked

if TYPE_CHECKING:
    from vmm.devices.device import State
    from vmm.devices.virtio.device import VirtioDevice


class VirtioTransport(Device):
    """A virtio device on the bus. Subclasses add what the transport itself remembers."""

    device: VirtioDevice

    def save(self) -> State:
        """Three parts: ``driven``, what the driver made of the device; ``transport``; ``device``, what that remembers.

        The machine is paused. Requests in flight are finished first, which may write guest memory and raise
        interrupts: memory, vCPUs and interrupt controllers are saved afterwards. Raises
        :class:`~vmm.errors.StateError` for a device that holds requests of its own, and for a share.
        """
        driven = self.device.save_driven()
        return {"version": 1, "driven": driven, "transport": self.save_transport(), "device": self.device.save()}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded: after the PCI host, before the interrupt controllers.

        Raises ``ValueError`` for a state no such device can be in; the device is as it was, or reset.
        """
        parts = checked(self.name, state, {}, values=("driven", "transport", "device"))
        lib.vmm_virtio_hold(self.device.virtio)
        try:
            self.device.load_driven(parts["driven"])
            try:
                self.load_transport(parts["transport"])
                self.device.load(parts["device"])
            except ValueError:
                self.device.reset()
                raise
        finally:
            lib.vmm_virtio_release(self.device.virtio)

    def capture(self) -> Any:
        """:meth:`save`, for :meth:`roll_back` in this process alone: quicker."""
        return self.device.capture(), self.capture_transport()

    def roll_back(self, captured: Any) -> None:
        """Become what :meth:`capture` recorded: after the PCI host, before the interrupt controllers."""
        device, transport = captured
        lib.vmm_virtio_hold(self.device.virtio)
        try:
            self.device.roll_back(device)
            self.roll_back_transport(transport)
        finally:
            lib.vmm_virtio_release(self.device.virtio)

    def save_transport(self) -> State:
        """What the transport remembers beside its device."""
        raise NotImplementedError

    def load_transport(self, state: State) -> None:
        """Become what :meth:`save_transport` recorded. ``ValueError``: it cannot be, and nothing has changed."""
        raise NotImplementedError

    def capture_transport(self) -> Any:
        """:meth:`save_transport` as a native record."""
        raise NotImplementedError

    def roll_back_transport(self, captured: Any) -> None:
        """Become what :meth:`capture_transport` recorded."""
        raise NotImplementedError
