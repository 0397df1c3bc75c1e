"""virtio devices written in Python: subclass :class:`VirtioModel`, declare its properties, handle requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import PYTHON_VIRTIO_OPS, VirtioUpcall, check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vm

_TURN = 256  # requests taken before the machine's other devices get the I/O thread again


class Request:
    """One request of the driver: bytes the device may read, then room it may fill.

    Answered when :meth:`VirtioModel.handle` returns, or later by :meth:`complete` if :meth:`later` was called.
    """

    __slots__ = ("_at", "_chain", "_device", "_era", "_filled", "_open", "deferred", "queue")

    def __init__(self, device: VirtioModel, queue: int, chain: Any, era: int) -> None:
        self._device = device
        self._chain = chain
        self._era = era
        self._at = self._filled = 0
        self._open = True
        self.queue = queue
        self.deferred = False

    @property
    def readable(self) -> int:
        """Bytes the driver wrote for the device, in all."""
        return int(lib.vmm_chain_size(self._chain, 0))

    @property
    def writable(self) -> int:
        """Total writable bytes of the request."""
        return int(lib.vmm_chain_size(self._chain, 1))

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes of what the driver wrote (default: the rest); fewer at its end."""
        rest = self.readable - self._at
        size = rest if size < 0 else min(size, rest)
        buffer = ffi.new("uint8_t[]", size)
        self._device.while_current(self._era, lambda: lib.vmm_chain_get(self._chain, self._at, buffer, size))
        self._at += size
        return bytes(buffer)

    def write(self, data: bytes) -> int:
        """Append bytes to those written before; return the number that fitted."""
        written = 0

        def put() -> None:
            nonlocal written
            written = int(lib.vmm_chain_put(self._chain, self._filled, data, len(data)))

        self._device.while_current(self._era, put)
        self._filled += written
        return written

    def later(self) -> None:
        """Defer the completion: ``handle`` may return, and :meth:`complete` is called later, from any thread."""
        self.deferred = True

    def complete(self) -> None:
        """Give the request back to the driver. Once; after a reset of the device it does nothing."""
        if self._open:
            self._open = False
            self._device.while_current(self._era, self._answer)

    def _answer(self) -> None:
        lib.vmm_virtio_answer(self._device.virtio, self.queue, self._chain, self._filled)
        if self.deferred and lib.vmm_virtio_flush(self._device.virtio, self.queue):
            lib.vmm_virtio_ring(self._device.virtio, self.queue)  # taken on the I/O thread: after a save, not in it


class VirtioModel(VirtioDevice):
    """Base of virtio devices written in Python.

    ``queue_sizes``: one power of two (at most 256) for each queue. ``features``: the device's own feature bits.
    ``configuration``: the initial bytes of its configuration space (at most 256).
    :meth:`handle` is called on the machine's I/O thread, one request at a time.
    """

    name = "virtio-model"
    queue_sizes: tuple[int, ...] = (256,)
    features: int = 0
    configuration: bytes = b""

    def handle(self, request: Request) -> None:
        """Handle one request: read from it, write into it. The default completes every request without data."""

    def started(self) -> None:
        """The driver is ready: ``self.agreed`` holds the features both sides have. Called on a vCPU's thread."""

    def stopped(self) -> None:
        """The driver went away or broke a rule: forget every request."""

    def quiesce(self) -> None:
        """The machine is paused and about to be saved: complete every deferred request. The default defers none; one
        that remains makes the save fail. :meth:`save` returns the device's other state, and
        :meth:`load` takes after :meth:`started`. Called on the saving thread, and before one queue is reset."""

    def waits(self, queue: int) -> bool:
        """Whether requests of ``queue`` are to stay in the ring for now; :meth:`kick` takes them up again."""
        return False

    # ---- the machinery ----

    def connect(self, vm: vmm_vm, failed: Callable[[BaseException], None]) -> None:
        """Make the native half. ``failed`` takes what :meth:`handle` raises."""
        self.agreed = 0
        self._era = 0
        self._upcall = VirtioUpcall(self._start, self.kick, self._stop, self.quiesce, failed)
        out = ffi.new("vmm_virtio **")
        sizes, room = list(self.queue_sizes), len(self.configuration)
        check(
            lib.vmm_virtio_create(
                vm, PYTHON_VIRTIO_OPS, self._upcall.opaque, self.device_id, self.name.encode(), self.features,
                len(sizes), sizes, room, out,
            )
        )  # fmt: skip
        self.virtio = out[0]
        if room:
            self.set_config(0, self.configuration)

    def destroy(self) -> None:
        """Free the native half."""
        if self.virtio is not None:
            lib.vmm_virtio_destroy(self.virtio)
            self.virtio = None

    def kick(self, queue: int) -> None:
        """Take what waits in a queue. Called at a doorbell, and by a device that had let requests wait."""
        for _ in range(_TURN):
            if self.waits(queue) or not self._take_one(queue):
                break
        else:
            lib.vmm_virtio_ring(self.virtio, queue)
            return
        if lib.vmm_virtio_flush(self.virtio, queue) and not self.waits(queue):
            lib.vmm_virtio_ring(self.virtio, queue)

    def _take_one(self, queue: int) -> bool:
        chain = ffi.gc(lib.vmm_chain_create(), lib.vmm_chain_destroy)
        if not lib.vmm_virtio_take(self.virtio, queue, chain):
            return False
        request = Request(self, queue, chain, self._era)
        self.handle(request)
        if not request.deferred:
            request.complete()
        return True

    def while_current(self, era: int, act: Callable[[], object]) -> None:
        """``act()`` with the device locked, unless it was reset since ``era``: its requests are gone then."""
        lib.vmm_virtio_hold(self.virtio)
        try:
            if era == self._era:
                act()
        finally:
            lib.vmm_virtio_release(self.virtio)

    def capture(self) -> Any:
        """With what the subclass saves."""
        return super().capture(), self.save()

    def roll_back(self, captured: Any) -> None:
        """Become what :meth:`capture` recorded."""
        native, state = captured
        super().roll_back(native)
        self.load(state)

    def _start(self) -> None:
        self.agreed = self.info()["agreed"]
        self.started()

    def _stop(self) -> None:
        self._era += 1
        self.stopped()
