"""A vCPU's registers as GDB sees them: the target description, and values to and from its packets.

Feature and register names, and their order, are GDB's own (GDB manual, G.5.13); the control registers are a feature of
ours. Values are those of ``Vcpu.registers()`` and ``Vcpu.fpu()``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmm.cpu.vcpu import Vcpu


class Register(NamedTuple):
    """``name`` and ``bits`` as GDB has them, GDB's ``type``, its ``feature``, and pyvmm's name for it."""

    name: str
    bits: int
    type: str
    feature: str
    ours: str


_CORE, _SSE, _SEGMENTS, _CONTROL = (
    "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse", "org.gnu.gdb.i386.segments", "org.pyvmm.control",
)  # fmt: skip
_GENERAL = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")
_GENERAL_32 = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_X87 = {"fctrl": "fcw", "fstat": "fsw", "ftag": "ftag", "fiseg": "", "fioff": "fip", "foseg": "", "fooff": "fdp",
        "fop": "fop"}  # fmt: skip
_CONTROLS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")


def _table(wide: bool) -> list[Register]:
    letter, bits, pointers = ("r", 64, ("data_ptr", "code_ptr")) if wide else ("e", 32, ("data_ptr", "code_ptr"))
    table = []
    for name in _GENERAL if wide else _GENERAL_32:
        kind = pointers[0] if name in ("sp", "bp") else f"int{bits}"
        table.append(Register(letter + name, bits, kind, _CORE, "r" + name))
    table += [Register(f"r{i}", 64, "int64", _CORE, f"r{i}") for i in range(8, 16) if wide]
    table.append(Register(letter + "ip", bits, pointers[1], _CORE, "rip"))
    table.append(Register("eflags", 32, "i386_eflags", _CORE, "rflags"))
    table += [Register(name, 32, "int32", _CORE, name) for name in ("cs", "ss", "ds", "es", "fs", "gs")]
    table += [Register(f"st{i}", 80, "i387_ext", _CORE, f"st{i}") for i in range(8)]
    table += [Register(name, 32, "int", _CORE, ours) for name, ours in _X87.items()]
    table += [Register(f"xmm{i}", 128, "vec128", _SSE, f"xmm{i}") for i in range(16 if wide else 8)]
    table.append(Register("mxcsr", 32, "i386_mxcsr", _SSE, "mxcsr"))
    table += [Register(name, 64, "int", _SEGMENTS, name) for name in ("fs_base", "gs_base") if wide]
    table += [Register(name, bits, f"int{bits}", _CONTROL, name) for name in _CONTROLS]
    return table


_EFLAGS = {"CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11, "NT": 14, "RF": 16,
           "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21}  # fmt: skip
_MXCSR = {"IE": 0, "DE": 1, "ZE": 2, "OE": 3, "UE": 4, "PE": 5, "DAZ": 6, "IM": 7, "DM": 8, "ZM": 9, "OM": 10,
          "UM": 11, "PM": 12, "FZ": 15}  # fmt: skip


def _flags(name: str, bits: dict[str, int]) -> str:
    fields = "".join(f'<field name="{field}" start="{bit}" end="{bit}"/>' for field, bit in bits.items())
    return f'<flags id="{name}" size="4">{fields}</flags>'


_TYPES = {
    _CORE: _flags("i386_eflags", _EFLAGS),
    _SSE: '<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>'
    '<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>'
    '<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>'
    '<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>'
    '<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>'
    '<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>'
    '<field name="uint128" type="uint128"/></union>' + _flags("i386_mxcsr", _MXCSR),
}


def _full_tag(abridged: int, fsw: int) -> int:
    """The tag word from FXSAVE's: empty or valid, two bits each (SDM vol. 1, 10.5.1.1); zero and special are not
    told apart."""
    del fsw
    return sum(0 if abridged >> i & 1 else 3 << 2 * i for i in range(8))


def _abridged_tag(full: int) -> int:
    return sum((full >> 2 * i & 3 != 3) << i for i in range(8))


class Registers:
    """The registers GDB sees: ``wide`` for x86-64, else those of i386."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide
        self.table = _table(wide)

    def description(self) -> bytes:
        """The target description (GDB manual, appendix G)."""
        architecture = "i386:x86-64" if self.wide else "i386"
        text = '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">'
        text += f"<architecture>{architecture}</architecture>"
        for feature in dict.fromkeys(register.feature for register in self.table):
            text += f'<feature name="{feature}">{_TYPES.get(feature, "")}'
            for number, register in enumerate(self.table):
                if register.feature == feature:
                    text += (
                        f'<reg name="{register.name}" bitsize="{register.bits}" type="{register.type}" '
                        f'regnum="{number}"/>'
                    )
            text += "</feature>"
        return (text + "</target>").encode()

    def read(self, vcpu: Vcpu) -> list[bytes]:
        """Every register's bytes, in order."""
        values = {**vcpu.registers(), **vcpu.fpu()}
        values["ftag"] = _full_tag(values["ftw"], values["fsw"])
        return [
            (values.get(register.ours, 0) & (1 << register.bits) - 1).to_bytes(register.bits // 8, "little")
            for register in self.table
        ]

    def write(self, vcpu: Vcpu, changes: dict[int, bytes]) -> None:
        """Set registers by number. Raises :class:`~vmm.errors.VmmError` for values that cannot be."""
        now = vcpu.registers()
        general: dict[str, int] = {}
        fpu: dict[str, int] = {}
        for number, data in changes.items():
            register, value = self.table[number], int.from_bytes(data, "little")
            if not register.ours:
                continue
            if register.ours == "ftag":
                fpu["ftw"] = _abridged_tag(value)
            elif register.ours in now:
                if value != now[register.ours] & (1 << register.bits) - 1:
                    general[register.ours] = value
            else:
                fpu[register.ours] = value & 0xFFFF if register.name in ("fctrl", "fstat", "fop") else value
        if general:
            vcpu.set_registers(**general)
        if fpu:
            vcpu.set_fpu(**fpu)

    def split(self, data: bytes) -> dict[int, bytes]:
        """A ``G`` packet's bytes by register number. Raises ``ValueError`` when they are not all there."""
        changes, at = {}, 0
        for number, register in enumerate(self.table):
            size = register.bits // 8
            changes[number] = data[at : at + size]
            at += size
        if len(data) != at:
            raise ValueError(len(data))
        return changes
