"""What every virtio device is to Python, whichever language its model is written in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.device import State, Undo

STATUS = {1: "ACKNOWLEDGE", 2: "DRIVER", 4: "DRIVER_OK", 8: "FEATURES_OK", 64: "NEEDS_RESET", 128: "FAILED"}
DRIVER_OK = 4

_COUNTS = ("requests", "bytes_out", "bytes_in", "doorbells", "interrupts", "size", "in_flight", "enabled")


class VirtioDevice:
    """A virtio device without its transport (virtio 1.2, 2).

    ``virtio`` is the native half: made by the subclass's constructor, or by :meth:`connect`; freed by
    :meth:`destroy` once the machine's native half is gone.
    """

    name: str = "virtio"
    """Unique in a machine; what traces and messages call it."""
    device_id: int = 0
    """Its type: virtio 1.2, 5."""
    virtio: Any = None

    def connect(self, vm: Any, failed: Callable[[BaseException], None]) -> None:
        """Make the native half, where the constructor did not; ``failed`` takes exceptions of upcalls."""

    def reset(self) -> None:
        """Power-on state; nothing is in flight afterwards."""
        lib.vmm_virtio_reset(self.virtio)

    def destroy(self) -> None:
        """Free the native half."""

    def set_tag(self, tag: int) -> None:
        """The bus's number for the device, by which the exit trace names it."""
        lib.vmm_virtio_set_tag(self.virtio, tag)

    # ---- looking at it ----

    def info(self) -> dict[str, Any]:
        """What the driver has made of it: ``status`` (names), ``offered`` and ``agreed`` feature bits, ``queues``,
        ``fault`` (why it needs a reset, or "")."""
        info = ffi.new("vmm_virtio_info *")
        lib.vmm_virtio_get_info(self.virtio, info)
        return {
            "status": tuple(name for bit, name in STATUS.items() if info.status & bit),
            "offered": int(info.offered),
            "agreed": int(info.agreed),
            "queues": int(info.n_queues),
            "generation": int(info.generation),
            "fault": ffi.string(info.fault).decode(errors="replace"),
        }

    @property
    def driven(self) -> bool:
        """Whether a driver has set DRIVER_OK."""
        return "DRIVER_OK" in self.info()["status"]

    def queue_statistics(self) -> list[dict[str, int]]:
        """Per queue, since the start: requests, bytes_out (read from the guest), bytes_in, doorbells, interrupts;
        and now: size, in_flight, enabled."""
        stats = ffi.new("vmm_queue_stats *")
        found = []
        for queue in range(self.info()["queues"]):
            check(lib.vmm_virtio_queue_stats(self.virtio, queue, stats))
            found.append({count: int(getattr(stats, count)) for count in _COUNTS})
        return found

    def config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the device's configuration space."""
        buffer = ffi.new("uint8_t[]", size)
        check(lib.vmm_virtio_config_get(self.virtio, offset, buffer, size))
        return bytes(buffer)

    def set_config(self, offset: int, data: bytes) -> None:
        """Change bytes of the configuration space; the driver gets its interrupt."""
        check(lib.vmm_virtio_config_set(self.virtio, offset, data, len(data)))

    def save(self) -> State:
        """What the device itself remembers, apart from its queues and status, as a plain value."""
        return {"version": 1}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no such device can be in."""
        if state.get("version") != 1:
            raise ValueError(f"not a state of {self.name} of version 1")

    def checkpoint(self) -> Undo | None:
        """A way back for what :meth:`save` does not hold; ``None``: there is nothing. The machine is paused."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
