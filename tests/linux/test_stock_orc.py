"""ORC unwinding by a stock kernel's own tables: what they say of the beginnings of functions, against the code there.

The kernel is not run. Capstone follows each function's first instructions, which say where the return address and the
caller's frame pointer are; the tables must come to the same.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import capstone
import pytest
from capstone import x86

from vmm.errors import HostError
from vmm.linux import debian
from vmm.machine import Machine
from vmm.observe import kallsyms
from vmm.observe.stack import OrcTables, _State
from vmm.observe.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.memory import GuestMemory

START_KERNEL_MAP = (
    0xFFFFFFFF80000000  # where the kernel's image has physical address 0 (Documentation/x86/x86_64/mm.rst)
)
STACK, CALLER, CALLERS_RBP = 0xFFFFC90000004000, 0xFFFFFFFF81001234, 0xFFFFC90000007770
FUNCTIONS = 2000


class KernelMemory:
    """The kernel's image by its linear addresses, and a stack."""

    def __init__(self, ram: GuestMemory) -> None:
        self._ram = ram
        self.stack: dict[int, int] = {}

    def read(self, address: int, size: int) -> bytes:
        if size == 8 and address in self.stack:
            return self.stack[address].to_bytes(8, "little")
        if address < START_KERNEL_MAP:
            raise LookupError(address)
        return self._ram.read(address - START_KERNEL_MAP, size)


def beginning(code: bytes, at: int, memory: KernelMemory) -> Iterator[_State]:
    """Where a function's registers are before each of its first instructions, until it branches or does what this does
    not follow. What it pushes is in ``memory``."""
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    disassembler.detail = True
    rsp, rbp = STACK, CALLERS_RBP
    memory.stack = {rsp: CALLER}
    for instruction in disassembler.disasm(code, at):
        yield _State(instruction.address, rsp, rbp, exact=True)
        name, operands = instruction.mnemonic, instruction.op_str
        written = {instruction.reg_name(register) for register in instruction.regs_access()[1]}
        if name == "push":
            rsp -= 8
            memory.stack[rsp] = rbp if operands == "rbp" else 0xDEAD
        elif name == "sub" and operands.startswith("rsp, ") and instruction.operands[1].type == x86.X86_OP_IMM:
            rsp -= instruction.operands[1].imm
        elif operands == "rbp, rsp" and name == "mov":
            rbp = rsp
        elif instruction.group(capstone.CS_GRP_JUMP) or instruction.group(capstone.CS_GRP_RET):
            return
        elif instruction.group(capstone.CS_GRP_CALL):
            if instruction.address != at:  # the first is that of the function tracer, and comes back
                return
        elif written & {"rsp", "rbp", "esp", "ebp", "bp", "sp", "bpl", "spl"}:
            return


def test_the_tables_of_a_stock_kernel_lead_to_the_caller_from_wherever_functions_begin() -> None:
    try:
        kernel = debian.stock_kernel("cloud")
    except HostError as error:
        pytest.skip(f"no stock kernel: {error}")
    with Machine(kernel=kernel.vmlinuz, memory="256M", rng=False) as machine:
        machine.load()
        found, memory = kallsyms.find(machine.memory), KernelMemory(machine.memory)
        assert found is not None
        symbols = Symbols(((address, 0, name) for address, _, name in found), "kallsyms")
        tables = OrcTables.of_kernel(memory, symbols)
        assert tables is not None
        first, last = (symbols.address(name) or 0 for name in ("_stext", "_etext"))
        # The compiler moves unlikely parts of functions to a place of their own: those begin in the middle.
        functions = sorted(
            {address for address, _, name in found if first <= address < last and not name.endswith(".cold")}
        )
        agreed = pushed = 0
        unsaid = []  # of assembly that is entered otherwise than by a call, the tables say that nothing can be said
        for function in random.Random(1).sample(functions, FUNCTIONS):
            for state in beginning(memory.read(function, 64), function, memory):
                step = tables.step(state, memory)
                if step is None:
                    unsaid.append(symbols.name(state.rip))
                    break
                assert step[:3] == (CALLER, STACK + 8, CALLERS_RBP), symbols.name(state.rip)
                agreed += 1
                pushed += state.rsp != STACK
        assert len(unsaid) < FUNCTIONS // 50, unsaid
        assert agreed > 5 * FUNCTIONS and pushed > 2 * FUNCTIONS
