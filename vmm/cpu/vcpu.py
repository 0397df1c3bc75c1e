"""One virtual CPU, seen from outside while it does not run."""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.errors import ConfigError, HostError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm._ffi import vmm_vcpu, vmm_vm
    from vmm.cpu.cpuid import CpuidTable
    from vmm.cpu.paging import LinearMemory, Paging
    from vmm.memory import GuestMemory

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
           "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")  # fmt: skip
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

EFER_LMA = 1 << 10

# XSAVE's legacy region (SDM vol. 1, table 13-1): offset and bytes of each register
_FPU = {
    "fcw": (0, 2), "fsw": (2, 2), "ftw": (4, 1), "fop": (6, 2), "fip": (8, 8), "fdp": (16, 8), "mxcsr": (24, 4),
    **{f"st{i}": (32 + 16 * i, 10) for i in range(8)},
    **{f"xmm{i}": (160 + 16 * i, 16) for i in range(16)},
}  # fmt: skip
_XSTATE_BV = 512  # of the header: bit 0 says that x87's part holds, bit 1 SSE's, bit 2 AVX's
_AVX = 2  # the state component with the upper halves of YMM (SDM vol. 1, 13.1)


def _width(name: str) -> int:
    """Return the bits of a general, control or segment register; 0 if there is none of that name."""
    if name in GENERAL or name in CONTROL:
        return 64
    part, _, field = name.partition("_")
    if part in SEGMENTS:
        return {"": 16, "base": 64, "limit": 32, "rights": 17}.get(field, 0)
    return {"base": 64, "limit": 16}.get(field, 0) if part in ("gdt", "idt") else 0


# A segment's access rights as VMX has them (SDM vol. 3, table 25-2): field, its lowest bit, its bits
_RIGHTS = (("type", 0, 4), ("s", 4, 1), ("dpl", 5, 2), ("present", 7, 1), ("avl", 12, 1), ("l", 13, 1), ("db", 14, 1),
           ("g", 15, 1), ("unusable", 16, 1))  # fmt: skip


EXIT_REASONS: dict[int, str] = {
    lib.KVM_EXIT_UNKNOWN: "unknown",
    lib.KVM_EXIT_EXCEPTION: "exception",
    lib.KVM_EXIT_IO: "io",
    lib.KVM_EXIT_HYPERCALL: "hypercall",
    lib.KVM_EXIT_DEBUG: "debug",
    lib.KVM_EXIT_HLT: "hlt",
    lib.KVM_EXIT_MMIO: "mmio",
    lib.KVM_EXIT_IRQ_WINDOW_OPEN: "irq-window",
    lib.KVM_EXIT_SHUTDOWN: "shutdown",
    lib.KVM_EXIT_FAIL_ENTRY: "fail-entry",
    lib.KVM_EXIT_INTR: "intr",
    lib.KVM_EXIT_INTERNAL_ERROR: "internal-error",
    lib.KVM_EXIT_SYSTEM_EVENT: "system-event",
    lib.KVM_EXIT_X86_RDMSR: "rdmsr",
    lib.KVM_EXIT_X86_WRMSR: "wrmsr",
}

MP_STATES: dict[int, str] = {
    lib.KVM_MP_STATE_RUNNABLE: "runnable",
    lib.KVM_MP_STATE_UNINITIALIZED: "uninitialized",
    lib.KVM_MP_STATE_INIT_RECEIVED: "init-received",
    lib.KVM_MP_STATE_HALTED: "halted",
    lib.KVM_MP_STATE_SIPI_RECEIVED: "sipi-received",
}


class Exit:
    """One exit from the ring of the last 64: the guest's access, and the value it wrote or read."""

    __slots__ = ("address", "claimed", "count", "reason", "size", "tag", "value", "write")

    def __init__(self, record: Any) -> None:
        self.address: int = record.address
        self.value: int = record.value
        self.reason = EXIT_REASONS.get(record.reason, f"exit-{record.reason}")
        self.size: int = record.size
        self.write = bool(record.write)
        self.claimed = bool(record.claimed)
        self.count: int = record.count
        self.tag: int = record.tag

    def __repr__(self) -> str:
        if self.reason not in ("io", "mmio"):
            return f"<{self.reason} {self.address:#x}>"
        arrow = "<-" if self.write else "->"
        return f"<{self.reason} {self.address:#x}/{self.size} {arrow} {self.value:#x}>"


def named(regs: Any, sregs: Any) -> dict[str, int]:
    """Convert what :meth:`Vcpu.structs` returns to the form of :meth:`Vcpu.registers`."""
    values = {name: int(getattr(regs, name)) for name in GENERAL}
    values.update((name, int(getattr(sregs, name))) for name in CONTROL)
    for name in SEGMENTS:
        segment = getattr(sregs, name)
        values[name] = int(segment.selector)
        values[f"{name}_base"], values[f"{name}_limit"] = int(segment.base), int(segment.limit)
        values[f"{name}_rights"] = sum(int(getattr(segment, field)) << at for field, at, _ in _RIGHTS)
    values["gdt_base"], values["gdt_limit"] = int(sregs.gdt.base), int(sregs.gdt.limit)
    values["idt_base"], values["idt_limit"] = int(sregs.idt.base), int(sregs.idt.limit)
    return values


def operand_bits(sregs: Any) -> int:
    """Return the operand size of the code that CS selects: 16, 32 or 64."""
    if sregs.cs.l:
        return 64
    return 32 if sregs.cs.db else 16


def was_reset(regs: Any, sregs: Any) -> bool:
    """Return whether a vCPU is in its state after INIT (SDM vol. 3, table 9-1).

    kvm-amd puts it there when the processor reports a shutdown, since the VMCB is undefined then (AMD APM vol. 2,
    15.14.3), before user space sees KVM_EXIT_SHUTDOWN. KVM_CAP_X86_TRIPLE_FAULT_EVENT is no remedy: it shows and keeps
    a triple fault that KVM itself has made and not yet delivered (of RSM, or of a nested guest), not the processor's.
    """
    return bool(
        regs.rip == 0xFFF0
        and regs.rflags == 2
        and sregs.cs.selector == 0xF000
        and sregs.cs.base == 0xFFFF0000
        and sregs.idt.base == 0
        and sregs.idt.limit == 0xFFFF
    )


class Vcpu:
    """A vCPU. Registers may be read and set while the machine is created, paused or stopped, and in a hook those of the
    vCPU that called it.

    Raises :class:`~vmm.errors.StateError` while it runs, or when its machine is closed, and
    :class:`~vmm.errors.HostError` where KVM refuses a value.
    """

    def __init__(self, vm: vmm_vm, number: int, ram: GuestMemory, cpuid: CpuidTable) -> None:
        self.number = number
        self._ram = ram
        self._cpuid = cpuid
        self.changes = 0
        """Number of changes of its registers from outside, which a replay does not repeat."""
        out = ffi.new("vmm_vcpu **")
        check(lib.vmm_vcpu_create(vm, number, out))
        self._native: vmm_vcpu | None = out[0]
        cpuid.apply(self.native, number)

    def __repr__(self) -> str:
        return f"<Vcpu {self.number}>"

    @property
    def native(self) -> vmm_vcpu:
        """The native vCPU. Raises :class:`~vmm.errors.StateError` once the machine is closed."""
        if self._native is None:
            raise StateError("the machine is closed: look at its vCPUs before that")
        return self._native

    def closed(self) -> None:
        """Mark the native vCPU as freed: later calls raise an exception."""
        self._native = None

    # registers

    def registers(self) -> dict[str, int]:
        """Return general, control and segment registers by name.

        ``cs`` is the selector; what the processor keeps of its descriptor are ``cs_base``, ``cs_limit`` in bytes, and
        ``cs_rights`` (SDM vol. 3, table 25-2: type in bits 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15,
        unusable 16).
        """
        return named(*self.structs())

    def structs(self) -> tuple[Any, Any]:
        """Return the same as KVM's structs: ``vmm_regs`` and ``vmm_sregs``."""
        regs, sregs = ffi.new("vmm_regs *"), ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_regs(self.native, regs))
        check(lib.vmm_vcpu_get_sregs(self.native, sregs))
        return regs, sregs

    def set_registers(self, **values: int) -> None:
        """Set registers by the names :meth:`registers` has, e.g. ``set_registers(rip=0x1000, fs_base=0)``.

        A selector is set alone: its base, limit and rights stay. Nothing is set when one name or value is
        wrong: :class:`~vmm.errors.ConfigError` for a name that is no register or a value that does not fit,
        :class:`~vmm.errors.HostError` for a state no processor can be in (as KVM judges it).
        """
        for name, value in values.items():
            bits = _width(name)
            if not bits:
                raise ConfigError(f"no such register: {name}")
            if not 0 <= value < 1 << bits:
                raise ConfigError(f"{name} has {bits} bits, {value:#x} does not fit")
        if "rip" in values and not self.paging({**self.registers(), **values}).canonical(values["rip"]):
            raise ConfigError(f"rip {values['rip']:#x} is no address in the vCPU's mode: give one that is canonical")
        self.changes += 1
        general = {k: v for k, v in values.items() if k in GENERAL}
        control = {k: v for k, v in values.items() if k not in GENERAL}
        if control:
            sregs = ffi.new("vmm_sregs *")
            check(lib.vmm_vcpu_get_sregs(self.native, sregs))
            for name, value in control.items():
                part, _, field = name.partition("_")
                if name in CONTROL:
                    setattr(sregs, name, value)
                elif field == "rights":
                    for right, at, width in _RIGHTS:
                        setattr(getattr(sregs, part), right, value >> at & (1 << width) - 1)
                else:
                    setattr(getattr(sregs, part), field or "selector", value)
            if lib.vmm_vcpu_set_sregs(self.native, sregs) < 0:
                asked = ", ".join(f"{name} {value:#x}" for name, value in control.items())
                raise HostError(
                    f"no processor can be in this state, says KVM: {asked}, with the other registers as they are"
                )
        if general:
            regs = ffi.new("vmm_regs *")
            check(lib.vmm_vcpu_get_regs(self.native, regs))
            for name, value in general.items():
                setattr(regs, name, value)
            check(lib.vmm_vcpu_set_regs(self.native, regs))

    def fpu(self) -> dict[str, int]:
        """Return x87 and SSE registers by name: ``st0``..``st7`` (80 bits, from the stack's top), ``fcw``, ``fsw``,
        ``ftw`` (abridged, SDM vol. 1, 10.5.1), ``fop``, ``fip``, ``fdp``, ``xmm0``..``xmm15`` (128 bits), ``mxcsr``; if
        the guest has AVX also ``ymm0``..``ymm15`` (256 bits, the lower half being ``xmm``'s).
        """
        raw = self.xsave()
        values = {}
        for name, parts in self._fpu_places().items():
            values[name] = int.from_bytes(b"".join(raw[at : at + size] for at, size in parts), "little")
        return values

    def set_fpu(self, **values: int) -> None:
        """Set x87, SSE and AVX registers by the names :meth:`fpu` has. Raises :class:`~vmm.errors.ConfigError`."""
        raw, places = bytearray(self.xsave()), self._fpu_places()
        for name, value in values.items():
            if name not in places:
                raise ConfigError(f"no such register: {name}")
            bits = 8 * sum(size for _, size in places[name])
            if not 0 <= value < 1 << bits:
                raise ConfigError(f"{name} has {bits} bits, {value:#x} does not fit")
            for at, size in places[name]:
                raw[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                value >>= 8 * size
            raw[_XSTATE_BV] |= 7 if name.startswith("ymm") else 3
        if int.from_bytes(raw[_FPU["mxcsr"][0] :][:4], "little") >> 16:
            raise ConfigError("mxcsr: bits 31:16 are reserved")
        self.set_xsave(raw)

    def _fpu_places(self) -> dict[str, list[tuple[int, int]]]:
        """Return (offset, bytes) of each register's parts in the XSAVE area, the lowest first."""
        places = {name: [place] for name, place in _FPU.items()}
        if upper := self._cpuid.xsave_offset(_AVX):
            places.update((f"ymm{i}", [_FPU[f"xmm{i}"], (upper + 16 * i, 16)]) for i in range(16))
        return places

    def xsave(self) -> bytes:
        """Return its XSAVE area in the standard format (SDM vol. 1, 13.4), 4096 bytes, with all its components."""
        buffer = ffi.new("uint8_t[]", lib.vmm_state_size(lib.VMM_STATE_XSAVE))
        check(lib.vmm_vcpu_get_state(self.native, lib.VMM_STATE_XSAVE, buffer, len(buffer)))
        return bytes(buffer)

    def set_xsave(self, area: bytes | bytearray) -> None:
        """Set an area that :meth:`xsave` returned. Raises :class:`~vmm.errors.ConfigError` for another size,
        :class:`~vmm.errors.HostError` for components that this processor lacks."""
        size = lib.vmm_state_size(lib.VMM_STATE_XSAVE)
        if len(area) != size:
            raise ConfigError(f"an XSAVE area has {size} bytes, not {len(area)}")
        self.changes += 1
        check(lib.vmm_vcpu_set_state(self.native, lib.VMM_STATE_XSAVE, bytes(area), size))

    @property
    def bits(self) -> int:
        """Operand size of the code at its RIP: 16, 32 or 64."""
        sregs = ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_sregs(self.native, sregs))
        return operand_bits(sregs)

    def linear_rip(self) -> int:
        """Return the linear address of the next instruction."""
        registers = self.registers()
        if registers["efer"] & EFER_LMA and self.bits == 64:
            return registers["rip"]
        return (registers["rip"] + registers["cs_base"]) & 0xFFFFFFFF

    def msr(self, index: int) -> int:
        """Return a model-specific register. Raises :class:`~vmm.errors.HostError` if KVM does not have it."""
        value = ffi.new("uint64_t[1]")
        if check(lib.vmm_vcpu_get_msrs(self.native, ffi.new("uint32_t[]", [index]), value, 1)) != 1:
            raise HostError(f"KVM has no MSR {index:#x} for this vCPU")
        return int(value[0])

    @property
    def mp_state(self) -> str:
        """KVM's MP state: "runnable", "halted" (waits for an interrupt), "uninitialized" (waits for INIT)..."""
        state = ffi.new("uint32_t *")
        check(lib.vmm_vcpu_get_state(self.native, lib.VMM_STATE_MP, ffi.cast("void *", state), 4))
        return MP_STATES.get(state[0], f"state-{state[0]}")

    def has_msr(self, index: int) -> bool:
        """Return whether KVM has this model-specific register."""
        return check(lib.vmm_vcpu_get_msrs(self.native, ffi.new("uint32_t[]", [index]), ffi.new("uint64_t[1]"), 1)) == 1

    def set_msr(self, index: int, value: int) -> None:
        """Set a model-specific register. Raises :class:`~vmm.errors.HostError` if KVM refuses."""
        self.changes += 1
        values = ffi.new("uint64_t[]", [value])
        if check(lib.vmm_vcpu_set_msrs(self.native, ffi.new("uint32_t[]", [index]), values, 1)) != 1:
            raise HostError(f"KVM refuses {value:#x} for MSR {index:#x}")

    def translate(self, linear: int) -> int | None:
        """Translate a linear address by the current page tables; return the gpa, or ``None`` if it is not mapped."""
        gpa = ffi.new("uint64_t *")
        code = lib.vmm_vcpu_translate(self.native, linear, gpa)
        return int(gpa[0]) if code != -EFAULT and check(code) == 0 else None

    # memory by linear address

    def paging(self, registers: dict[str, int] | None = None) -> Paging:
        """Return the paging mode that its registers, or the given ones, select."""
        registers = self.registers() if registers is None else registers
        from vmm.cpu.paging import Paging

        cpuid = self._cpuid
        return Paging(registers, physical_bits=cpuid.physical_bits, gigabyte_pages=cpuid.gigabyte_pages)

    @property
    def memory(self) -> LinearMemory:
        """Guest memory by linear address, through the page tables in force at each access."""
        from vmm.cpu.paging import LinearMemory

        return LinearMemory(self._ram, self.paging)

    # what happened

    def last_exits(self) -> list[Exit]:
        """Return up to 64 newest exits, oldest first."""
        return self.kept_exits()()

    def kept_exits(self) -> Callable[[], list[Exit]]:
        """Copy the newest exits now; return a function that converts them for a later :meth:`last_exits`."""
        records = ffi.new("vmm_exit_record[64]")
        n = lib.vmm_vcpu_last_exits(self.native, records, 64)
        return lambda: [Exit(records[i]) for i in range(n)]

    @property
    def recorded(self) -> int:
        """Return the total number of exits that were recorded for :meth:`last_exits`."""
        return int(lib.vmm_vcpu_recorded(self.native))

    def exit_counts(self) -> dict[str, int]:
        """Return the number of exits so far by reason."""
        counts = {}
        for reason in range(64):
            n = int(lib.vmm_vcpu_exit_count(self.native, reason))
            if n:
                counts[EXIT_REASONS.get(reason, f"exit-{reason}")] = n
        return counts

    def failed_instruction(self) -> bytes:
        """Return the instruction bytes that KVM reported with an emulation failure (0 to 15)."""
        buffer = ffi.new("uint8_t[16]")
        n = lib.vmm_vcpu_failed_instruction(self.native, buffer)
        return bytes(buffer)[:n]

    def internal_error(self) -> tuple[int, ...]:
        """Return the numbers that KVM reported with an internal error other than an emulation failure."""
        buffer = ffi.new("uint64_t[16]")
        n = lib.vmm_vcpu_internal_error(self.native, buffer)
        return tuple(int(buffer[i]) for i in range(n))

    def local_apic(self) -> bytes:
        """Return the registers of its local APIC (SDM vol. 3, table 10-1): 1024 bytes."""
        buffer = ffi.new("uint8_t[]", lib.vmm_state_size(lib.VMM_STATE_LAPIC))
        check(lib.vmm_vcpu_get_state(self.native, lib.VMM_STATE_LAPIC, buffer, len(buffer)))
        return bytes(buffer)
