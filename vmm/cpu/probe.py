"""Probes: tiny guests that detect how this host's KVM departs from the architecture.

Each is a few bytes of code in a :class:`~vmm.cpu.tiny_guest.TinyGuest`, entered in long mode, ending with OUT.
:mod:`vmm.cpu.verdicts` interprets their measurements, independently of the host's speed and load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm._ffi import check, ffi, lib
from vmm.cpu.findings import PAGING_KINDS, Findings
from vmm.cpu.tiny_guest import CODE, DATA, OUT_DONE, UPPER, UPPER_CODE, Starved, TinyGuest
from vmm.cpu.verdicts import Verdict, emulation_counted, emulation_timed

if TYPE_CHECKING:
    from collections.abc import Callable

# An instruction that the processor lacks ends in #UD (a triple fault here), not in a failed emulation.
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


_PATIENCE = 50  # multiples of an ordinary guest's processor time between two samples of a running one
_ROUNDS = 20  # of both levels, before the loops are made longer
_LOOP, _LONG_LOOP, _LOOP_MOST = 4000, 20_000, 2_000_000  # iterations, of two instructions each


def probe(kvm: str = "/dev/kvm", *, statistics: bool = True) -> Findings:
    """Run every tiny guest. Raises :class:`~vmm.errors.HostError` if no machine can be created, or if the host is too
    busy for a measurement.

    ``statistics=False`` ignores KVM's statistics, as on a kernel that has none.
    """
    found = Findings()
    patience = _PATIENCE * max(_ordinary_ns(kvm) for _ in range(3))

    def fresh(hidden: dict[tuple[int, str], dict[int, str]] | None = None) -> TinyGuest:
        guest = TinyGuest(kvm, hidden, patience_ns=patience)
        if not statistics:
            guest.forget_statistics()
        return guest

    _instructions(fresh, found)
    for one, hidden in (
        (_kernel_code, None), (_costs, None), (_cpuid, _HIDDEN), (_shadows, None), (_syscall, None), (_vmcall, None),
        (_tsc, None),
    ):  # fmt: skip
        guest = fresh(hidden)  # each may end in a state that a vCPU cannot leave
        try:
            one(guest, found)
        finally:
            guest.close()
    _stops(fresh, found)
    _paging(fresh, found)
    return found


def _ordinary_ns(kvm: str) -> int:
    """Return the processor time, in ns, of a new machine's first run, with one exit, under the present load."""
    guest = TinyGuest(kvm)
    try:
        guest.enter(OUT_DONE)
        guest.run()
        return guest.cpu_ns
    finally:
        guest.close()


def _repeat(n: int, body: bytes = b"") -> bytes:
    """Return code that runs ``body`` and two register instructions n times: mov ecx, n; L: body; dec ecx; jnz L."""
    return b"\xb9" + n.to_bytes(4, "little") + body + b"\xff\xc9\x75" + bytes([256 - 4 - len(body)])


def _cpu_ns(guest: TinyGuest, code: bytes, cpl: int = 0) -> int:
    guest.enter(code + OUT_DONE, cpl=cpl)
    guest.run()
    return guest.cpu_ns


def _kernel_code(guest: TinyGuest, found: Findings) -> None:
    counted = _counted(guest)
    verdict = counted if counted and counted.value else _timed(guest)
    # A count of zero proves nothing, since KVM may emulate without counting: then report both measurements.
    found.native = not verdict.value
    found.basis["native"] = "; ".join(v.basis for v in dict.fromkeys((counted, verdict)) if v)


def _counted(guest: TinyGuest) -> Verdict | None:
    grew = []
    for n in (_LOOP // 4, _LOOP):
        before = guest.counted()
        _cpu_ns(guest, _repeat(n))
        after = guest.counted()
        if "insn_emulation" not in after:
            return None
        grew.append(after["insn_emulation"] - before["insn_emulation"])
    return emulation_counted(2 * (_LOOP - _LOOP // 4), grew[1] - grew[0])


def _timed(guest: TinyGuest) -> Verdict:
    n = _LONG_LOOP
    while n <= _LOOP_MOST:  # the longer the loop, the less the rest of a run hides the difference
        kernel: list[int] = []
        user: list[int] = []
        for _ in range(_ROUNDS):
            kernel.append(_cpu_ns(guest, _repeat(n)))
            user.append(_cpu_ns(guest, _repeat(n), cpl=3))
            if verdict := emulation_timed(kernel, user):
                return verdict
        n *= 4
    raise Starved(
        "this host is so busy, and so unevenly, that whether it emulates guest kernel code cannot be told: "
        "end what keeps it busy, and start again"
    )


def _costs(guest: TinyGuest, found: Findings) -> None:
    loops, exits = _LOOP_MOST // 4 if found.native else _LOOP, 200
    code = (b"", _repeat(loops), _repeat(exits, b"\xe6\x11"))
    nothing, looping, exiting = (min(_cpu_ns(guest, part) for _ in range(3)) for part in code)
    found.instruction_ns = round(max(0, looping - nothing) / (2 * loops), 2)
    found.pio_us = round(max(0.0, (exiting - nothing) / exits - 2 * found.instruction_ns) / 1e3, 2)


def _instructions(fresh: Callable[[], TinyGuest], found: Findings) -> None:
    guest = fresh()
    ends: dict[str, list[str]] = {}
    for name, code in INSTRUCTIONS:
        data = bytes.fromhex("801f0000") if name == "ldmxcsr" else bytes(8)
        guest.memory.write(DATA, data)
        guest.enter(code + OUT_DONE)
        end = guest.run()
        ends.setdefault(end, []).append(name)
        if end not in ("done", "failed"):  # no vCPU comes back from a triple fault
            guest.close()
            guest = fresh()
    # INT3 needs an interrupt table: its gate leads to the end.
    gate = (UPPER_CODE & 0xFFFF) | 0x10 << 16 | 0x8E00 << 32 | (UPPER_CODE >> 16) << 48
    guest.memory.write(0x6000 + 3 * 16, gate.to_bytes(8, "little") + bytes(8))
    guest.memory.write(UPPER_CODE, OUT_DONE)
    for name, code in (("int3", b"\xcc"), ("int n", b"\xcd\x03")):
        guest.enter(code + OUT_DONE)
        sregs = ffi.new("vmm_sregs *")
        check(lib.vmm_vcpu_get_sregs(guest.vcpu, sregs))
        sregs.idt.base, sregs.idt.limit = 0x6000, 0xFFF
        check(lib.vmm_vcpu_set_sregs(guest.vcpu, sregs))
        ends.setdefault(guest.run(), []).append(name)
    guest.close()
    found.missing = ends.get("failed", [])
    counts = ", ".join(f"{len(names)} {_ENDS[end]}" for end, names in sorted(ends.items()))
    found.basis["missing"] = f"of {len(INSTRUCTIONS) + 2} instructions {counts}"


# How a guest may end, said of the instruction it is there for
_ENDS = {
    "done": "worked",
    "failed": "KVM could not emulate",
    "fault": "ended in a triple fault",
    "stuck": "never ended",
    "other": "ended otherwise",
}


def _cpuid(guest: TinyGuest, found: Findings) -> None:
    hidden = sum(len(bits) for bits in _HIDDEN.values())
    for (function, register), bits in _HIDDEN.items():
        # mov eax, leaf; xor ecx, ecx; cpuid; mov [rsi], ebx; mov [rsi+4], ecx
        code = b"\xb8" + function.to_bytes(4, "little") + b"\x31\xc9\x0f\xa2\x89\x1e\x89\x4e\x04" + OUT_DONE
        guest.enter(code)
        if (end := guest.run()) != "done":
            found.basis["cpuid_forced"] = f"CPUID {_ENDS[end]}"
            return
        at = DATA if register == "ebx" else DATA + 4
        seen = int.from_bytes(guest.memory.read(at, 4), "little")
        found.cpuid_forced += [name for bit, name in bits.items() if seen >> bit & 1]
    found.basis["cpuid_forced"] = f"the guest saw {len(found.cpuid_forced)} of {hidden} features hidden from it"


def _shadows(guest: TinyGuest, found: Findings) -> None:
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
        guest.enter(b"\x8b\x06\x89\x03" + OUT_DONE, cpl=3, rsi=2 << 20, rbx=DATA)  # mov eax, [rsi]; mov [rbx], eax
        if (end := guest.run()) != "done":
            found.basis["shadowed"] = f"a read of memory at CPL 3 {_ENDS[end]}"
            return
    found.shadowed = guest.memory.read(DATA, 4) == pages[0].to_bytes(4, "little")
    which = "old" if found.shadowed else "new"
    found.basis["shadowed"] = f"a guest read the {which} page after its page table was written from outside"


def _stops(fresh: Callable[[], TinyGuest], found: Findings) -> None:
    # A debugger's point of each kind where the second instruction is, or what it writes: nop; mov [rsi], eax
    store = CODE + 1
    points = (("breakpoint", store, 1), ("hardware", store, 1), ("write", DATA, 4))
    for kind, address, size in points:
        guest = fresh()
        try:
            guest.enter(b"\x90\x89\x06" + OUT_DONE, rax=1)
            if not guest.stops_at(kind, address, size, emulated=not found.native):
                found.unstopped.append(kind)
        finally:
            guest.close()
    passed = f"; it ran past: {', '.join(found.unstopped)}" if found.unstopped else ""
    stopped = len(points) - len(found.unstopped)
    found.basis["unstopped"] = f"a guest stopped at {stopped} of {len(points)} kinds of a debugger's points{passed}"


def _paging(fresh: Callable[[], TinyGuest], found: Findings) -> None:
    # A 32-bit guest switches paging on, over tables that map the code where it is: mov eax, CR0 with PG; mov cr0, eax.
    directory, pointers, pae_directory, psize = 0x6000, 0x7000, 0x5000, 0x83
    kinds = {"32-bit": (directory, 1 << 4), "PAE": (pointers, 1 << 5)}  # CR3, and CR4.PSE or PAE
    ends = []
    for kind in PAGING_KINDS:
        guest = fresh()
        try:
            guest.memory.write(directory, psize.to_bytes(4, "little"))  # 4 MiB at 0
            guest.memory.write(pointers, (pae_directory | 1).to_bytes(8, "little"))
            guest.memory.write(pae_directory, psize.to_bytes(8, "little"))  # 2 MiB at 0
            cr3, cr4 = kinds[kind]
            guest.enter_protected(
                b"\xb8" + 0x80000033.to_bytes(4, "little") + b"\x0f\x22\xc0" + OUT_DONE, cr3=cr3, cr4=cr4
            )
            end = guest.run()
        finally:
            guest.close()
        ends.append(f"{kind} paging {_ENDS[end]}")
        if end != "done":
            found.unpaged.append(kind)
    found.basis["unpaged"] = ", ".join(ends)


def _syscall(guest: TinyGuest, found: Findings) -> None:
    guest.memory.write(UPPER_CODE, OUT_DONE)
    guest.enter(b"\x0f\x05", cpl=3)
    # STAR, LSTAR, SFMASK (SDM vol. 3, 5.8.8)
    index = ffi.new("uint32_t[]", [0xC0000081, 0xC0000082, 0xC0000084])
    value = ffi.new("uint64_t[]", [0x23 << 48 | 0x10 << 32, UPPER + UPPER_CODE, 0])
    check(lib.vmm_vcpu_set_msrs(guest.vcpu, index, value, 3))
    end = guest.run()
    found.syscall_broken = end != "done"
    what = "reached code that only CPL 0 may execute" if end == "done" else _ENDS[end]
    found.basis["syscall_broken"] = f"SYSCALL at CPL 3 {what}"


def _vmcall(guest: TinyGuest, found: Findings) -> None:
    guest.enter(b"\xb8\x63\x00\x00\x00\x0f\x01\xc1" + OUT_DONE)  # an unknown hypercall gives -ENOSYS
    end = guest.run()
    found.vmcall_loops = end == "stuck"
    found.basis["vmcall_loops"] = f"VMCALL {_ENDS[end]}" + (f": {guest.why_stuck}" if end == "stuck" else "")


def _tsc(guest: TinyGuest, found: Findings) -> None:
    far = 1 << 62
    index, value = ffi.new("uint32_t[]", [0x10]), ffi.new("uint64_t[]", [far])
    check(lib.vmm_vcpu_set_msrs(guest.vcpu, index, value, 1))
    check(lib.vmm_vcpu_get_msrs(guest.vcpu, index, value, 1))
    found.tsc_fixed = value[0] < far
    found.basis["tsc_fixed"] = f"a TSC set to {far:#x} read {int(value[0]):#x}"
