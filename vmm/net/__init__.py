"""Host ends of networks: where the frames of a :class:`vmm.devices.virtio.net.Net` go to and come from.

``passt`` is the host's own connections without privilege, ``tap`` an interface of the host, ``link`` another machine,
in this process or behind a UNIX socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.net.end import End
    from vmm.parts import Net


def end_of(part: Net) -> End:
    """The end that a configuration asks for; nothing is opened yet."""
    if part.backend == "tap":
        from vmm.net.tap import Tap

        return Tap(part.tap)
    if part.backend == "socket":
        from vmm.net.link import SocketLink

        return SocketLink(part.socket)
    from vmm.net.passt import Passt

    return Passt(part.hostfwd)
