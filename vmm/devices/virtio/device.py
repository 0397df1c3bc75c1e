"""What every virtio device is to Python, whichever language its model is written in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.saved_state import accept, checked, listed

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vm
    from vmm.devices.device import State, Undo

STATUS = {1: "ACKNOWLEDGE", 2: "DRIVER", 4: "DRIVER_OK", 8: "FEATURES_OK", 64: "NEEDS_RESET", 128: "FAILED"}
DRIVER_OK = 4

_U16, _U32, _U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
_QUEUE = {"size": _U16, "position": _U16, "enabled": 1, "desc": _U64, "driver": _U64, "device": _U64}
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
    remembers: tuple[str, ...] = ()
    """What its native half remembers of requests and commands, beside queues and configuration: names of numbers."""

    def connect(self, vm: vmm_vm, failed: Callable[[BaseException], None]) -> None:
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

    # ---- state ----

    def save(self) -> State:
        """What the device itself remembers, apart from its queues, configuration and status, as a plain value."""
        own = ffi.new("uint64_t[]", lib.VMM_VIRTIO_OWN)
        lib.vmm_virtio_save_own(self.virtio, own)
        return {"version": 1, **{name: int(own[n]) for n, name in enumerate(self.remembers)}}

    def load(self, state: State) -> None:
        """Become what :meth:`save` recorded. Raises ``ValueError`` for a state no such device can be in."""
        saved = checked(self.name, state, dict.fromkeys(self.remembers, _U64))
        own = ffi.new("uint64_t[]", lib.VMM_VIRTIO_OWN)
        for n, name in enumerate(self.remembers):
            own[n] = saved[name]
        accept(lib.vmm_virtio_load_own(self.virtio, own))

    def save_driven(self) -> State:
        """What its driver made of it: status, features, configuration, queues; nothing is in flight afterwards.

        The machine is paused. Guest memory may be written and interrupts raised on the way, so memory, vCPUs and
        interrupt controllers are saved afterwards. Raises :class:`~vmm.errors.StateError` where requests are held by
        a caller that does not release them.
        """
        s = ffi.new("vmm_virtio_state *")
        check(lib.vmm_virtio_save(self.virtio, s))
        return {
            "version": 1, "status": int(s.status), "features": int(s.driver_features),
            "generation": int(s.generation), "fault": ffi.string(s.fault), "config": bytes(s.config)[: s.config_size],
            "queues": [{field: int(getattr(s.queues[n], field)) for field in _QUEUE} for n in range(s.n_queues)],
        }  # fmt: skip

    def load_driven(self, state: State) -> None:
        """Become what :meth:`save_driven` recorded. Raises ``ValueError``, and is as it was then."""
        numbers = {"status": 0xFF, "features": _U64, "generation": _U32}
        saved = checked(self.name, state, numbers, {"fault": 159, "config": 256}, ("queues",))
        queues = listed(self.name, saved["queues"], 64)
        s = ffi.new("vmm_virtio_state *")
        s.status, s.driver_features, s.generation = saved["status"], saved["features"], saved["generation"]
        s.fault, s.config_size, s.n_queues = saved["fault"], len(saved["config"]), len(queues)
        ffi.buffer(s.config)[: len(saved["config"])] = saved["config"]
        for n, queue in enumerate(queues):
            for field, value in checked(f"{self.name}: queue {n}", queue, _QUEUE).items():
                if field in _QUEUE:
                    setattr(s.queues[n], field, value)
        accept(lib.vmm_virtio_load(self.virtio, s))

    def capture(self) -> Any:
        """Return what :meth:`save_driven` and :meth:`save` return, for :meth:`roll_back` in this process, faster."""
        driven, own = ffi.new("vmm_virtio_state *"), ffi.new("uint64_t[]", lib.VMM_VIRTIO_OWN)
        check(lib.vmm_virtio_save(self.virtio, driven))
        lib.vmm_virtio_save_own(self.virtio, own)
        return driven, own

    def roll_back(self, captured: Any) -> None:
        """Become what :meth:`capture` recorded."""
        driven, own = captured
        check(lib.vmm_virtio_load(self.virtio, driven))
        check(lib.vmm_virtio_load_own(self.virtio, own))

    def checkpoint(self) -> Undo | None:
        """A way back for what :meth:`save` does not hold; ``None``: there is nothing. The machine is paused."""
        return None

    def announce(self) -> None:
        """Ask the guest to announce itself: the machine runs on another host after a migration."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
