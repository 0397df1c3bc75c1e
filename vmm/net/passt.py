"""``passt``: the guest's connections become connections of a process on the host, without privilege.

Addresses are always the same, whatever the host's: the guest is 10.0.2.15 (by DHCP, or set by hand), and what it sends
to the gateway 10.0.2.2 reaches the host's loopback. passt shuts itself in, in namespaces of its own and without a file
system, and goes when the socket to it is closed: also when we are killed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.errors import ConfigError, HostError
from vmm.net.end import End, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

COMMAND = "passt"
GUEST, NETMASK, GATEWAY = "10.0.2.15", "255.255.255.0", "10.0.2.2"

# passt is no tunnel: it ends TCP on each side, so the largest frame there is costs nothing but saves system calls.
MTU = 65520

_SOCKET = 3  # its descriptor in the child
_PORTS_UNPRIVILEGED = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


class Passt(End):
    """``hostfwd``: ``tcp:[ADDRESS]:PORT-:GUESTPORT`` or ``udp:...`` each: a port of the host (on all of its addresses
    unless one is given) that leads to one of the guest."""

    backend = "user"
    lasting = True
    mtu = MTU

    def __init__(self, hostfwd: Sequence[str] = ()) -> None:
        from vmm.parts import parse_hostfwd

        self.rules = [parse_hostfwd(rule) for rule in hostfwd]
        self._first: socket | None = None
        self._running: list[int] = []  # pidfds
        self._mtu = MTU

    def open(self, index: int, queues: int, mtu: int | None) -> None:
        """Start passt; it is ready when this returns."""
        self._mtu = mtu or MTU
        for rule in self.rules:
            _check_port(*rule[:3])
        try:
            self._first = self._start()
        except Refusal as refusal:
            raise HostError(str(refusal)) from refusal

    def command(self, pid_file: str | None = None) -> list[str]:
        """The command line."""
        words = [COMMAND, "--quiet", "--fd", str(_SOCKET), "--mtu", str(self._mtu)]
        words += ["--pid", pid_file] if pid_file else []
        words += ["--address", GUEST, "--netmask", NETMASK, "--gateway", GATEWAY]
        for protocol, flag in (("tcp", "--tcp-ports"), ("udp", "--udp-ports")):
            rules = [rule for rule in self.rules if rule[0] == protocol]
            for _, address, port, guest in rules:
                words += [flag, f"{address}/{port}:{guest}" if address else f"{port}:{guest}"]
            if not rules:  # else the ports of the other protocol are forwarded here too
                words += [flag, "none"]
        return words

    def _start(self) -> socket:
        """One more passt, which is ready and can be waited for."""
        import shutil

        folder = _folder()
        pid_file = os.path.join(folder, "pid")
        try:
            try:
                peer = self._spawn(self.command(pid_file))
            except Refusal as refusal:
                if "PID file" not in str(refusal):
                    raise
                peer = self._spawn(self.command())  # a policy of the host forbids it the file
            self._running = [pidfd for pidfd in self._running if not _ended(pidfd)]
            if (pidfd := _process_of(pid_file)) is not None:
                self._running.append(pidfd)
            return peer
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _spawn(self, words: list[str]) -> socket:
        """Its parent process ends when it is ready, or when it gives up: then it says why."""
        import socket

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        said, says = os.pipe()
        try:
            # The pipe and the socket may have each other's number in the child: by way of numbers nothing has.
            high = max(theirs.fileno(), says, _SOCKET) + 1
            actions = [
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), high),
                (os.POSIX_SPAWN_DUP2, says, 2),
                (os.POSIX_SPAWN_DUP2, high, _SOCKET),
                (os.POSIX_SPAWN_CLOSE, high),
            ]
            # A group of its own: Ctrl-C in our terminal is not for it.
            pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions, setpgroup=0, setsigmask=())
        except FileNotFoundError as error:
            ours.close()
            os.close(said)
            raise Refusal("a user network needs passt, and there is none: apt-get install passt") from error
        finally:
            theirs.close()
            os.close(says)
        _, status = os.waitpid(pid, 0)
        os.set_blocking(said, False)
        with open(said, "rb", buffering=0) as pipe:
            text = (pipe.read(65536) or b"").decode(errors="replace")
        if status:
            ours.close()
            raise Refusal(f"passt does not start: {reason(text)}")
        return ours

    def identity(self) -> str:
        """Nobody else is on this network."""
        return "user"

    def connect(self, stop: int) -> socket | None:
        """The passt that was started, or another one."""
        first, self._first = self._first, None
        return first or self._start()

    def close(self) -> None:
        """Return once every passt has ended, so that its ports are free. Connections to it are closed before."""
        from vmm.side_process import await_end

        if self._first is not None:
            self._first.close()
            self._first = None
        while self._running:
            await_end(self._running.pop())


def _folder() -> str:
    """A directory for the file with its process number, which no other user can put another number into.

    passt goes into the background by itself, so that it is no child of ours. One that root starts becomes the
    user ``nobody`` before it writes the file.
    """
    import tempfile

    try:
        folder = tempfile.mkdtemp(prefix="pyvmm-")
    except OSError as error:
        raise Refusal(f"no temporary directory ({error.strerror}): name one with room in TMPDIR") from error
    if os.geteuid() == 0:
        import pwd

        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    return folder


def _process_of(pid_file: str) -> int | None:
    """A pidfd of the process; ``None`` of one that has ended already."""
    try:
        with open(pid_file) as file:
            pid = int(file.read())
        pidfd = os.pidfd_open(pid)
        with open(f"/proc/{pid}/comm") as file:
            if file.read().startswith(COMMAND):
                return pidfd
        os.close(pidfd)
    except (OSError, ValueError):
        pass
    return None


def _ended(pidfd: int) -> bool:
    """Whether the process has ended; closes its pidfd then."""
    import select

    if not select.select([pidfd], [], [], 0)[0]:
        return False
    os.close(pidfd)
    return True


def reason(text: str) -> str:
    """What passt says of why it ends, out of all it prints, with the fix where it is known."""
    noise = ("Failed to send", "Don't run as root")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(noise)]
    if any("routable interface" in line for line in lines):
        return "the host has no interface with a default route: connect it, or use --net tap=NAME or socket=PATH"
    return lines[-1] if lines else "it does not say why; try it by hand: passt --foreground"


def _check_port(protocol: str, address: str, port: int) -> None:
    """Check that the port can be bound: passt continues silently without a port that it cannot bind."""
    import socket

    try:
        with open(_PORTS_UNPRIVILEGED) as file:
            lowest = int(file.read())
    except (OSError, ValueError):
        lowest = 1024
    if port < lowest:
        raise ConfigError(f"hostfwd of port {port}: passt has no privilege: choose a host port from {lowest} on")
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, protocol == "tcp")
            probe.bind((address, port))
    except OSError as error:
        where = f"{address or '*'}:{port}"
        raise ConfigError(f"hostfwd of {protocol} {where}: {error.strerror}: choose another host port") from error
