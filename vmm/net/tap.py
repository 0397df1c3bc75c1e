"""A tap interface of the host: frames to and from its network stack or a bridge."""

from __future__ import annotations

import os

from vmm.errors import ConfigError, HostError
from vmm.net.end import End

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_NAME_MAX = 15


class Tap(End):
    """The tap interface ``name``: one that this user may use, or, with CAP_NET_ADMIN, a new one."""

    backend = "tap"
    offloads = True
    queues_max = 8

    def __init__(self, name: str) -> None:
        if not 0 < len(os.fsencode(name)) <= _NAME_MAX or "/" in name or name.split() != [name]:
            raise ConfigError(f"{name!r} names no interface: give 1 to {_NAME_MAX} bytes without blanks and slashes")
        self.name = name
        self._fds: tuple[int, ...] = ()

    def open(self, index: int, queues: int, mtu: int | None) -> None:
        """Open a queue of the interface for each pair of queues."""
        try:
            for _ in range(queues):
                self._fds += (self._queue(queues > 1),)
        except BaseException:
            self.close()
            raise

    def _queue(self, several: bool) -> int:
        import fcntl
        import struct

        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"no tap interfaces: /dev/net/tun: {error.strerror}", errno=error.errno or 0) from error
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", os.fsencode(self.name), flags))
        except OSError as error:
            os.close(fd)
            raise self._refused(error, several) from error
        return fd

    def _refused(self, error: OSError, several: bool) -> HostError:
        import errno

        queues = " multi_queue" if several else ""
        make = f"ip tuntap add dev {self.name} mode tap user $USER{queues}"
        said = {
            errno.EPERM: f"this user may not use it, or it does not exist: as root, {make}",
            errno.EBUSY: "another process uses it: give each machine a tap of its own",
            errno.EINVAL: f"it is no tap with {'several queues' if several else 'one queue'}: as root, {make}",
        }.get(error.errno or 0, error.strerror)
        return HostError(f"tap {self.name}: {said}", errno=error.errno or 0)

    def identity(self) -> str:
        """The interface on this host."""
        try:
            with open("/etc/machine-id") as file:
                host = file.read().strip()
        except OSError:
            host = ""
        return f"tap {host} {self.name}"

    def descriptors(self) -> tuple[int, ...]:
        """One a queue; the caller's from here on."""
        fds, self._fds = self._fds, ()
        return fds

    def close(self) -> None:
        """Close the queues that no device has taken."""
        for fd in self.descriptors():
            os.close(fd)
