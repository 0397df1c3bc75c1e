"""The 16550A, in Python and in C: one suite, and the same answers from both to any sequence of accesses."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices.uart import Uart
from vmm.testing.fakes import FakeConsole, FakeLine

try:
    from vmm._native import ffi, lib
except ImportError:
    ffi = lib = None  # type: ignore[assignment, misc]

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

EMPTY = 0x60
OUT2 = 0x08
ROOM = 8


class Driver(Protocol):
    """A UART, its line and its console, whichever language they are in."""

    line: FakeLine

    def __init__(self, room: int | None = ...) -> None: ...
    def read(self, offset: int, size: int = 1) -> int: ...
    def write(self, offset: int, value: int, size: int = 1) -> None: ...
    def send(self, data: bytes) -> None: ...
    def make_room(self) -> None: ...
    def sent(self) -> bytes: ...
    def reset(self) -> None: ...
    def save(self) -> Any: ...
    def load(self, state: Any) -> None: ...
    def spoil(self, state: Any, field: str, value: int) -> Any: ...


class PythonUart:
    def __init__(self, room: int | None = None) -> None:
        self.console, self.line = FakeConsole(room), FakeLine()
        self.uart = Uart(self.console)
        self.uart.line = self.line

    def read(self, offset: int, size: int = 1) -> int:
        return self.uart.read(offset, size)

    def write(self, offset: int, value: int, size: int = 1) -> None:
        self.uart.write(offset, size, value)

    def send(self, data: bytes) -> None:
        self.console.send(data)

    def make_room(self) -> None:
        self.console.make_room()

    def sent(self) -> bytes:
        return bytes(self.console.output)

    def reset(self) -> None:
        self.uart.reset()

    def save(self) -> Any:
        return self.uart.save()

    def load(self, state: Any) -> None:
        self.uart.load(state)

    def spoil(self, state: Any, field: str, value: int) -> Any:
        return {**state, field: value}


def _destroy(uart: Any, console: Any, wire: Any, drive: Any) -> None:
    lib.vmm_uart_destroy(uart)
    lib.vmm_console_destroy(console)


class CUart:
    """The C model through its public C functions; the line's ``set`` calls back into a :class:`FakeLine`."""

    def __init__(self, room: int | None = None) -> None:
        line = self.line = FakeLine()
        drive = ffi.callback(
            "void(void *, uint32_t, int)", lambda opaque, n, level: (line.raise_ if level else line.lower)()
        )
        wire = ffi.new("vmm_line *", {"set": drive, "n": 4})
        console, uart = ffi.new("vmm_console **"), ffi.new("vmm_uart **")
        assert lib.vmm_console_create(1 << 16, 1 << 16, room or 1 << 16, console) == 0
        assert lib.vmm_uart_create(wire, console[0], uart) == 0
        self.console, self.uart = console[0], uart[0]
        weakref.finalize(self, _destroy, self.uart, self.console, wire, drive)  # in this order, whoever collects us
        self._ops = lib.vmm_uart_ops()
        if room is not None:
            lib.vmm_console_set_pump(self.console, 0)

    def read(self, offset: int, size: int = 1) -> int:
        return int(self._ops.read(self.uart, offset, size))

    def write(self, offset: int, value: int, size: int = 1) -> None:
        self._ops.write(self.uart, offset, size, value)

    def send(self, data: bytes) -> None:
        assert lib.vmm_console_send(self.console, data, len(data)) == len(data)

    def make_room(self) -> None:
        lib.vmm_console_set_pump(self.console, lib.vmm_console_end(self.console))

    def sent(self) -> bytes:
        position, data = ffi.new("uint64_t *", 0), ffi.new("uint8_t[]", 1 << 16)
        n = lib.vmm_console_read(self.console, position, data, 1 << 16)
        return bytes(ffi.buffer(data, n))

    def reset(self) -> None:
        lib.vmm_uart_reset(self.uart)

    def save(self) -> Any:
        state = ffi.new("vmm_uart_state *")
        lib.vmm_uart_save(self.uart, state)
        return bytes(ffi.buffer(state))

    def load(self, state: Any) -> None:
        if lib.vmm_uart_load(self.uart, ffi.from_buffer("vmm_uart_state *", state)):
            raise ValueError("uart")

    def spoil(self, state: Any, field: str, value: int) -> Any:
        spoilt = ffi.new("vmm_uart_state *", ffi.from_buffer("vmm_uart_state *", state)[0])
        setattr(spoilt, field, value)
        return bytes(ffi.buffer(spoilt))


needs_native = pytest.mark.skipif(lib is None, reason="vmm._native is not built")
BOTH = [pytest.param(PythonUart, id="python"), pytest.param(CUart, id="c", marks=needs_native)]


@pytest.fixture(params=BOTH)
def make(request: pytest.FixtureRequest) -> type[Driver]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def uart(make: type[Driver]) -> Driver:
    return make()


def drain(uart: Driver) -> bytes:
    got = bytearray()
    while uart.read(LSR) & 1:
        got.append(uart.read(RBR))
    return bytes(got)


# -- registers -----------------------------------------------------------------------------------------------------


def test_power_on_state(uart: Driver) -> None:
    assert [uart.read(r) for r in (IER, IIR, LCR, MCR, LSR, MSR, SCR)] == [0, 1, 0, 0, EMPTY, 0xB0, 0]


def test_scratch_and_divisor_are_remembered_apart_from_data_and_ier(uart: Driver) -> None:
    uart.write(SCR, 0x5A)
    uart.write(IER, 0x05)
    uart.write(LCR, 0x83)
    uart.write(DLL, 0x0C)
    uart.write(DLM, 0x12)
    assert (uart.read(DLL), uart.read(DLM)) == (0x0C, 0x12)
    uart.write(LCR, 0x03)
    assert (uart.read(IER), uart.read(SCR), uart.read(LCR)) == (0x05, 0x5A, 0x03)
    assert uart.sent() == b""


def test_bits_that_do_not_exist_read_as_zero(uart: Driver) -> None:
    uart.write(IER, 0xFF)
    uart.write(MCR, 0xE0)
    assert (uart.read(IER), uart.read(MCR)) == (0x0F, 0)


def test_line_and_modem_status_cannot_be_written(uart: Driver) -> None:
    uart.write(LSR, 0)
    uart.write(MSR, 0)
    assert (uart.read(LSR), uart.read(MSR)) == (EMPTY, 0xB0)


def test_linux_takes_it_for_a_16550a(uart: Driver) -> None:
    """drivers/tty/serial/8250/8250_port.c, autoconfig() and autoconfig_16550a()."""
    uart.write(MCR, 0x1A)
    assert uart.read(MSR) & 0xF0 == 0x90
    uart.write(MCR, 0)
    uart.write(FCR, 0x01)
    assert uart.read(IIR) >> 6 == 3
    uart.write(FCR, 0x21)
    assert uart.read(IIR) >> 5 == 6, "bit 5 would be a 16750's 64-byte FIFO"
    uart.write(FCR, 0)
    assert uart.read(IIR) == 1


def test_wide_accesses_are_bytes_at_consecutive_registers(uart: Driver) -> None:
    uart.write(LCR, 0x0B03, 2)
    assert uart.read(LCR, 4) == 0xB0600B03
    assert uart.read(SCR, 2) == 0xFF00


# -- transmitter ---------------------------------------------------------------------------------------------------


def test_bytes_leave_in_order_and_the_transmitter_is_empty_at_once(uart: Driver) -> None:
    for byte in b"hello":
        uart.write(THR, byte)
        assert uart.read(LSR) == EMPTY
    assert uart.sent() == b"hello"


def test_thr_empty_interrupt_is_acknowledged_by_reading_iir(uart: Driver) -> None:
    uart.write(MCR, OUT2)
    uart.write(IER, 0x02)
    assert uart.line.level == 1
    assert uart.read(IIR) == 0x02
    assert (uart.read(IIR), uart.line.level) == (0x01, 0)
    uart.write(THR, 0x41)
    assert (uart.line.level, uart.read(IIR)) == (1, 0x02)


def test_thr_empty_interrupt_comes_back_when_enabled_again(uart: Driver) -> None:
    """Linux's serial8250_THRE_test: a UART that does not do this gets a timer to prod it."""
    for _ in range(2):
        uart.write(IER, 0x02)
        assert uart.read(IIR) == 0x02
        uart.write(IER, 0x02)
        assert uart.read(IIR) == 0x01, "it was enabled all along"
        uart.write(IER, 0)


def test_a_slow_reader_keeps_the_transmitter_busy_and_costs_no_byte(make: type[Driver]) -> None:
    uart = make(room=4)
    uart.write(MCR, OUT2)
    uart.write(FCR, 0x01)
    uart.write(IER, 0x02)
    for byte in range(20):  # the fifth is refused; a driver may write a FIFO's worth before it looks
        uart.write(THR, byte)
    assert uart.read(LSR) == 0
    assert (uart.line.level, uart.read(IIR)) == (0, 0xC1)
    while not uart.read(LSR) & EMPTY:
        uart.make_room()
    assert (uart.line.level, uart.read(IIR)) == (1, 0xC2)
    assert uart.sent() == bytes(range(20))


def test_break_is_accepted(uart: Driver) -> None:
    uart.write(LCR, 0x43)
    uart.write(LCR, 0x03)
    assert (uart.read(LCR), uart.read(LSR)) == (0x03, EMPTY)


# -- receiver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_data_interrupt_at_the_trigger_level_and_timeout_below_it(uart: Driver, fcr: int, trigger: int) -> None:
    uart.write(MCR, OUT2)
    uart.write(FCR, fcr)
    uart.write(IER, 0x01)
    for count in range(1, 17):
        uart.send(b"x")
        assert uart.read(IIR) == (0xC4 if count >= trigger else 0xCC)
        assert uart.line.level == 1
    for count in range(15, 0, -1):
        uart.read(RBR)
        assert uart.read(IIR) == (0xC4 if count >= trigger else 0xCC)
    uart.read(RBR)
    assert (uart.read(IIR), uart.line.level, uart.read(LSR)) == (0xC1, 0, EMPTY)


def test_a_paste_longer_than_the_fifo_arrives_whole_without_overrun(uart: Driver) -> None:
    paste = bytes(i * 7 & 0xFF for i in range(5000))
    uart.write(FCR, 0x81)
    uart.write(IER, 0x01)
    uart.send(paste)
    got = bytearray()
    while (status := uart.read(LSR)) & 1:
        assert not status & 0x1E
        got.append(uart.read(RBR))
    assert got == paste


def test_a_guest_that_only_polls_receives(uart: Driver) -> None:
    uart.send(b"ok\n")
    got = bytearray()
    for _ in range(20):
        if uart.read(LSR) & 1:
            got.append(uart.read(RBR))
    assert got == b"ok\n"


@pytest.mark.parametrize("between", [MSR, THR])
def test_a_guest_that_polls_between_other_work_receives(uart: Driver, between: int) -> None:
    """A BIOS answers LSR and MSR together; a memory tester draws its screen between two looks for a key."""
    uart.send(b"k")
    seen = False
    for _ in range(20):
        seen = seen or bool(uart.read(LSR) & 1)
        if between == THR:
            assert uart.read(LSR) & EMPTY
            uart.write(THR, 0x2E)
        else:
            uart.read(between)
    assert seen


def test_transmit_polls_are_not_taken_for_listening(uart: Driver) -> None:
    uart.send(b"k")
    for _ in range(100):
        assert uart.read(LSR) == EMPTY
        uart.write(THR, 0x2E)


@pytest.mark.parametrize("fifo", [0x00, 0x01])
def test_probing_and_clearing_before_listening_eats_no_input(uart: Driver, fifo: int) -> None:
    uart.send(b"typed ahead")
    for value in (0x01, 0x07, 0x00):
        uart.write(FCR, value)
    for register in (LSR, RBR, IIR, MSR, LSR, LSR, LSR, LSR, RBR, IIR, MSR):  # serial8250_do_startup()
        uart.read(register)
    uart.write(IER, 0x01)
    uart.write(FCR, fifo)
    uart.write(FCR, 0x07)
    assert drain(uart) == b"typed ahead"


def test_an_empty_receiver_reads_as_zero(uart: Driver) -> None:
    assert (uart.read(RBR), uart.read(LSR)) == (0, EMPTY)


# -- loopback and modem lines --------------------------------------------------------------------------------------


def test_loopback_receives_what_is_sent_and_keeps_host_and_guest_apart(uart: Driver) -> None:
    uart.write(FCR, 0x01)
    uart.write(IER, 0x01)
    uart.send(b"host")
    uart.write(MCR, 0x10)
    for byte in b"self":
        uart.write(THR, byte)
    assert drain(uart) == b"self"
    assert uart.sent() == b""
    uart.write(MCR, 0)
    assert drain(uart) == b"host"


def test_loopback_overrun_is_the_most_urgent_interrupt_until_lsr_is_read(uart: Driver) -> None:
    uart.write(FCR, 0x01)
    uart.write(MCR, 0x10)
    uart.write(IER, 0x0F)
    for byte in range(17):
        uart.write(THR, byte)
    assert uart.read(IIR) == 0xC6
    assert uart.read(LSR) == EMPTY | 3
    assert uart.read(IIR) == 0xC4
    assert drain(uart) == bytes(range(16)), "a FIFO keeps what it has"


def test_overrun_without_fifo_replaces_the_byte(uart: Driver) -> None:
    uart.write(MCR, 0x10)
    uart.write(THR, 1)
    uart.write(THR, 2)
    assert uart.read(LSR) == EMPTY | 3
    assert uart.read(RBR) == 2


def test_clearing_the_fifo_drops_looped_bytes(uart: Driver) -> None:
    uart.write(FCR, 0x01)
    uart.write(MCR, 0x10)
    uart.write(THR, 1)
    uart.write(MCR, 0)
    uart.write(FCR, 0x03)
    uart.write(IER, 0x01)
    assert drain(uart) == b""


@pytest.mark.parametrize(("output", "status"), [(0x02, 0x10), (0x01, 0x20), (0x04, 0x40), (0x08, 0x80)])
def test_loopback_feeds_each_modem_output_to_its_input(uart: Driver, output: int, status: int) -> None:
    uart.write(MCR, 0x10)
    uart.read(MSR)
    uart.write(MCR, 0x10 | output)
    rose = 0 if status == 0x40 else status >> 4  # RI tells of its trailing edge only
    assert uart.read(MSR) == status | rose
    assert uart.read(MSR) == status, "deltas are cleared by reading"
    uart.write(MCR, 0x10)
    assert uart.read(MSR) == status >> 4


def test_modem_status_interrupt_is_least_urgent_and_cleared_by_reading_msr(uart: Driver) -> None:
    uart.write(MCR, 0x10)
    uart.write(MCR, OUT2)
    uart.write(IER, 0x0A)
    assert [uart.read(IIR), uart.read(IIR), uart.line.level] == [0x02, 0x00, 1]
    assert uart.read(MSR) == 0xBB
    assert (uart.read(IIR), uart.line.level) == (0x01, 0)


def test_out2_gates_the_line_and_loopback_closes_the_gate(uart: Driver) -> None:
    uart.write(IER, 0x01)
    uart.send(b"x")
    assert (uart.read(IIR), uart.line.levels) == (0x04, [])
    uart.write(MCR, OUT2)
    assert uart.line.levels == [1]
    uart.write(MCR, OUT2 | 0x10)
    assert uart.line.levels == [1, 0]


# -- life and state ------------------------------------------------------------------------------------------------


def test_reset_lowers_the_line_and_keeps_what_the_guest_never_read(uart: Driver) -> None:
    uart.write(MCR, OUT2)
    uart.write(IER, 0x01)
    uart.send(b"abc")
    assert uart.line.level == 1
    uart.reset()
    assert (uart.line.level, uart.read(IER), uart.read(LSR)) == (0, 0, EMPTY)
    uart.write(IER, 0x01)
    assert drain(uart) == b"abc"


@pytest.mark.parametrize(
    ("field", "value"), [("ier", 0x10), ("fcr", 0x40), ("mcr", 0x20), ("lsr", 0x20), ("lsr", 0xE0), ("msr", 0)]
)
def test_states_no_uart_can_be_in_are_refused_and_change_nothing(uart: Driver, field: str, value: int) -> None:
    uart.write(SCR, 0x77)
    before = uart.save()
    with pytest.raises(ValueError, match="uart"):
        uart.load(uart.spoil(before, field, value))
    assert uart.save() == before


@pytest.mark.parametrize("state", [{}, {"version": 2}, [], None])
def test_something_else_than_a_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="uart"):
        PythonUart().load(state)


# -- any sequence --------------------------------------------------------------------------------------------------

ACCESSES = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 8), st.sampled_from([1, 1, 1, 2, 4])),
    st.tuples(st.just("write"), st.integers(0, 8), st.integers(0, 255)),
    st.tuples(st.just("write"), st.sampled_from([THR, IER, FCR, MCR]), st.sampled_from([1, 2, 3, 8, 11, 0x10, 0xC7])),
    st.tuples(st.just("burst"), st.integers(1, 12), st.integers(0, 255)),
    st.tuples(st.just("send"), st.binary(min_size=1, max_size=40), st.just(0)),
    st.tuples(st.just("room"), st.just(0), st.just(0)),
    st.tuples(st.just("poll"), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0)),
)


def apply(uart: Driver, access: tuple[str, Any, int]) -> int | None:
    what, at, value = access
    if what == "read":
        return uart.read(at, value)
    if what == "write":
        uart.write(at, value)
    elif what == "burst":
        for i in range(at):
            if uart.read(LSR) & EMPTY:
                uart.write(THR, value + i & 0xFF)
    elif what == "poll":
        return [uart.read(LSR) for _ in range(at)][-1]
    elif what == "send":
        uart.send(at)
    elif what == "room":
        catch_up(uart)
    else:
        catch_up(uart)  # a reset throws away what a transmit FIFO holds, and only one of the two has one
        uart.reset()
    return None


def catch_up(uart: Driver) -> None:
    for _ in range(64):
        uart.make_room()


@needs_native
@settings(max_examples=examples(300), deadline=None)
@given(st.lists(ACCESSES, max_size=60))
def test_both_answer_any_sequence_alike(accesses: list[tuple[str, Any, int]]) -> None:
    python, c = PythonUart(ROOM), CUart(ROOM)
    for access in accesses:
        if access[:2] == ("write", THR):
            empty = python.read(LSR) & EMPTY
            assert c.read(LSR) & EMPTY == empty  # both are read: how often LSR is polled is part of their state
            if not empty:
                catch_up(python)
                catch_up(c)
        assert apply(python, access) == apply(c, access), access
        assert python.line.levels == c.line.levels, access
    catch_up(python)
    catch_up(c)
    assert python.sent() == c.sent()


@pytest.mark.parametrize("kind", BOTH)
@settings(max_examples=examples(150), deadline=None)
@given(accesses=st.lists(ACCESSES, max_size=40))
def test_any_reachable_state_loads_and_reads_back_the_same(kind: type[Driver], accesses: Any) -> None:
    uart = kind(ROOM)
    for access in accesses:
        apply(uart, access)
    state = uart.save()
    uart.load(state)
    assert uart.save() == state
    twin = kind(None)
    twin.load(state)
    assert [twin.read(r) for r in (IER, LCR, MCR, SCR)] == [uart.read(r) for r in (IER, LCR, MCR, SCR)]
