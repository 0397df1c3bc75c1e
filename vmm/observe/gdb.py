"""A remote stub for GDB: ``target remote`` to a machine (GDB manual, appendix E, all-stop mode).

One thread, which sleeps until a client, the debugger or the end of the machine has something for it. Every vCPU is a
thread, numbered from 1. Replies follow the protocol: unknown packets get an empty packet,
wrong ones with an error; none of it hurts the machine beyond what a debugger may do to it, which is everything.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm import slow_reader
from vmm.errors import ConfigError, HostError, VmmError
from vmm.fields import split_commas
from vmm.observe.gdb_packets import INTERRUPT, PACKET_SIZE, Reader, frame
from vmm.observe.gdb_registers import Registers
from vmm.private_socket import PrivateSocket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from vmm.cpu.debug import Point, Stop
    from vmm.cpu.vcpu import Vcpu
    from vmm.observe.subject import Debugged

DEFAULT_ADDRESS = "127.0.0.1:1234"

# Errors of the protocol carry a number; GDB shows it. These are errno values.
_BAD_ADDRESS, _BAD_REQUEST, _NO_ROOM = b"E0e", b"E16", b"E1c"
_SIGINT, _SIGTRAP = 2, 5
_EFER_LMA = 1 << 10
_KINDS = {0: "breakpoint", 1: "hardware", 2: "write", 3: "access", 4: "access"}


def listen(address: str) -> socket.socket:
    """A listening socket on ``PORT`` or ``HOST:PORT`` (port 0: any).

    Raises :class:`~vmm.errors.ConfigError` or :class:`~vmm.errors.HostError`.
    """
    import socket

    host, colon, port = address.rpartition(":")
    try:
        if not port.isdigit() or int(port) > 0xFFFF:
            raise ConfigError(f"--gdb {address}: give PORT, HOST:PORT or the path of a UNIX socket")
        place = (host.strip("[]") if colon and host else "127.0.0.1", int(port))
        server = socket.create_server(place, family=socket.AF_INET6 if ":" in place[0] else socket.AF_INET)
        server.listen(1)
    except OSError as error:
        raise HostError(f"cannot listen for gdb on {address} ({error.strerror or error}): choose another") from error
    return server


def _answer_at_once(client: socket.socket) -> None:
    """Small packets back and forth: none is to wait for the acknowledgement of another (Nagle)."""
    import socket

    if client.family != socket.AF_UNIX:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _is_wide(machine: Debugged) -> bool:
    """Return whether the target description is x86-64's.

    It is if the guest starts in long mode or has got there, which a restored machine's registers show; or if its image
    or its symbols are for long mode (ELF class 2), as with a kernel that is entered in 32-bit mode and switches to
    64-bit mode.
    """
    entry = machine.load()
    if entry.mode == "long" or _in_long_mode(machine):
        return True
    paths = {machine.config.kernel, machine.config.symbols, entry.symbols}
    return any(map(_is_elf64, filter(os.path.isfile, filter(None, paths))))


def _in_long_mode(machine: Debugged) -> bool:
    machine.pause()
    try:
        return any(vcpu.registers()["efer"] & _EFER_LMA for vcpu in machine.vcpus)
    finally:
        machine.resume()


def _is_elf64(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(5) == b"\x7fELF\x02"


class GdbServer:
    """Serves one client at a time on ``address`` until :meth:`close`.

    ``address``: ``PORT``, ``HOST:PORT`` or the path of a UNIX socket (:mod:`vmm.private_socket`). ``wait``: the machine
    does not execute its first instruction until a client lets it. ``wide``: describe x86-64, or i386
    (``False``); ``None``: as the image and its symbols have it. Raises :class:`~vmm.errors.ConfigError` or
    :class:`~vmm.errors.HostError`.
    """

    def __init__(
        self, machine: Debugged, address: str = DEFAULT_ADDRESS, *, wait: bool = False, wide: bool | None = None
    ) -> None:
        self._named = PrivateSocket(address, f"cannot listen for gdb on {address}", 1) if "/" in address else None
        self._listener = self._named.socket if self._named is not None else listen(address)
        self._machine = machine
        self._debug = machine.debug
        self._debug.on_stop = self._stopped
        self._registers = Registers(_is_wide(machine) if wide is None else wide)
        self._stops: deque[Stop] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._standing = wait
        if wait:
            machine.pause()
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """What GDB's ``target remote`` takes."""
        if self._named is not None:
            return self._named.path
        name = self._listener.getsockname()
        return f"{name[0]}:{name[1]}"

    def __enter__(self) -> GdbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Report the machine's end to the client, if it has ended, and stop serving. Idempotent; before the
        machine is closed."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        if self._named is not None:
            self._named.close()
        self._listener.close()
        os.close(self._wake)

    def _stopped(self, stop: Stop) -> None:
        self._stops.append(stop)
        os.eventfd_write(self._wake, 1)

    # ---- the thread ----

    def _serve(self) -> None:
        sources: list[Any] = [self._listener, self._wake]
        while not self._closing:
            ready = select.select(sources, [], [])[0]
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                while self._stops:  # no client is connected: its breakpoint was removed
                    self._debug.forget(self._stops.popleft())
                    self._machine.resume()
            elif not self._closing:
                client, _ = self._listener.accept()
                with client:
                    client.settimeout(slow_reader.PATIENCE)  # one that does not read keeps nothing from ending
                    _answer_at_once(client)
                    self._client(client)

    def _client(self, client: socket.socket) -> None:
        if not self._standing:
            self._machine.pause()
            self._standing = True
        session = Session(self._machine, self._registers, client)
        sources: list[Any] = [client, self._wake]
        try:
            while not self._closing and not session.over:
                ready = select.select(sources, [], [])[0]
                if self._wake in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                    while self._stops:
                        session.stopped(self._stops.popleft())
                if client in ready:
                    session.receive()
            if self._machine.outcome is not None and not session.over:
                session.send(b"W%02x" % (self._machine.outcome.status & 0xFF))
        except OSError:
            pass  # the client is gone
        finally:
            session.leave()
            self._standing = session.standing


class Session:
    """One client: its breakpoints, its selected vCPU, and the replies to its packets."""

    def __init__(self, machine: Debugged, registers: Registers, client: socket.socket) -> None:
        self.standing = True
        self.over = False
        self._machine = machine
        self._debug = machine.debug
        self._registers = registers
        self._socket = client
        self._reader = Reader()
        self._points: dict[tuple[int, int, int], list[Point]] = {}
        self._vcpu: Vcpu = machine.vcpus[0]
        self._last = b"T05thread:1;"
        self._features: set[bytes] = set()
        self._commands: dict[bytes, Callable[[bytes], bytes | None]] = {
            b"?": lambda _: self._last,
            b"g": self._read_registers,
            b"G": self._write_registers,
            b"p": self._read_register,
            b"P": self._write_register,
            b"m": self._read_memory,
            b"M": self._write_memory,
            b"X": self._write_binary,
            b"H": self._choose_thread,
            b"T": lambda data: b"OK" if self._thread(data) else _BAD_REQUEST,
            b"Z": self._insert,
            b"z": self._remove,
            b"c": lambda data: self._go_from(data, {}),
            b"C": lambda data: self._go_from(data.partition(b";")[2], {}),
            b"s": lambda data: self._go_from(data, {self._vcpu: "s"}),
            b"S": lambda data: self._go_from(data.partition(b";")[2], {self._vcpu: "s"}),
            b"D": self._detach,
            b"k": self._kill,
            b"q": self._query,
            b"Q": self._set,
            b"v": self._verb,
        }

    # ---- bytes ----

    def send(self, payload: bytes) -> None:
        """One packet to the client."""
        self._socket.sendall(frame(payload))

    def receive(self) -> None:
        """Answer what has come. A client that is gone ends the session."""
        data = self._socket.recv(PACKET_SIZE)
        if not data:
            self.over = True
            return
        packets, acknowledgement = self._reader.feed(data)
        if acknowledgement:
            self._socket.sendall(acknowledgement)
        for packet in packets:
            answer = self._interrupt() if packet == INTERRUPT else self._answer(packet)
            if answer is not None:
                self.send(answer)
            if self.over:
                return

    def _answer(self, packet: bytes) -> bytes | None:
        if not packet:
            return b""
        if not self.standing and packet[:1] not in (b"q", b"D", b"k", b"v"):
            return _BAD_REQUEST  # all-stop: only an interrupt is awaited while the machine runs
        command = self._commands.get(packet[:1])
        try:
            return command(packet[1:]) if command else b""
        except IndexError:  # memory that is not there (LinearMemoryError, GuestMemoryError)
            return _BAD_ADDRESS
        except ConfigError:
            return _NO_ROOM
        except (ValueError, VmmError):
            return _BAD_REQUEST

    # ---- registers and memory ----

    def _read_registers(self, _: bytes) -> bytes:
        return b"".join(self._registers.read(self._vcpu)).hex().encode()

    def _write_registers(self, data: bytes) -> bytes:
        self._registers.write(self._vcpu, self._registers.split(bytes.fromhex(data.decode())))
        return b"OK"

    def _read_register(self, data: bytes) -> bytes:
        number = _number(data)
        values = self._registers.read(self._vcpu)
        if not 0 <= number < len(values):
            return _BAD_REQUEST
        return values[number].hex().encode()

    def _write_register(self, data: bytes) -> bytes:
        number, _, value = data.partition(b"=")
        at = _number(number)
        if not 0 <= at < len(self._registers.table):
            return _BAD_REQUEST
        self._registers.write(self._vcpu, {at: bytes.fromhex(value.decode())})
        return b"OK"

    def _read_memory(self, data: bytes) -> bytes:
        address, size = self._range(data)
        size = min(size, PACKET_SIZE // 2)
        memory = self._vcpu.memory
        return memory.read(address, memory.readable(address, size) or size).hex().encode()

    def _write_memory(self, data: bytes) -> bytes:
        where, _, content = data.partition(b":")
        return self._store(where, bytes.fromhex(content.decode()))

    def _write_binary(self, data: bytes) -> bytes:
        where, _, content = data.partition(b":")
        return self._store(where, content)

    def _store(self, where: bytes, content: bytes) -> bytes:
        address, size = self._range(where)
        if size != len(content):
            return _BAD_REQUEST
        self._vcpu.memory.write(address, content)
        return b"OK"

    def _range(self, data: bytes) -> tuple[int, int]:
        address, _, size = data.partition(b",")
        return _number(address), _number(size)

    # ---- threads ----

    def _thread(self, data: bytes) -> Vcpu | None:
        """The vCPU of a thread id; ``0`` and ``-1`` mean any."""
        number = int(data or b"0", 16)
        if number in (0, -1):
            return self._vcpu
        return self._machine.vcpus[number - 1] if 0 < number <= len(self._machine.vcpus) else None

    def _choose_thread(self, data: bytes) -> bytes:
        vcpu = self._thread(data[1:])
        if vcpu is None or data[:1] not in (b"g", b"c"):
            return _BAD_REQUEST
        if data[:1] == b"g":
            self._vcpu = vcpu
        return b"OK"

    # ---- points ----

    def _place(self, data: bytes) -> tuple[int, int, int]:
        kind, address, size = data.split(b";")[0].split(b",")[:3]
        return _number(kind), _number(address), _number(size)

    def _insert(self, data: bytes) -> bytes:
        place = kind, address, size = self._place(data)
        if kind not in _KINDS:
            return b""
        if place in self._points:
            return b"OK"
        made: list[Point] = []
        try:
            if kind < 2:
                made.append(self._debug.breakpoint(address, hardware=kind == 1, vcpu=self._vcpu))
            else:
                for start, length in _aligned(address, size):
                    made.append(self._debug.watch(start, length, reads=kind != 2))
        except VmmError:
            for point in made:
                point.remove()
            raise
        self._points[place] = made
        return b"OK"

    def _remove(self, data: bytes) -> bytes:
        place = self._place(data)
        if place[0] not in _KINDS:
            return b""
        for point in self._points.pop(place, ()):
            point.remove()
        return b"OK"

    # ---- running ----

    def _go_from(self, address: bytes, actions: dict[Vcpu, str]) -> bytes | None:
        if address:
            self._vcpu.set_registers(rip=_number(address))
        return self._go(actions, "c")

    def _go(self, actions: dict[Vcpu, str], others: str) -> bytes | None:
        """Let vCPUs go: "c" on, "s" for a step, "" not at all. The reply is sent when the vCPU stops."""
        if not self.standing:
            return _BAD_REQUEST
        chosen = {vcpu: actions.get(vcpu, others) for vcpu in self._machine.vcpus}
        self.standing = False
        try:
            self._debug.go(
                step=[vcpu for vcpu, action in chosen.items() if action == "s"],
                hold=[vcpu for vcpu, action in chosen.items() if not action],
            )
        except HostError as error:
            self.standing = True
            self.send(b"O" + f"pyvmm: {error}\n".encode().hex().encode())
            return self._last
        return None

    def stopped(self, stop: Stop) -> None:
        """The machine has come to a stop of its own."""
        if self.standing:  # after an interrupt that was faster: the vCPU runs into it again
            self._debug.forget(stop)
            self._machine.resume()
            return
        self.standing = True
        self._vcpu = stop.vcpu
        why = b""
        if stop.kind in ("write", "access"):
            why = b"%s:%x;" % (b"watch" if stop.kind == "write" else b"awatch", stop.address)
        elif stop.kind != "step" and b"swbreak+" in self._features:
            why = b"swbreak:;" if stop.kind == "breakpoint" else b"hwbreak:;"
        self._last = b"T%02xthread:%x;%s" % (_SIGTRAP, stop.vcpu.number + 1, why)
        self.send(self._last)

    def _interrupt(self) -> bytes | None:
        if self.standing:
            return None
        self._machine.pause()
        self.standing = True
        self._last = b"T%02xthread:%x;" % (_SIGINT, self._vcpu.number + 1)
        return self._last

    def leave(self) -> None:
        """Handle a disconnected client: remove its breakpoints; a stopped machine stays stopped for the next client."""
        for points in self._points.values():
            for point in points:
                point.remove()
        self._points.clear()

    def _detach(self, _: bytes) -> bytes | None:
        self.leave()
        self.over = True
        self.send(b"OK")
        if self.standing:
            self.standing = False
            self._debug.go()
        return None

    def _kill(self, _: bytes) -> bytes | None:
        self.over = True
        self._machine.interrupt(0)
        return None

    # ---- the rest of the protocol ----

    def _query(self, data: bytes) -> bytes:
        name, _, rest = data.partition(b":")
        if name == b"Supported":
            self._features = set(rest.split(b";"))
            return (
                b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+" % PACKET_SIZE
            )
        if name == b"Xfer":
            return self._transfer(rest)
        if data.startswith(b"ThreadExtraInfo,"):
            vcpu = self._thread(data.partition(b",")[2])
            return f"vCPU {vcpu.number}".encode().hex().encode() if vcpu else _BAD_REQUEST
        threads = b",".join(b"%x" % (vcpu.number + 1) for vcpu in self._machine.vcpus)
        answers = {
            b"C": b"QC%x" % (self._vcpu.number + 1),
            b"Attached": b"1",
            b"fThreadInfo": b"m" + threads,
            b"sThreadInfo": b"l",
        }
        return answers.get(name, b"")

    def _transfer(self, data: bytes) -> bytes:
        what = data.split(b":")
        if what[:3] != [b"features", b"read", b"target.xml"] or len(what) != 4:
            return b"E00" if what[:2] == [b"features", b"read"] else b""
        start, size = self._range(what[3])
        text = self._registers.description()
        part = text[start : start + min(size, PACKET_SIZE // 2)]
        return (b"m" if start + len(part) < len(text) else b"l") + part

    def _set(self, data: bytes) -> bytes | None:
        if data != b"StartNoAckMode":
            return b""
        self.send(b"OK")
        self._reader.acknowledge = False
        return None

    def _verb(self, data: bytes) -> bytes | None:
        if data == b"Cont?":
            return b"vCont;c;C;s;S"
        if data.startswith(b"Cont;"):
            return self._continue(data[5:])
        if data.startswith(b"Kill"):
            self.send(b"OK")
            return self._kill(data)
        return b""

    def _continue(self, data: bytes) -> bytes | None:
        """``action[:thread]`` joined by ``;``; the first that fits a thread is its own."""
        actions: dict[Vcpu, str] = {}
        others = ""
        for part in data.split(b";"):
            action, colon, thread = part.partition(b":")
            kind = action[:1].lower().decode()
            if kind not in ("c", "s"):
                return _BAD_REQUEST
            if not colon or int(thread, 16) == -1:
                others = kind
                break
            vcpu = self._thread(thread)
            if vcpu is None:
                return _BAD_REQUEST
            actions.setdefault(vcpu, kind)
        return self._go(actions, others)


def _number(text: bytes) -> int:
    """A hexadecimal number of the protocol; ``ValueError`` for what is none."""
    number = int(text, 16)
    if number < 0:
        raise ValueError(text)
    return number


def _aligned(address: int, size: int) -> Iterator[tuple[int, int]]:
    """[address, address+size) in pieces that debug registers can watch."""
    while size > 0:
        length = next(n for n in (8, 4, 2, 1) if n <= size and address % n == 0)
        yield address, length
        address, size = address + length, size - length


class Option(NamedTuple):
    """``--gdb``'s: what :class:`GdbServer` takes."""

    address: str
    wait: bool
    wide: bool | None


def parse_option(text: str) -> Option:
    """``[ADDR][,nowait][,arch=i386|x86-64]`` of ``--gdb``. Raises :class:`~vmm.errors.ConfigError`."""
    address, *options = split_commas(text)
    architectures = [_ARCHITECTURES[option] for option in options if option in _ARCHITECTURES]
    if len(architectures) > 1 or not all(option == "nowait" or option in _ARCHITECTURES for option in options):
        raise ConfigError(
            f"--gdb {text}: after the address there are only ,nowait and one of {', '.join(_ARCHITECTURES)}; write a "
            "comma in a path twice"
        )
    return Option(address or DEFAULT_ADDRESS, "nowait" not in options, architectures[0] if architectures else None)


_ARCHITECTURES = {"arch=i386": False, "arch=x86-64": True}

__all__ = ["DEFAULT_ADDRESS", "GdbServer", "Session", "listen", "parse_option"]
