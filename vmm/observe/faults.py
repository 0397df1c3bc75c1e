"""Why a processor could not execute the instruction it stopped at: the exception, its cause, and what shows it.

Worked out from registers, page tables and code alone, in the order in which the processor finds faults: fetching
the instruction, decoding it, its privilege, its operands, the stack it uses, where it leads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.observe.descriptors import bad_selector
from vmm.observe.processor import PAGE, Processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.cpu.paging import PageFault

DE, UD, NM, NP, GP, PF = 0, 6, 7, 11, 13, 14

_CR0_EM, _CR0_TS, _CR4_OSFXSR, _CR4_OSXSAVE = 1 << 2, 1 << 3, 1 << 9, 1 << 18

_FRAME_MAX = 1 << 20  # how far from the stack pointer an access is still one to the stack
_SLIDE = 64  # so many bytes of zeroes right below RIP were run through

# instructions that raise an exception when all is well
_ON_PURPOSE = {"ud0": UD, "ud1": UD, "ud2": UD, "int3": 3, "int1": 1, "into": 4}
# and those that only CPL 0 may execute (SDM vol. 3, 5.9)
_PRIVILEGED = frozenset({"hlt", "lgdt", "lidt", "lldt", "ltr", "lmsw", "clts", "invd", "wbinvd", "invlpg", "rdmsr",
                         "wrmsr", "sysexit", "sysexitq", "sysret", "sysretq", "swapgs", "xsetbv"})  # fmt: skip
_NO_ACCESS = frozenset({"lea", "nop", "endbr64", "endbr32", "invlpg", "prefetchw", "prefetchnta", "prefetcht0"})
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
# MSRs that hold an address, which must be canonical (SDM vol. 2, WRMSR)
_ADDRESS_MSRS = {0x175: "SYSENTER_ESP", 0x176: "SYSENTER_EIP", 0xC0000082: "LSTAR", 0xC0000083: "CSTAR",
                 0xC0000100: "FS_BASE", 0xC0000101: "GS_BASE", 0xC0000102: "KERNEL_GS_BASE"}  # fmt: skip
_EFER, _EFER_DEFINED = 0xC0000080, 0xFD01


class Fault(NamedTuple):
    """An exception and its cause (an identifier of ``vmm.observe.diagnose.CAUSES``), said in ``text``.

    ``intended``: the instruction raises it by design, so the fault lies in the missing handler.
    ``address``: what a page fault loads into CR2.
    """

    cause: str
    vector: int
    text: str
    intended: bool = False
    address: int | None = None


class Names(NamedTuple):
    """What the machine knows besides: ``of(address)`` shows an address with its symbol; ``msr(index)`` says whether
    the processor has such a register."""

    of: Callable[[int], str]
    msr: Callable[[int], bool]


def find(cpu: Processor, names: Names) -> Fault | None:
    """The fault of the instruction at RIP, or ``None``: nothing is seen to be wrong with it."""
    code, missing = cpu.fetch(cpu.rip)
    if not code and missing:
        return _fetch_fault(cpu, cpu.rip, missing, names)
    if not any(code):
        return Fault("zeroes", PF, f"it executes zeroes at {names.of(cpu.rip)}: no code is there")
    insn = decode(cpu, code)
    if insn is None:
        if missing and len(code) < 15:
            return _fetch_fault(cpu, missing.linear, missing, names)
        return Fault("invalid-opcode", UD, f"the bytes {code[:4].hex(' ')} at {names.of(cpu.rip)} are no instruction")
    where = f"{insn.mnemonic} {insn.op_str}".strip() + f" at {names.of(cpu.rip)}"
    for check in (_raised, _privilege, _disabled, _registers, _arithmetic, _memory, _stack, _branch):
        fault = check(cpu, insn, where, names)
        if fault:
            return fault
    return None


def decode(cpu: Processor, code: bytes) -> Any:
    """The first instruction of ``code`` at RIP (capstone, with details), or ``None``."""
    import capstone

    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32}.get(cpu.bits, capstone.CS_MODE_64)
    engine = capstone.Cs(capstone.CS_ARCH_X86, mode)
    engine.detail = True
    return next(engine.disasm(code, cpu.rip, 1), None)


# ---- fetching ----


def _fetch_fault(cpu: Processor, at: int, missing: PageFault, names: Names) -> Fault:
    # Zeroes are instructions of two bytes: they lead on to the first page without code.
    before = cpu.read(at - _SLIDE, _SLIDE) if at % PAGE < 2 and missing.kind in ("not-present", "not-ram") else None
    if before is not None and not any(before):
        return Fault("zeroes", PF, f"it ran through zeroes up to {names.of(at)}: {missing.detail}", address=at)
    if missing.kind == "non-canonical":
        return Fault("non-canonical-jump", GP, f"RIP is {at:#x}, which is {missing.detail}")
    if missing.kind == "not-ram":
        return Fault("no-code", PF, f"RIP {at:#x} is {missing.detail}: there is no code to execute")
    return _page_fault(cpu, missing, f"fetching the instruction at {names.of(at)}")


def _page_fault(cpu: Processor, why: PageFault, doing: str) -> Fault:
    if why.kind == "non-canonical":
        return Fault("non-canonical-address", GP, f"{doing} uses {why.linear:#x}, which is {why.detail}")
    cause = "reserved-bit" if why.kind == "reserved" else "page-fault"
    return Fault(cause, PF, f"{doing}: {why.sentence}", address=why.linear)


# ---- the instruction by itself ----


def _raised(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    vector = _ON_PURPOSE.get(insn.mnemonic)
    if insn.mnemonic == "int":
        vector = insn.operands[0].imm & 0xFF
    if vector is None:
        return None
    return Fault("invalid-opcode" if vector == UD else "software-interrupt", vector, where, intended=True)


def _privilege(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    name = insn.mnemonic
    moves_control = name == "mov" and any(_register(insn, op)[:2] in ("cr", "dr") for op in insn.operands)
    if cpu.cpl and (name in _PRIVILEGED or moves_control):
        return Fault("privileged", GP, f"{where} is for CPL 0, and it runs at CPL {cpu.cpl}")
    iopl = cpu.registers["rflags"] >> 12 & 3
    if cpu.protected and cpu.cpl > iopl and name in ("cli", "sti"):
        return Fault("privileged", GP, f"{where} needs IOPL {cpu.cpl}, and it is {iopl}")
    return None


def _disabled(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    """Instructions that exist, but not with these control registers (SDM vol. 3, 2.5, 13.1)."""
    registers = [_register(insn, operand) for operand in insn.operands]
    cr0, cr4 = cpu.registers["cr0"], cpu.registers["cr4"]
    if any(name.startswith(("ymm", "zmm")) for name in registers) and not cr4 & _CR4_OSXSAVE:
        return Fault("invalid-opcode", UD, f"{where} is AVX, which CR4.OSXSAVE = 0 disables")
    if any(name.startswith("xmm") for name in registers):
        if cr0 & _CR0_EM or not (cr4 & _CR4_OSFXSR or insn.mnemonic.startswith("v")):
            bit = "CR0.EM = 1" if cr0 & _CR0_EM else "CR4.OSFXSR = 0"
            return Fault("invalid-opcode", UD, f"{where} is SSE, which {bit} disables")
        if cr0 & _CR0_TS:
            return Fault("device-not-available", NM, f"{where} uses SSE while CR0.TS is set")
    if insn.mnemonic == "syscall" and not cpu.registers["efer"] & 1:
        return Fault("invalid-opcode", UD, f"{where}: EFER.SCE is 0")
    return None


# ---- what it loads into the processor ----


def _registers(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    if insn.mnemonic in ("rdmsr", "wrmsr"):
        return _msr(cpu, insn.mnemonic, where, names)
    for register, selector in _selectors(cpu, insn):
        why = bad_selector(cpu, register, selector)
        if why:
            return Fault("bad-segment", NP if why.endswith("not present") else GP, f"{where}: {why}")
    return None


def _msr(cpu: Processor, mnemonic: str, where: str, names: Names) -> Fault | None:
    index = cpu.registers["rcx"] & 0xFFFFFFFF
    if not names.msr(index):
        return Fault("bad-msr", GP, f"{where}: the processor has no MSR {index:#x}")
    if mnemonic == "rdmsr":
        return None
    value = (cpu.registers["rdx"] & 0xFFFFFFFF) << 32 | cpu.registers["rax"] & 0xFFFFFFFF
    if index in _ADDRESS_MSRS and not cpu.paging.canonical(value) and cpu.long:
        return Fault("bad-msr", GP, f"{where}: {value:#x} for {_ADDRESS_MSRS[index]} is not a canonical address")
    if index == _EFER and value & ~_EFER_DEFINED:
        return Fault("bad-msr", GP, f"{where}: {value:#x} sets bits that EFER has not")
    return None


def _selectors(cpu: Processor, insn: Any) -> Iterator[tuple[str, int]]:
    """(segment register, selector) of those the instruction loads, in protected mode."""
    if not cpu.protected:
        return
    name, operands = insn.mnemonic, list(insn.operands)
    if name in ("mov", "pop") and operands and _register(insn, operands[0]) in _SEGMENTS:
        source = _value(cpu, insn, operands[1], 2) if name == "mov" else _stack_word(cpu, 0, 2)
        if source is not None:
            yield _register(insn, operands[0]), source & 0xFFFF
    elif name in ("ltr", "lldt"):
        source = _value(cpu, insn, operands[0], 2)
        if source is not None:
            yield {"ltr": "tr", "lldt": "ldt"}[name], source & 0xFFFF
    elif name in ("retf", "retfq", "iretq", "iretd", "iret"):
        # CS lies above RIP, whose size is the operand's: the mode's, in 64-bit code 4 without a prefix.
        size = 8 if name.endswith("q") else 2 if cpu.bits == 16 and name != "iretd" else 4
        selector = _stack_word(cpu, size, 2)
        if selector is not None:
            yield "cs", selector
    elif name in ("ljmp", "lcall"):
        if len(operands) == 2:
            yield "cs", operands[0].imm & 0xFFFF
        elif operands and operands[0].type == _mem():
            at = _address(cpu, insn, operands[0])
            selector = cpu.word(at + max(2, operands[0].size - 2), 2)
            if selector is not None:
                yield "cs", selector


def _arithmetic(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    if insn.mnemonic not in ("div", "idiv"):
        return None
    size = insn.operands[0].size
    divisor = _value(cpu, insn, insn.operands[0], size)
    if divisor == 0:
        return Fault("divide-error", DE, f"{where} divides by zero")
    if divisor is None or insn.mnemonic == "idiv" or size == 1:
        return None
    mask = (1 << 8 * size) - 1
    dividend = (cpu.registers["rdx"] & mask) << 8 * size | cpu.registers["rax"] & mask
    if dividend // divisor > mask:
        return Fault("divide-error", DE, f"{where}: the quotient of {dividend:#x} and {divisor:#x} is too wide")
    return None


# ---- memory ----


def _memory(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    import capstone

    if insn.mnemonic in _NO_ACCESS:
        return None
    for operand in insn.operands:
        if operand.type != _mem():
            continue
        at = _address(cpu, insn, operand)
        access = "write" if operand.access & capstone.CS_AC_WRITE else "read"
        refused = cpu.refused(at, operand.size, access)
        if refused:
            base = insn.reg_name(operand.mem.base) if operand.mem.base else ""
            on_stack = access == "write" and base in ("rsp", "esp", "rbp", "ebp")
            if on_stack and (overflow := _overflow(cpu, refused, where)):
                return overflow
            return _page_fault(cpu, refused, f"{where}, {'writing' if access == 'write' else 'reading'}")
    return None


def _stack(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    """What the instruction pushes or pops without naming it."""
    name, size = insn.mnemonic, {16: 2, 32: 4, 64: 8}[cpu.bits]
    if name.startswith(("push", "call", "lcall", "enter")):
        at, access, bytes_ = _stack_top(cpu) - size, "write", size
    elif name.startswith(("pop", "ret", "iret")):
        at, access, bytes_ = _stack_top(cpu), "read", size
    elif name == "leave":
        at, access, bytes_ = cpu.linear("ss", cpu.registers["rbp"]), "read", size
    else:
        return None
    refused = cpu.refused(at & (1 << 64) - 1, bytes_, access)
    if refused is None:
        return None
    overflow = _overflow(cpu, refused, where) if access == "write" else None
    return overflow or _page_fault(cpu, refused, f"{where}, on the stack at {_stack_top(cpu):#x}")


def _overflow(cpu: Processor, refused: PageFault, where: str) -> Fault | None:
    """Whether the stack grew below what is mapped for it: nothing at the address, but memory right above."""
    if refused.kind not in ("not-present", "write") or abs(refused.linear - _stack_top(cpu)) > _FRAME_MAX:
        return None
    above = (refused.linear | PAGE - 1) + 1
    if above >> 64 or cpu.refused(above, 8, "write") is not None:
        return None
    return Fault(
        "stack-overflow", PF, f"{where} stores just below the mapped stack, which begins at {above:#x}: "
        f"{refused.sentence}", address=refused.linear,
    )  # fmt: skip


# ---- where it leads ----


def _branch(cpu: Processor, insn: Any, where: str, names: Names) -> Fault | None:
    if cpu.bits != 64:
        return None
    target: int | None = None
    if insn.mnemonic in ("jmp", "call") and insn.operands:
        target = _value(cpu, insn, insn.operands[0], 8)
    elif insn.mnemonic in ("ret", "iretq", "retfq"):
        target = _stack_word(cpu, 0, 8)
    if target is None or cpu.paging.canonical(target & (1 << 64) - 1):
        return None
    return Fault("non-canonical-jump", GP, f"{where} jumps to {target:#x}, which is not a canonical address")


# ---- operands ----


def _mem() -> int:
    from capstone.x86 import X86_OP_MEM

    return int(X86_OP_MEM)


def _register(insn: Any, operand: Any) -> str:
    from capstone.x86 import X86_OP_REG

    return str(insn.reg_name(operand.reg)) if operand.type == X86_OP_REG else ""


_PARTS = {name: (whole, mask) for whole, parts in {
    "rax": ("eax", "ax", "al"), "rbx": ("ebx", "bx", "bl"), "rcx": ("ecx", "cx", "cl"), "rdx": ("edx", "dx", "dl"),
    "rsi": ("esi", "si", "sil"), "rdi": ("edi", "di", "dil"), "rbp": ("ebp", "bp", "bpl"), "rsp": ("esp", "sp", "spl"),
    **{f"r{n}": (f"r{n}d", f"r{n}w", f"r{n}b") for n in range(8, 16)},
}.items() for name, mask in zip((whole, *parts), ((1 << 64) - 1, 0xFFFFFFFF, 0xFFFF, 0xFF), strict=True)}  # fmt: skip


def _register_value(cpu: Processor, name: str) -> int | None:
    if name in _PARTS:
        whole, mask = _PARTS[name]
        return cpu.registers[whole] & mask
    if len(name) == 2 and name[1] == "h" and f"r{name[0]}x" in cpu.registers:
        return cpu.registers[f"r{name[0]}x"] >> 8 & 0xFF
    return cpu.registers.get(name)


def _value(cpu: Processor, insn: Any, operand: Any, size: int) -> int | None:
    """What a source operand holds, ``size`` bytes of it; ``None`` where that cannot be said."""
    from capstone.x86 import X86_OP_IMM

    if operand.type == X86_OP_IMM:
        return int(operand.imm) & (1 << 64) - 1
    if operand.type == _mem():
        return cpu.word(_address(cpu, insn, operand), size)
    return _register_value(cpu, _register(insn, operand))


def _address(cpu: Processor, insn: Any, operand: Any) -> int:
    """The linear address of a memory operand (SDM vol. 1, 3.7.5)."""
    memory = operand.mem
    base = insn.reg_name(memory.base) if memory.base else ""
    index = insn.reg_name(memory.index) if memory.index else ""
    offset = int(memory.disp)
    if base in ("rip", "eip"):
        offset += insn.address + insn.size
    elif base:
        offset += _register_value(cpu, base) or 0
    if index:
        offset += (_register_value(cpu, index) or 0) * memory.scale
    if memory.segment:
        segment = insn.reg_name(memory.segment)
    else:
        segment = "ss" if base in ("rsp", "esp", "sp", "rbp", "ebp", "bp") else "ds"
    return cpu.linear(segment, offset & (1 << 8 * insn.addr_size) - 1)


def _stack_top(cpu: Processor) -> int:
    mask = {16: 0xFFFF, 32: 0xFFFFFFFF}.get(cpu.bits, (1 << 64) - 1)
    return cpu.linear("ss", cpu.registers["rsp"] & mask)


def _stack_word(cpu: Processor, above: int, size: int) -> int | None:
    return cpu.word(_stack_top(cpu) + above & (1 << 64) - 1, size)
