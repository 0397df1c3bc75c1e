"""What every host end is to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socket import socket

_QUICK = 10.0  # seconds: a connection that lived less counts as another failure
_LONGEST_WAIT = 10.0


class End:
    """One end of a network, for one device.

    The order is :meth:`open`, before the machine runs; :meth:`connect`, and again whenever the connection is lost,
    on a thread of the device's own if ``lasting``; :meth:`close`.
    """

    backend = "wire"
    """What a network on it is called, in messages."""
    offloads = False
    """Whether frames carry a virtio-net header, so that checksum and segmentation offloads cross."""
    lasting = False
    """Whether a lost connection may come back."""
    mtu: int | None = None
    """The MTU a device has here unless it is given another; ``None``: nothing is said of it."""
    queues_max = 1
    """Pairs of queues it can use."""

    def open(self, index: int, queues: int, mtu: int | None) -> None:
        """Set it up for the interface ``index`` of its machine. Raises ConfigError or HostError."""

    def identity(self) -> str:
        """What tells this interface from others on the same network; the default MAC address is made of it."""
        raise NotImplementedError

    def descriptors(self) -> tuple[int, ...]:
        """Of a tap: one a queue, to be taken over. Empty for ends that :meth:`connect`."""
        return ()

    def connect(self, stop: int) -> socket | None:
        """A connected stream socket; waits for it. ``None``: there will be none, or ``stop`` turned readable."""
        return None

    def close(self) -> None:
        """Give up what :meth:`open` made."""


class Refusal(Exception):
    """A connection that cannot be made now; its text says why. The device says it and tries again later."""


class Backoff:
    """How long to wait before the next try: not at all after a connection that lasted, else twice as long each time."""

    def __init__(self) -> None:
        self.wait = 0.0
        self._begun = 0.0

    def begin(self, now: float) -> None:
        """A connection begins."""
        self._begun = now

    def lost(self, now: float) -> float:
        """It has ended, or could not begin; how many seconds to wait."""
        if self._begun and now - self._begun >= _QUICK:
            self.wait = 0.0
        wait, self.wait = self.wait, min(_LONGEST_WAIT, 2 * self.wait or 0.1)
        self._begun = 0.0
        return wait


def wait(fd: int, stop: int, timeout: float | None = None) -> bool | None:
    """Wait until ``fd`` (-1: none) is readable: true; the time is up: false; ``stop`` is readable: ``None``."""
    import select

    poll = select.poll()
    poll.register(stop, select.POLLIN)
    if fd >= 0:
        poll.register(fd, select.POLLIN)
    ready = {ready for ready, _ in poll.poll(None if timeout is None else timeout * 1000)}
    return None if stop in ready else bool(ready)
