"""The stub with the real gdb on bare-metal guests: what a person at its prompt gets to see."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm.errors import ConfigError, HostError
from vmm.machine import Machine
from vmm.observe.gdb import GdbServer, listen, parse_option
from vmm.observe.gdb_packets import frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    GuestPath = Callable[[str], str]

pytestmark = pytest.mark.timeout(120)


def gdb(server: GdbServer, image: str, *commands: str) -> str:
    """What gdb says to these commands, once attached."""
    program = shutil.which("gdb")
    if program is None:
        pytest.skip("gdb is not installed")
    line = [program, "-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off"]
    for command in (f"target remote {server.address}", *commands):
        line += ["-ex", command]
    done = subprocess.run(
        [*line, image], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


@contextlib.contextmanager
def debugged(image: str, **fields: Any) -> Iterator[tuple[Machine, GdbServer]]:
    """A machine that stands before its first instruction, with a stub on any port."""
    settings = {"kernel": image, "memory": "16M", **fields}
    with Machine(**settings) as machine, GdbServer(machine, "127.0.0.1:0", wait=True) as server:
        machine.start()
        yield machine, server


@pytest.mark.stops("breakpoint")
def test_break_backtrace_step_and_on_to_the_end(guest: GuestPath) -> None:
    with debugged(guest("hello")) as (machine, server):
        said = gdb(server, guest("hello"), "break guest_main", "continue", "backtrace", "info registers rip", "stepi",
                   "x/i $rip", "delete", "detach")  # fmt: skip
        assert machine.wait(timeout=120).status == 33
    assert "Breakpoint 1, guest_main ()" in said
    assert "#1 " in said
    assert "start_common () at guests/lib/start64.S" in said
    assert "=> 0x" in said


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("break", marks=pytest.mark.stops("breakpoint")),
        pytest.param("hbreak", marks=pytest.mark.stops("hardware")),
    ],
)
def test_a_breakpoint_is_hit_each_time(guest: GuestPath, command: str) -> None:
    with debugged(guest("hello")) as (machine, server):
        said = gdb(server, guest("hello"), f"{command} guest_main", "continue",
                   "set $rip = &start_common", "continue", "set $rip = &start_common", "continue", "kill")  # fmt: skip
        assert machine.wait(timeout=120).reason == "stopped"
    assert said.count("Breakpoint 1, guest_main ()") == 3


@pytest.mark.stops("breakpoint")
def test_gdb_sees_registers_and_memory_and_changes_them(guest: GuestPath) -> None:
    with debugged(guest("hello")) as (machine, server):
        said = gdb(
            server, guest("hello"), "break guest_main", "continue",
            "set $rax = 0x1122334455667788", "p/x $rax", "p/x $eax",
            "set $xmm3.uint128 = 77", "p $xmm3.uint128", "set $mxcsr = 0x1f80", "p $eflags", "p/x $cs", "p/x $efer",
            "set {long}0x200000 = 0x5a5a", "x/1gx 0x200000", "p/x *(char*)0xffff800000000000", "x/1bx guest_main",
            "detach",
        )  # fmt: skip
        assert machine.wait(timeout=120).status == 33
    assert "$1 = 0x1122334455667788" in said
    assert "$2 = 0x55667788" in said
    assert "$3 = 77" in said
    assert "$6 = 0x500" in said  # LME and LMA
    assert "0x0000000000005a5a" in said
    assert "Cannot access memory at address 0xffff800000000000" in said
    assert "0xcc" not in said  # its own breakpoint is not shown


@pytest.mark.stops("breakpoint", "write")
def test_a_watchpoint_stops_where_the_variable_is_written(guest: GuestPath) -> None:
    with debugged(guest("irq")) as (machine, server):
        said = gdb(server, guest("irq"), "break guest_main", "continue", "watch trap_handlers[0x20]", "continue",
                   "info watchpoints", "delete", "detach")  # fmt: skip
        machine.wait(timeout=120)
    assert "Hardware watchpoint 2: trap_handlers[0x20]" in said
    assert "Old value = " in said and "New value = " in said
    assert "breakpoint already hit 1 time" in said


@pytest.mark.stops("hardware")
def test_gdb_uses_every_debug_register(guest: GuestPath) -> None:
    with debugged(guest("hello")) as (machine, server):
        slots = machine.debug.slots
        nowhere = [f"hbreak *{0x200000 + offset:#x}" for offset in range(slots - 1)]
        breaks = ["hbreak guest_main", *nowhere]
        said = gdb(server, guest("hello"), *breaks, "continue", "hbreak guest_exit", "continue", "kill")
        assert machine.wait(timeout=120).reason == "stopped"
    assert "Breakpoint 1, guest_main ()" in said
    assert f"Cannot insert hardware breakpoint {slots + 1}" in said


@pytest.mark.stops("breakpoint")
def test_all_vcpus_are_threads(guest: GuestPath) -> None:
    with debugged(guest("smp"), cpus=3, append="cpus=3") as (machine, server):
        said = gdb(server, guest("smp"), "info threads", "break guest_main", "continue", "thread apply all p $rip",
                   "thread 3", "delete", "detach")  # fmt: skip
        assert machine.wait(timeout=120).status == 33, machine.console.transcript
    for number in (1, 2, 3):
        assert f"Thread {number} (vCPU {number - 1})" in said
    assert "Switching to thread 3" in said


@pytest.mark.stops("breakpoint")
def test_a_breakpoint_on_another_vcpu_is_reported_for_it(guest: GuestPath) -> None:
    with debugged(guest("smp"), cpus=2, append="cpus=2") as (machine, server):
        said = gdb(server, guest("smp"), "break idt_load", "continue", "info threads",
                   "continue", "info threads", "delete", "detach")  # fmt: skip
        assert machine.wait(timeout=120).status == 33
    assert "* 2    Thread 2 (vCPU 1)" in said


@pytest.mark.parametrize(
    ("name", "kind", "cr0"),
    [("hello_real.bin", "flat", 0), ("multiboot", "multiboot", 1), ("hello_protected", "pvh", 1)],
)
def test_code_of_16_and_32_bits_is_stepped_and_seen(guest: GuestPath, name: str, kind: str, cr0: int) -> None:
    with debugged(guest(name), kind=kind) as (machine, server):
        elf = guest(name.removesuffix(".bin"))
        said = gdb(
            server, elf, "p/x $cr0 & 1", "p/x $esp", "stepi", "stepi", "x/2i $eip", "info registers eip cs", "detach"
        )
        assert machine.wait(timeout=120).status == 33
    assert f"$1 = 0x{cr0:x}" in said
    assert "eip " in said and "truncated" not in said
    assert "error" not in said.lower()


def test_a_guest_that_exits_ends_gdb_s_program_with_its_status(guest: GuestPath) -> None:
    with debugged(guest("hello")) as (machine, server):
        said = run_to_the_end(machine, server, guest("hello"))
    assert "exited with code 041" in said  # octal for 33


def run_to_the_end(machine: Machine, server: GdbServer, image: str) -> str:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(gdb, server, image, "continue")
        assert machine.wait(timeout=120).status == 33
        server.close()
        return said.result(60)


# ---- without gdb: the life of a connection ----


def connect(server: GdbServer) -> socket.socket:
    name, port = server.address.rsplit(":", 1)
    return socket.create_connection((name, int(port)), timeout=10)


def ask(client: socket.socket, payload: bytes) -> bytes:
    client.sendall(frame(payload))
    return answer(client)


def answer(client: socket.socket) -> bytes:
    data = b""
    while data.count(b"#") == 0 or len(data) < data.index(b"#") + 3:
        part = client.recv(4096)
        assert part, data
        data = (data + part).lstrip(b"+")
    client.sendall(b"+")
    return data[1 : data.index(b"#")]


@pytest.mark.stops("breakpoint")
def test_a_client_that_vanishes_leaves_a_machine_that_another_finds_standing(guest: GuestPath) -> None:
    with debugged(guest("spin")) as (machine, server):
        for _ in range(3):
            with connect(server) as client:
                assert ask(client, b"?").startswith(b"T05")
                rip = ask(client, b"p10")
                assert ask(client, b"Z0,100000,1") == b"OK"
        deadline = time.monotonic() + 60
        while machine.memory.planted:  # the server hears of a client's end when it comes to it
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with connect(server) as client:
            assert ask(client, b"p10") == rip
            assert ask(client, b"D") == b"OK"
        machine.stop()


def test_attaching_to_a_running_guest_stops_it_and_an_interrupt_too(guest: GuestPath) -> None:
    with Machine(kernel=guest("spin"), memory="16M") as machine, GdbServer(machine, "127.0.0.1:0") as server:
        machine.start()
        time.sleep(0.05)
        with connect(server) as client:
            assert ask(client, b"?").startswith(b"T05")
            first = ask(client, b"g")
            assert ask(client, b"g") == first
            client.sendall(frame(b"c"))
            time.sleep(0.05)
            client.sendall(b"\x03")
            assert answer(client).startswith(b"T02thread:1;")
            assert ask(client, b"vCont;s:1;c").startswith(b"T05thread:1;")
        machine.stop()


def test_the_stub_s_packets_are_refused_as_the_protocol_says(guest: GuestPath) -> None:
    with debugged(guest("spin")) as (machine, server), connect(server) as client:
        unsupported, memory, wrong = b"", b"E0e", b"E16"
        for request, expected in [
            (b"vMustReplyEmpty", unsupported), (b"!", unsupported), (b"Z9,0,1", unsupported), (b"qFnord", unsupported),
            (b"m8000000000000000,8", memory), (b"Mffff800000000000,1:00", memory),
            (b"m", wrong), (b"mxyz,1", wrong), (b"m0,-1", wrong), (b"G00", wrong), (b"Pffff=0", wrong), (b"p7f", wrong),
            (b"M0,2:00", wrong), (b"X0,2:a", wrong), (b"Hg99", wrong), (b"T63", wrong), (b"vCont;x", wrong),
            (b"vCont;c:99", wrong), (b"qXfer:features:read:other.xml:0,10", b"E00"),
        ]:  # fmt: skip
            assert ask(client, request) == expected, request
        assert ask(client, b"m0,0") == b""
        assert ask(client, b"qSupported:swbreak+").startswith(b"PacketSize=4000;")
        assert machine.stop().reason == "stopped"


@pytest.mark.stops("breakpoint", "write")
def test_points_that_cannot_be_are_refused_by_what_they_lack(guest: GuestPath) -> None:
    with debugged(guest("spin")) as (machine, server), connect(server) as client:
        assert ask(client, b"Z0,ffff800000000000,1") == b"E0e"  # memory
        assert ask(client, b"Z2,0,100") == b"E1c"  # room
        machine.stop()


def test_a_wrong_checksum_is_asked_for_again(guest: GuestPath) -> None:
    with debugged(guest("spin")) as (machine, server), connect(server) as client:
        client.sendall(b"$?#00")
        assert client.recv(1) == b"-"
        client.sendall(b"$?#3f")
        assert client.recv(1) == b"+"
        machine.stop()


# ---- 64-bit symbols of an image that is entered in 32-bit mode ----


@pytest.mark.parametrize("given", ["symbols", "arch"])
def test_an_image_entered_in_32_bit_mode_is_debugged_with_64_bit_symbols(guest: GuestPath, given: str) -> None:
    image, symbols = guest("hello_protected"), guest("hello")
    with (
        Machine(kernel=image, memory="16M", symbols=symbols if given == "symbols" else None) as machine,
        GdbServer(machine, "127.0.0.1:0", wait=True, wide=True if given == "arch" else None) as server,
    ):
        machine.start()
        said = gdb(server, symbols, "info registers rip", "p $r15", "stepi", "kill")
        assert machine.wait(timeout=120).reason == "stopped"
    assert "Truncated register" not in said and "$1 = 0" in said and "rip " in said


def test_an_image_entered_in_32_bit_mode_is_i386_otherwise(guest: GuestPath) -> None:
    with debugged(guest("hello_protected")) as (machine, server):
        said = gdb(server, guest("hello_protected"), "info registers eip", "p $r15", "kill")
        assert machine.wait(timeout=120).reason == "stopped"
    assert "eip " in said and "$1 = void" in said


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_a_restored_machine_is_described_as_what_it_is(flat: Any, mode: str, tmp_path: Path) -> None:
    with flat(b"\xeb\xfe", mode=mode) as machine:
        machine.start()
        machine.snapshot(tmp_path / "snap").close()
        machine.stop()
    with Machine.restore(tmp_path / "snap") as again, GdbServer(again, "127.0.0.1:0", wait=True) as server:
        with connect(server) as client:
            description = ask(client, b"qXfer:features:read:target.xml:0,1000")
            assert (b"i386:x86-64" in description) == (mode == "long"), description
            again.start()
        again.stop()


# ---- addresses ----


def test_a_unix_socket_is_made_and_removed(guest: GuestPath, tmp_path: Path) -> None:
    path = str(tmp_path / "gdb.sock")
    with Machine(kernel=guest("spin"), memory="16M") as machine:
        for _ in range(2):
            with GdbServer(machine, path, wait=False) as server:
                assert server.address == path
                assert Path(path).is_socket()
            assert not Path(path).exists()


def test_the_socket_of_another_machine_is_not_taken_over(guest: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "gdb.sock"
    with Machine(kernel=guest("spin"), memory="16M") as machine, GdbServer(machine, str(path)):
        before = path.stat().st_ino
        with Machine(kernel=guest("spin"), memory="16M") as other, pytest.raises(ConfigError, match="is running"):
            GdbServer(other, str(path))
        assert path.stat().st_ino == before


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:65536", "1.2.3:x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="PORT, HOST:PORT or the path"):
        listen(address)


def test_a_port_that_is_taken_is_refused_with_a_way_out() -> None:
    with listen("127.0.0.1:0") as first, pytest.raises(HostError, match="choose another"):
        listen(f"127.0.0.1:{first.getsockname()[1]}")


def test_the_option_names_an_address_and_whether_to_wait() -> None:
    assert parse_option("127.0.0.1:1234") == ("127.0.0.1:1234", True, None)
    assert parse_option("5000,nowait") == ("5000", False, None)
    assert parse_option("5000,arch=x86-64,nowait") == ("5000", False, True)
    assert parse_option("5000,arch=i386") == ("5000", True, False)
    for text in ("5000,later", "5000,arch=arm", "5000,arch=i386,arch=x86-64"):
        with pytest.raises(ConfigError, match="only ,nowait and one of arch=i386, arch=x86-64"):
            parse_option(text)
    assert parse_option("a,,b.sock,nowait") == ("a,b.sock", False, None)
