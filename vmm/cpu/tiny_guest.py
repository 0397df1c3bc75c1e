"""A machine of 2 MiB with one vCPU, for guests of a few instructions that probe this host's KVM."""

from __future__ import annotations

import select
import threading
import time

from vmm._ffi import PYTHON_OPS, Upcall, check, ffi, lib, pause
from vmm.cpu.statistics import Statistics
from vmm.cpu.vcpu import GENERAL
from vmm.cpu.verdicts import Look, due, stuck
from vmm.errors import HostError, kvm_refused
from vmm.memory import GuestMemory

DONE = 0x10
OUT_DONE = b"\xe6\x10"  # out 0x10, al
CODE, UPPER_CODE, STACK, DATA = 0x8000, 0x9000, 0xF000, 0x10000
UPPER = 0xFFFFFFFF80000000

_COUNTED = ("insn_emulation", "exits")
_PACE = 0.01  # seconds between two readings of the processor time of a guest that has not ended
_STARVED = 120.0  # seconds without any processor time, after which the run gives no result


class Starved(HostError):
    """The guest got no processor time: this proves nothing about KVM, and can be retried."""


class TinyGuest:
    """A machine of 2 MiB and one vCPU, identity-mapped, its upper half mapping the same memory for CPL 0 only.

    ``patience_ns``: processor time, many times what a guest here needs, after which :meth:`run` looks whether it still
    goes on; ``None``: it never does. ``hidden``: feature bits taken out of the guest's CPUID, by leaf and register.
    """

    def __init__(
        self,
        kvm: str,
        hidden: dict[tuple[int, str], dict[int, str]] | None = None,
        *,
        patience_ns: int | None = None,
    ) -> None:
        out = ffi.new("vmm_vm **")
        code = lib.vmm_vm_create(kvm.encode(), 0, out)
        if code < 0:
            raise kvm_refused(kvm, code, ffi.string(lib.vmm_error_text()).decode())
        self.vm = out[0]
        self.patience_ns = patience_ns
        self.cpu_ns = 0
        self.why_stuck = ""
        self.memory = GuestMemory(self.vm, [(0, 2 << 20)])
        self._done = Upcall(lambda offset, size: 0, self._write, lambda error: None)
        check(lib.vmm_bus_attach(self.vm, 0, DONE, 1, PYTHON_OPS, self._done.opaque, 1))
        vcpu = ffi.new("vmm_vcpu **")
        check(lib.vmm_vcpu_create(self.vm, 0, vcpu))
        self.vcpu = vcpu[0]
        self._set_cpuid(hidden or {})
        for gpa, entry in (
            (0x1000, 0x2007), (0x1FF8, 0x4003),  # PML4: lower half for all, upper half for CPL 0
            (0x2000, 0x3007), (0x3000, 0x0087), (0x4FF0, 0x5003), (0x5000, 0x0083),
        ):  # fmt: skip
            self.memory.write(gpa, entry.to_bytes(8, "little"))
        fd = lib.vmm_vcpu_stats_fd(self.vcpu)
        try:
            self.statistics: Statistics | None = Statistics(fd) if fd >= 0 else None
        except OSError:
            self.statistics = None

    def _set_cpuid(self, hidden: dict[tuple[int, str], dict[int, str]]) -> None:
        entries = ffi.new("vmm_cpuid_entry[256]")
        n = check(lib.vmm_vm_supported_cpuid(self.vm, entries, 256))
        leaves = {(entries[i].function, entries[i].index): entries[i] for i in range(n)}
        for (function, register), bits in hidden.items():
            if leaf := leaves.get((function, 0)):
                setattr(leaf, register, getattr(leaf, register) & ~sum(1 << bit for bit in bits))
        check(lib.vmm_vcpu_set_cpuid(self.vcpu, entries, n))

    def _write(self, offset: int, size: int, value: int) -> None:
        lib.vmm_vm_stop(self.vm, lib.VMM_STOP_POWEROFF, value)

    def enter(self, code: bytes, *, cpl: int = 0, **registers: int) -> None:
        """Write the code, and set the vCPU to its start."""
        self.memory.write(CODE, code)
        sregs = ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_sregs(self.vcpu, sregs))
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            s = getattr(sregs, name)
            s.base, s.limit, s.selector = 0, 0xFFFFFFFF, (0x10 if name == "cs" else 0x18) | cpl
            s.type, s.present, s.dpl, s.s, s.g, s.unusable = (0xB if name == "cs" else 3), 1, cpl, 1, 1, 0
            s.l, s.db = (1, 0) if name == "cs" else (0, 1)
        sregs.tr.type, sregs.tr.present, sregs.tr.limit = 0xB, 1, 0x67
        sregs.idt.limit = 0
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000033, 0x1000, 0x40620, 0x501
        if lib.vmm_vcpu_set_sregs(self.vcpu, sregs) < 0:
            sregs.cr4 = 0x620  # no OSXSAVE on this processor
            check(lib.vmm_vcpu_set_sregs(self.vcpu, sregs))
        start = {"rip": CODE, "rsp": STACK, "rsi": DATA, "rflags": 0x3002, **registers}
        check(lib.vmm_vcpu_set_regs(self.vcpu, ffi.new("vmm_regs *", start)))

    def enter_protected(self, code: bytes, *, cr3: int, cr4: int, **registers: int) -> None:
        """Put code in place and the vCPU at its start, in 32-bit protected mode with paging off."""
        self.memory.write(CODE, code)
        sregs = ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_sregs(self.vcpu, sregs))
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            s = getattr(sregs, name)
            s.base, s.limit, s.selector = 0, 0xFFFFFFFF, 0x10 if name == "cs" else 0x18
            s.type, s.present, s.dpl, s.s, s.g, s.unusable = (0xB if name == "cs" else 3), 1, 0, 1, 1, 0
            s.l, s.db = 0, 1
        sregs.tr.type, sregs.tr.present, sregs.tr.limit = 0xB, 1, 0x67
        sregs.idt.limit = 0
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x33, cr3, cr4, 0
        check(lib.vmm_vcpu_set_sregs(self.vcpu, sregs))
        start = {"rip": CODE, "rsp": STACK, "rsi": DATA, "rflags": 2, **registers}
        check(lib.vmm_vcpu_set_regs(self.vcpu, ffi.new("vmm_regs *", start)))

    def run(self) -> str:
        """Run to the end: "done", "failed" (KVM cannot emulate it), "fault" (triple fault), "stuck" (it will not end:
        ``why_stuck`` says by what that is known) or "other". ``cpu_ns`` is then the processor time it took.

        How long it takes decides nothing. Raises :class:`Starved`.
        """
        check(lib.vmm_vm_rearm(self.vm))
        self.why_stuck = ""
        clock: list[int] = []
        ended = threading.Event()

        def run() -> None:
            clock.append(time.pthread_getcpuclockid(threading.get_ident()))
            began = time.thread_time_ns()
            lib.vmm_vcpu_run(self.vcpu)
            self.cpu_ns = time.thread_time_ns() - began
            ended.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        starved = self._watch(ended, clock)
        thread.join()
        code, number = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        reason = lib.vmm_vm_stop_reason(self.vm, code, number)
        if reason == lib.VMM_STOP_HOST and starved:
            raise Starved(
                f"a guest of a few instructions was given no processor time in {_STARVED:.0f} s: "
                "end what keeps this host busy, and start again"
            )
        return {
            lib.VMM_STOP_POWEROFF: "done",
            lib.VMM_STOP_EMULATION: "failed",
            lib.VMM_STOP_TRIPLE_FAULT: "fault",
            lib.VMM_STOP_HOST: "stuck",
        }.get(reason, "other")

    def stops_at(self, kind: str, address: int, size: int, *, emulated: bool) -> bool:
        """Run until a debugger's point of this ``kind`` (:data:`vmm.cpu.debug.KINDS`) stops it, or to its end: whether
        it was the point. Nothing can be run here after that. False too where KVM has no debugging.

        Raises :class:`Starved`.
        """
        from vmm.cpu.debug import NATIVE_KINDS

        if lib.vmm_debug_open(self.vm, lib.VMM_DEBUG_WATCH_BY_STEP if emulated else 0) < 0:
            return False
        if kind == "breakpoint":
            check(lib.vmm_debug_plant(self.vm, address, ffi.new("uint8_t *")))
        else:
            check(lib.vmm_debug_set_point(self.vm, 0, NATIVE_KINDS[kind], address, size))
        thread = threading.Thread(target=lib.vmm_vcpu_run, args=(self.vcpu,), daemon=True)
        thread.start()
        event = lib.vmm_debug_fd(self.vm)
        ready = select.select([event, lib.vmm_vm_stop_fd(self.vm)], [], [], _STARVED)[0]
        lib.vmm_vm_stop(self.vm, lib.VMM_STOP_HOST, 0)
        thread.join()
        if not ready:
            raise Starved(
                f"a guest of a few instructions did not end in {_STARVED:.0f} s: "
                "end what keeps this host busy, and start again"
            )
        return event in ready

    def _watch(self, ended: threading.Event, clock: list[int]) -> bool:
        """Stop a guest that will not end; return whether it was starved, so that the run gives no result."""
        looks: list[Look] = []
        spent, progress = 0, time.monotonic()
        while not ended.wait(_PACE):
            try:
                now = time.clock_gettime_ns(clock[0]) if clock else 0
            except OSError:  # its thread has ended
                continue
            if now > spent:
                spent, progress = now, time.monotonic()
            elif time.monotonic() - progress > _STARVED:
                lib.vmm_vm_stop(self.vm, lib.VMM_STOP_HOST, 0)
                return True
            if self.patience_ns is None or not due(looks, now, self.patience_ns):
                continue
            looks.append(self._look(now))
            self.why_stuck = stuck(looks, self.patience_ns)
            if self.why_stuck:
                lib.vmm_vm_stop(self.vm, lib.VMM_STOP_HOST, 0)
                break
        ended.wait()
        return False

    def _look(self, cpu_ns: int) -> Look:
        regs = ffi.new("vmm_regs *")
        pause(self.vm)
        try:
            check(lib.vmm_vcpu_get_regs(self.vcpu, regs))
        finally:
            check(lib.vmm_vm_resume(self.vm))
        return Look(tuple(int(getattr(regs, name)) for name in GENERAL), cpu_ns, self.counted())

    def counted(self) -> dict[str, int]:
        """Return KVM's statistics of this vCPU; empty where KVM has none."""
        return self.statistics.read(*_COUNTED) if self.statistics else {}

    def forget_statistics(self) -> None:
        """Ignore KVM's statistics, as on a kernel that has none."""
        if self.statistics:
            self.statistics.close()
            self.statistics = None

    def close(self) -> None:
        """Free the machine."""
        self.forget_statistics()
        self.memory.close()
        lib.vmm_vm_destroy(self.vm)
