"""The network device (virtio 1.2, 5.1); the model is ``native/virtio/net.c``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm._ffi import vmm_vm
    from vmm.net.end import End

DEVICE_ID = 1
QUEUES_MAX = 8
_COUNTS = (
    "frames_out", "bytes_out", "frames_in", "bytes_in", "dropped_out", "invalid_out", "dropped_in", "invalid_in",
    "segmented", "checksummed", "starved", "full",
)  # fmt: skip


class Net(VirtioDevice):
    """A network interface with the host end ``end`` (see :mod:`vmm.net`), which becomes this device's.

    ``mac``: ``"52:54:00:12:34:56"``; default: one made of the end's identity and ``index``, the same in the next run.
    ``mtu``: told to the driver. ``queues``: pairs of queues. ``pps``, ``bps``: frames and bytes a second in each
    direction, 0 for no limit. Raises ConfigError and HostError where the end cannot be what was asked for.
    """

    device_id = DEVICE_ID
    remembers = ("pairs", "accepted", "filter", "announces")
    # in use; offloads the driver takes; its receive modes; how often it is still to say where it is

    def __init__(
        self,
        vm: vmm_vm,
        index: int,
        end: End,
        *,
        mac: str | None = None,
        mtu: int | None = None,
        queues: int = 1,
        pps: int = 0,
        bps: int = 0,
    ) -> None:
        self.name = f"virtio-net{index}"
        self.end = end
        self.queues = queues
        self._net: Any = None
        self._tending: Any = None
        self._stop = -1
        most = min(end.queues_max, QUEUES_MAX)
        if not 1 <= queues <= most:
            raise ConfigError(f"{queues} pairs of queues: a {end.backend} network has {_up_to(most)}")
        mtu = mtu or end.mtu
        end.open(index, queues, mtu)
        try:
            address = parse_mac(mac) if mac else derive_mac(f"{end.identity()} {index}")
            config = {
                "mac": list(address), "mtu": mtu or 0, "pairs": queues, "offloads": end.offloads,
                "pps": pps, "bps": bps,
            }  # fmt: skip
            out = ffi.new("vmm_net **")
            check(lib.vmm_net_create(vm, self.name.encode(), ffi.new("vmm_net_config *", config), out))
            self._net = out[0]
            self.virtio = lib.vmm_net_virtio(self._net)
            self._attach_first()
        except BaseException:
            end.close()
            raise

    # ---- the host end ----

    def _attach_first(self) -> None:
        fds = self.end.descriptors()
        if fds:
            check(lib.vmm_net_attach_tap(self._net, fds, len(fds)))
        elif self.end.lasting:
            self._tend()
        else:
            self._attach(self.end.connect(-1))

    def _attach(self, peer: Any) -> None:
        if peer is not None:
            code = lib.vmm_net_attach_stream(self._net, peer.fileno(), self.end.offloads)
            if code < 0:
                peer.close()
                check(code)
            peer.detach()

    def _tend(self) -> None:
        """Keep the end connected, on a thread that sleeps until it is lost."""
        import os
        import threading

        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._tending = threading.Thread(target=self._keep_connected, name=self.name, daemon=True)
        self._tending.start()

    def _keep_connected(self) -> None:
        import os
        import time

        from vmm.errors import VmmError
        from vmm.net.end import Backoff, Refusal, wait

        lost, stop, backoff = lib.vmm_net_lost_fd(self._net), self._stop, Backoff()
        while True:
            try:
                peer = self.end.connect(stop)
                if peer is None:
                    return
                self._attach(peer)
                backoff.begin(time.monotonic())
                if wait(lost, stop) is None:
                    return
                os.eventfd_read(lost)
            except (Refusal, VmmError, OSError) as error:
                lib.vmm_net_say(self._net, f"{self.name}: {error}".encode())
            if wait(-1, stop, backoff.lost(time.monotonic())) is None:
                return

    def reset(self) -> None:
        """Power-on state. The end stays as it is; one that is lost from here on stays lost."""
        if self._tending is not None:
            import os

            os.eventfd_write(self._stop, 1)
            self._tending.join()
            os.close(self._stop)
            self._tending = None
        super().reset()

    def destroy(self) -> None:
        """Free the native half and the host end."""
        if self._net is not None:
            lib.vmm_net_destroy(self._net)
            self._net = self.virtio = None
            self.end.close()

    # ---- looking at it ----

    @property
    def link_up(self) -> bool:
        """Whether the guest's link is up: there is a peer, and the cable is in. Setting it pulls the cable (false)
        or puts it back."""
        return bool(lib.vmm_net_link(self._net))

    @link_up.setter
    def link_up(self, up: bool) -> None:
        """Pull the cable, or put it back."""
        lib.vmm_net_plug(self._net, up)

    def announce(self) -> None:
        """Ask the guest to tell the network where it is now, some times once the link is up (virtio 1.2, 5.1.6.5.4):
        Linux sends gratuitous ARP. A driver that did not agree to be asked is not. A machine that moves does so."""
        lib.vmm_net_announce(self._net)

    @property
    def mac(self) -> str:
        """The hardware address; the guest may have set another one than it was given."""
        return self.config(0, 6).hex(":")

    def statistics(self) -> tuple[Mapping[str, int], ...]:
        """Per pair of queues, since the start; ``out`` is from the guest.

        ``frames_out``, ``bytes_out``, ``frames_in``, ``bytes_in``: moved. ``dropped_out``: the link was down, or no
        frame has such a size; ``dropped_in``: no driver, or not room enough ever. ``invalid_out``, ``invalid_in``: a
        header that contradicts its frame. ``segmented``, ``checksummed``: done for the guest. ``starved``, ``full``:
        times that the guest had no buffers, that the end took no more.
        """
        from types import MappingProxyType

        counts = ffi.new("vmm_net_counts *")
        found = []
        for pair in range(self.queues):
            check(lib.vmm_net_get_counts(self._net, pair, counts))
            found.append(MappingProxyType({name: int(getattr(counts, name)) for name in _COUNTS}))
        return tuple(found)


def _up_to(most: int) -> str:
    return "one, as it is one stream of frames: several need --net tap=NAME" if most == 1 else f"at most {most}"


def parse_mac(text: str) -> bytes:
    """Six bytes of ``"52:54:00:12:34:56"``. Raises ConfigError, also for a multicast address."""
    octets = text.split(":")
    if len(octets) != 6 or not all(len(o) == 2 and o.isalnum() and o.isascii() for o in octets):
        raise ConfigError(f"{text!r} is not a MAC address: write 52:54:00:12:34:56")
    try:
        address = bytes(int(octet, 16) for octet in octets)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a MAC address: write 52:54:00:12:34:56") from error
    if address[0] & 1:
        raise ConfigError(f"{text!r} is a multicast address: a MAC's first byte is even, as in 52:54:00:12:34:56")
    return address


def derive_mac(identity: str) -> bytes:
    """A locally administered unicast address (IEEE 802, 8.2) that is the same for the same ``identity``."""
    from hashlib import blake2s

    digest = blake2s(identity.encode(errors="surrogateescape"), digest_size=6).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:]
