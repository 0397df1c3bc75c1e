"""Tiny guests that find out how this host's KVM departs from the architecture.

Each is a few bytes of code in a machine of 2 MiB, entered in long mode, ending with OUT to :data:`DONE`. Together
they take well under a second; :func:`probe` returns :class:`vmm.host.Findings`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from vmm import host
from vmm._ffi import PYTHON_OPS, Upcall, check, ffi, lib
from vmm.memory import GuestMemory

DONE = 0x10
_OUT_DONE = b"\xe6\x10"  # out 0x10, al
_CODE, _UPPER_CODE, _STACK, _DATA = 0x8000, 0x9000, 0xF000, 0x10000
_UPPER = 0xFFFFFFFF80000000
_POWEROFF = 2

# One the processor does not offer ends in #UD (a triple fault here), not in a failed emulation.
INSTRUCTIONS: tuple[tuple[str, bytes], ...] = (
    ("clac/stac", b"\x0f\x01\xcb\x0f\x01\xca"),
    ("popcnt", b"\xf3\x48\x0f\xb8\xc3"),
    ("lzcnt", b"\xf3\x48\x0f\xbd\xc3"),
    ("tzcnt", b"\xf3\x48\x0f\xbc\xc3"),
    ("andn", b"\xc4\xe2\xe0\xf2\xc1"),
    ("cmpxchg16b", b"\x48\x0f\xc7\x0e"),
    ("movbe", b"\x48\x0f\x38\xf0\x06"),
    ("crc32", b"\xf2\x48\x0f\x38\xf1\xc3"),
    ("fwait", b"\x9b"),
    ("ldmxcsr", b"\x0f\xae\x16"),
    ("fxsave", b"\x0f\xae\x06"),
    ("xgetbv", b"\x31\xc9\x0f\x01\xd0"),
    ("xsave", b"\x0f\xae\x26"),
    ("clflushopt", b"\x66\x0f\xae\x3e"),
    ("rdfsbase", b"\xf3\x48\x0f\xae\xc0"),
    ("rdrand", b"\x48\x0f\xc7\xf0"),
    ("rdpid", b"\xf3\x0f\xc7\xf8"),
    ("movaps", b"\x0f\x28\xc1"),
    ("paddd", b"\x66\x0f\xfe\xc1"),
)

# Features hidden from the guest to see whether it finds them all the same: CPUID leaf 1 ECX, leaf 7 EBX.
_HIDDEN = {
    (1, "ecx"): {9: "ssse3", 19: "sse4_1", 20: "sse4_2", 23: "popcnt", 26: "xsave", 28: "avx", 30: "rdrand"},
    (7, "ebx"): {0: "fsgsbase", 3: "bmi1", 5: "avx2", 7: "smep", 9: "erms", 16: "avx512f", 20: "smap"},
}


class TinyGuest:
    """A machine of 2 MiB and one vCPU, identity-mapped, its upper half mapping the same memory for CPL 0 only."""

    def __init__(self, kvm: str, hidden: dict[tuple[int, str], dict[int, str]] | None = None) -> None:
        out = ffi.new("vmm_vm **")
        code = lib.vmm_vm_create(kvm.encode(), 0, out)
        if code < 0:
            raise host.explain_refusal(kvm, code, ffi.string(lib.vmm_error_text()).decode())
        self.vm = out[0]
        self.memory = GuestMemory(self.vm, [(0, 2 << 20)])
        self.values: list[int] = []
        self._done = Upcall(lambda offset, size: 0, self._write, lambda error: None)
        check(lib.vmm_bus_attach(self.vm, 0, DONE, 1, PYTHON_OPS, self._done.opaque, 1))
        vcpu = ffi.new("vmm_vcpu **")
        check(lib.vmm_vcpu_create(self.vm, 0, vcpu))
        self.vcpu = vcpu[0]
        self.leaves = self._set_cpuid(hidden or {})
        for gpa, entry in (
            (0x1000, 0x2007), (0x1FF8, 0x4003),  # PML4: lower half for all, upper half for CPL 0
            (0x2000, 0x3007), (0x3000, 0x0087), (0x4FF0, 0x5003), (0x5000, 0x0083),
        ):  # fmt: skip
            self.memory.write(gpa, entry.to_bytes(8, "little"))

    def _set_cpuid(self, hidden: dict[tuple[int, str], dict[int, str]]) -> dict[tuple[int, int], Any]:
        entries = ffi.new("vmm_cpuid_entry[256]")
        n = check(lib.vmm_vm_supported_cpuid(self.vm, entries, 256))
        leaves = {(entries[i].function, entries[i].index): entries[i] for i in range(n)}
        for (function, register), bits in hidden.items():
            if leaf := leaves.get((function, 0)):
                setattr(leaf, register, getattr(leaf, register) & ~sum(1 << bit for bit in bits))
        check(lib.vmm_vcpu_set_cpuid(self.vcpu, entries, n))
        self._entries = entries
        return leaves

    def _write(self, offset: int, size: int, value: int) -> None:
        self.values.append(value)
        lib.vmm_vm_stop(self.vm, _POWEROFF, value)

    def enter(self, code: bytes, *, cpl: int = 0, **registers: int) -> None:
        """Put code in place and the vCPU at its start."""
        self.memory.write(_CODE, code)
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
        start = {"rip": _CODE, "rsp": _STACK, "rsi": _DATA, "rflags": 0x3002, **registers}
        check(lib.vmm_vcpu_set_regs(self.vcpu, ffi.new("vmm_regs *", start)))

    def run(self, timeout: float = 0.5) -> str:
        """Run to the end: "done", "failed" (KVM cannot emulate it), "fault" (triple fault), "timeout" or "other"."""
        check(lib.vmm_vm_rearm(self.vm))
        self.values.clear()
        thread = threading.Thread(target=lib.vmm_vcpu_run, args=(self.vcpu,), daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            lib.vmm_vm_stop(self.vm, 1, 0)
            thread.join()
        code, number = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        reason = lib.vmm_vm_stop_reason(self.vm, code, number)
        return {_POWEROFF: "done", 7: "failed", 6: "fault", 1: "timeout"}.get(reason, "other")

    def close(self) -> None:
        """Free the machine."""
        self.memory.close()
        lib.vmm_vm_destroy(self.vm)


def probe(kvm: str = "/dev/kvm") -> host.Findings:
    """Run every tiny guest. Raises :class:`~vmm.errors.HostError` when no machine can be made at all."""
    found = host.Findings()
    guest = TinyGuest(kvm)
    try:
        _measure(guest, found)
    finally:
        guest.close()
    _instructions(kvm, found)
    _cpuid(kvm, found)
    for one in (_shadows, _syscall, _vmcall, _tsc):
        guest = TinyGuest(kvm)  # each may end in a state no vCPU comes back from
        try:
            one(guest, found)
        finally:
            guest.close()
    return found


def _measure(guest: TinyGuest, found: host.Findings) -> None:
    loops = 4000
    # mov ecx, n; L: dec ecx; jnz L
    body = b"\xb9" + loops.to_bytes(4, "little") + b"\xff\xc9\x75\xfc"
    exits = 200
    outs = b"\xb9" + exits.to_bytes(4, "little") + b"\xe6\x11\xff\xc9\x75\xfa"
    times = []
    for code in (b"", body, outs):
        best = 1.0
        for _ in range(3):
            guest.enter(code + _OUT_DONE)
            start = time.perf_counter()
            guest.run()
            best = min(best, time.perf_counter() - start)
        times.append(best)
    found.instruction_ns = round(max(0.0, times[1] - times[0]) / (2 * loops) * 1e9, 1)
    found.native = found.instruction_ns < 50  # the slowest processor is far below, the fastest emulator far above
    found.pio_us = round(max(0.0, (times[2] - times[0]) / exits * 1e6 - 2 * found.instruction_ns / 1e3), 2)


def _instructions(kvm: str, found: host.Findings) -> None:
    guest = TinyGuest(kvm)
    for name, code in INSTRUCTIONS:
        data = bytes.fromhex("801f0000") if name == "ldmxcsr" else bytes(8)
        guest.memory.write(_DATA, data)
        guest.enter(code + _OUT_DONE)
        end = guest.run()
        if end == "failed":
            found.missing.append(name)
        elif end != "done":  # no vCPU comes back from a triple fault
            guest.close()
            guest = TinyGuest(kvm)
    # INT3 needs an interrupt table: its gate leads to the end.
    gate = (_UPPER_CODE & 0xFFFF) | 0x10 << 16 | 0x8E00 << 32 | (_UPPER_CODE >> 16) << 48
    guest.memory.write(0x6000 + 3 * 16, gate.to_bytes(8, "little") + bytes(8))
    guest.memory.write(_UPPER_CODE, _OUT_DONE)
    for name, code in (("int3", b"\xcc"), ("int n", b"\xcd\x03")):
        guest.enter(code + _OUT_DONE)
        sregs = ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_sregs(guest.vcpu, sregs))
        sregs.idt.base, sregs.idt.limit = 0x6000, 0xFFF
        check(lib.vmm_vcpu_set_sregs(guest.vcpu, sregs))
        if guest.run() == "failed":
            found.missing.append(name)
    guest.close()


def _cpuid(kvm: str, found: host.Findings) -> None:
    guest = TinyGuest(kvm, _HIDDEN)
    try:
        for (function, register), bits in _HIDDEN.items():
            # mov eax, leaf; xor ecx, ecx; cpuid; mov [rsi], ebx; mov [rsi+4], ecx
            code = b"\xb8" + function.to_bytes(4, "little") + b"\x31\xc9\x0f\xa2\x89\x1e\x89\x4e\x04" + _OUT_DONE
            guest.enter(code)
            if guest.run() != "done":
                continue
            at = _DATA if register == "ebx" else _DATA + 4
            seen = int.from_bytes(guest.memory.read(at, 4), "little")
            found.cpuid_forced += [name for bit, name in bits.items() if seen >> bit & 1]
    finally:
        guest.close()


def _shadows(guest: TinyGuest, found: host.Findings) -> None:
    # User code, which no emulator runs, reads a page, and again when the host has put another in its place and, as
    # KVM wants it, another CR3 in between.
    table, pages = 0x6000, (0x20000, 0x21000)
    guest.memory.write(0x3008, (table | 7).to_bytes(8, "little"))
    for page in pages:
        guest.memory.write(page, page.to_bytes(4, "little"))
        guest.memory.write(table, (page | 7).to_bytes(8, "little"))
        sregs = ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_sregs(guest.vcpu, sregs))
        sregs.cr3 = 0
        check(lib.vmm_vcpu_set_sregs(guest.vcpu, sregs))
        guest.enter(b"\x8b\x06\x89\x03" + _OUT_DONE, cpl=3, rsi=2 << 20, rbx=_DATA)  # mov eax, [rsi]; mov [rbx], eax
        if guest.run() != "done":
            return
    found.shadowed = guest.memory.read(_DATA, 4) == pages[0].to_bytes(4, "little")


def _syscall(guest: TinyGuest, found: host.Findings) -> None:
    guest.memory.write(_UPPER_CODE, _OUT_DONE)
    guest.enter(b"\x0f\x05", cpl=3)
    # STAR, LSTAR, SFMASK (SDM vol. 3, 5.8.8)
    index = ffi.new("uint32_t[]", [0xC0000081, 0xC0000082, 0xC0000084])
    value = ffi.new("uint64_t[]", [0x23 << 48 | 0x10 << 32, _UPPER + _UPPER_CODE, 0])
    check(lib.vmm_vcpu_set_msrs(guest.vcpu, index, value, 3))
    found.syscall_broken = guest.run() != "done"


def _vmcall(guest: TinyGuest, found: host.Findings) -> None:
    guest.enter(b"\xb8\x63\x00\x00\x00\x0f\x01\xc1" + _OUT_DONE)  # an unknown hypercall is answered -ENOSYS
    found.vmcall_loops = guest.run(0.02) == "timeout"


def _tsc(guest: TinyGuest, found: host.Findings) -> None:
    far = 1 << 62
    index, value = ffi.new("uint32_t[]", [0x10]), ffi.new("uint64_t[]", [far])
    check(lib.vmm_vcpu_set_msrs(guest.vcpu, index, value, 1))
    check(lib.vmm_vcpu_get_msrs(guest.vcpu, index, value, 1))
    found.tsc_fixed = value[0] < far
