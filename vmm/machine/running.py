"""Composing a machine and running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import StateError
from vmm.machine.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.boot import Entry
    from vmm.bus import Attachment
    from vmm.devices.device import Device
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.irq import GsiLine
    from vmm.observe.watch import Watch
    from vmm.outcome import Outcome


class RunnableMachine(Parts):
    """A machine that can be composed, started, paused, waited for and ended."""

    # ---- composing ----

    def attach(
        self, device: Device, *, port: int | None = None, address: int | None = None, size: int,
        gsi: int | None = None, first: int = 0,
    ) -> Attachment:  # fmt: skip
        """Put a device on ``size`` ports from ``port``, or bytes from guest-physical ``address``.

        ``gsi`` connects its line; ``first`` is the device's offset at the start of the range. Raises
        :class:`~vmm.errors.BusError` when the range is taken.
        """
        return self.board.attach(device, port=port, address=address, size=size, gsi=gsi, first=first)

    def line(self, gsi: int) -> GsiLine:
        """Return the wire of a global system interrupt into the interrupt controllers."""
        return self.board.line(gsi)

    def add(self, device: VirtioDevice) -> VirtioDevice:
        """Give the guest a virtio device, on the configured transport. Before :meth:`load`."""
        if self.entry is not None:
            raise StateError(f"{device.name} comes too late: add devices before the image is loaded")
        self.board.add(device)
        return device

    def load(self) -> Entry:
        """Load the image and point vCPU 0 at it; :meth:`start` does it when it was not done before."""
        return self.firmware.load()

    def on_start(self, starter: Callable[[], object]) -> None:
        """Have ``starter()`` called before the vCPUs run."""
        self.execution.on_start(starter)

    def on_stop(self, stopper: Callable[[], object]) -> None:
        """Have ``stopper()`` called once no vCPU runs any more."""
        self.execution.on_stop(stopper)

    def on_still(self, hold: Callable[[], object], release: Callable[[], object]) -> None:
        """Have ``hold()`` called before the machine's state is taken or replaced, and ``release()`` after it."""
        self.hold.add(hold, release)

    def on_close(self, closer: Callable[[], object]) -> None:
        """Have ``closer()`` called once the native machine is gone."""
        self.closed.callback(closer)

    # ---- running ----

    @property
    def running(self) -> bool:
        """Whether vCPU threads are running (or paused)."""
        return self.execution.running

    @property
    def ended(self) -> Outcome | None:
        """The outcome if the machine has ended, without waiting for that."""
        return self.execution.ended

    @property
    def stop_fd(self) -> int:
        """A file descriptor that is readable once the machine has ended."""
        return self.vm.stop_fd

    @property
    def paused(self) -> bool:
        """Whether a :meth:`pause` is in force."""
        return self.vm.paused

    def start(self) -> None:
        """Load the image if that was not done, and let the vCPUs run. Returns at once."""
        self.execution.start()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end. After ``timeout`` seconds the machine is stopped and the outcome is ``timeout``.

        An exception raised in a device's or hook's own code comes out of here as itself; the machine is then
        stopped and can be looked at.
        """
        return self.execution.wait(self.limits(timeout))

    async def wait_async(self, timeout: float | None = None) -> Outcome:
        """:meth:`wait` for asyncio: the event loop goes on meanwhile. Cancelling it leaves the machine running."""
        return await self.execution.wait_async(self.limits(timeout))

    def limits(self, timeout: float | None = None) -> Watch | None:
        """Return what tells that ``timeout`` seconds have passed, or that the guest has stalled as configured.

        ``None`` where there is neither. For loops that wait for the end.
        """
        if timeout is None and self.config.stall is None:
            return None
        from vmm.observe.watch import Watch

        return Watch(self, timeout, self.config.stall)

    def run(self, timeout: float | None = None) -> Outcome:
        """:meth:`start`, then :meth:`wait` (default: the configuration's timeout)."""
        self.start()
        return self.wait(self.config.timeout if timeout is None else timeout)

    def stop(self, code: int = 0) -> Outcome:
        """End the run now; the outcome is ``stopped`` unless the guest ended first."""
        return self.execution.stop(code)

    def interrupt(self, code: int) -> None:
        """Ask for the end without waiting: 0 stopped, 1 timeout, 2 interrupted, 3 terminated, 4 stalled."""
        self.execution.interrupt(code)

    def pause(self) -> None:
        """Hold every vCPU between two instructions; registers and memory are then consistent. Nests."""
        self.vm.pause()

    def resume(self) -> None:
        """Undo one :meth:`pause`."""
        self.vm.resume()

    def processor_seconds(self, vcpu: int) -> float:
        """Return the processor time that a vCPU's thread has had, in seconds, of this and earlier runs."""
        return self.execution.processor_seconds(vcpu)
