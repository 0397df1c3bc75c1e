"""Processor features that a guest may have, and the XSAVE components and MSRs with their state.

If a feature's registers are not saved, the guest finds other contents in them after a roll-back, a restore or a
migration. So a guest's CPUID has a bit only if it is listed here: as a feature without state beside what is always
saved (general, control, segment, debug and x87 registers, the local APIC, memory), or with state in an XSAVE component
or MSRs, if this host's KVM can save those. All others are cleared: those hidden for a reason (:data:`HIDDEN`), and
those not examined yet.

Sources: SDM vol. 2, CPUID, and vol. 3, 2 and chapters on each; AMD APM vol. 3, appendix E, and vol. 2; Linux,
Documentation/virt/kvm/x86/cpuid.rst and msr.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Register = tuple[int, int, str]  # leaf, subleaf, register
Bit = tuple[int, int, str, int]

XSAVE_AREA = 4096  # bytes of a vCPU's XSAVE state that is saved: struct kvm_xsave, standard format


class Carried(NamedTuple):
    """A feature with state: its name, and the XSAVE components and MSRs that hold it."""

    name: str
    components: tuple[int, ...] = ()
    msrs: tuple[int, ...] = ()


def _range(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


_AVX, _AVX512 = (2,), (2, 5, 6, 7)
_SPEC_CTRL = (0x48,)
_KVM_CLOCK, _STEAL_TIME = (0x11, 0x12), (0x4B564D03,)

# Bits without state of their own, by register.
PLAIN: dict[Register, frozenset[int]] = {
    # SSE3, PCLMULQDQ, MONITOR, SSSE3, CX16, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, AES, OSXSAVE, RDRAND, a
    # hypervisor
    (1, 0, "ecx"): frozenset((0, 1, 3, 9, 13, 17, 19, 20, 21, 22, 23, 25, 27, 30, 31)),
    # FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, APIC, PGE, CMOV, PSE-36, CLFSH, MMX, FXSR, SSE, SSE2, SS, HTT
    (1, 0, "edx"): frozenset((0, 1, 2, 3, 4, 5, 6, 8, 9, 13, 15, 17, 19, 23, 24, 25, 26, 27, 28)),
    # ARAT: the APIC's timer runs in every C-state
    (6, 0, "eax"): frozenset((2,)),
    # FSGSBASE, BMI1, HLE, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, INVPCID, RTM, ZERO_FCS_FDS, RDSEED, ADX, SMAP, CLFLUSHOPT,
    # CLWB, SHA
    (7, 0, "ebx"): frozenset((0, 3, 4, 6, 7, 8, 9, 10, 11, 13, 18, 19, 20, 23, 24, 29)),
    # PREFETCHWT1, UMIP, GFNI, LA57, CLDEMOTE, MOVDIRI, MOVDIR64B
    (7, 0, "ecx"): frozenset((0, 2, 8, 16, 25, 27, 28)),
    # FSRM, MD_CLEAR, SERIALIZE, TSXLDTRK, FLUSH_L1D, ARCH_CAPABILITIES (read only)
    (7, 0, "edx"): frozenset((4, 10, 14, 16, 28, 29)),
    # SHA512, SM3, SM4, RAO-INT, LASS, CMPCCXADD, FZLRM, FSRS, FSRCS, LKGS, WRMSRNS, LAM
    (7, 1, "eax"): frozenset((0, 1, 2, 3, 6, 7, 10, 11, 12, 18, 19, 26)),
    # MSR_IMM
    (7, 1, "ecx"): frozenset((5,)),
    # PREFETCHI
    (7, 1, "edx"): frozenset((14,)),
    # MCDT_NO
    (7, 2, "edx"): frozenset((5,)),
    # XSAVEOPT, XSAVEC, XGETBV with ECX 1
    (0xD, 1, "eax"): frozenset((0, 1, 2)),
    # LAHF, CmpLegacy, CR8 by LOCK, ABM, SSE4A, MisAlignSse, PREFETCHW, OSVW (read only), TCE, TBM, TopologyExtensions
    (0x80000001, 0, "ecx"): frozenset((0, 1, 4, 5, 6, 7, 8, 9, 17, 21, 22)),
    # those of leaf 1, SYSCALL, NX, MMX extensions, FFXSR, 1 GiB pages, long mode, 3DNow!
    (0x80000001, 0, "edx"): frozenset((0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 15, 17, 20, 22, 23, 24, 25, 26, 29, 30, 31)),
    # McaOverflowRecov, SUCCOR
    (0x80000007, 0, "ebx"): frozenset((0, 1)),
    # the TSC's rate never changes
    (0x80000007, 0, "edx"): frozenset((8,)),
    # CLZERO, RstrFpErrPtrs, WBNOINVD, IBPB, INT_WBINVD, EferLmsleUnsupported, BTC_NO, SSB_NO, IBPB_RET
    (0x80000008, 0, "ebx"): frozenset((0, 2, 9, 12, 13, 20, 26, 29, 30)),
    # NoNestedDataBp, FsGsKernelGsBaseNonSerializing, LFENCE serializes, VERW_CLEAR, NullSelectorClearsBase,
    # AutomaticIBRS (EFER), NoSmmCtlMSR, fast short REP STOSB and CMPSB, PREFETCHI, SBPB, IBPB_BRTYPE, SRSO_NO,
    # SRSO_USER_KERNEL_NO
    (0x80000021, 0, "eax"): frozenset((0, 1, 2, 5, 6, 8, 9, 10, 11, 20, 27, 28, 29, 30)),
    # TSA_SQ_NO, TSA_L1_NO
    (0x80000021, 0, "ecx"): frozenset((1, 2)),
    # NOP_IO_DELAY, PV_UNHALT, PV_TLB_FLUSH's kicks by PV_SEND_IPI, ASYNC_PF_VMEXIT (nested guests), PV_SCHED_YIELD,
    # CLOCKSOURCE_STABLE
    (0x40000001, 0, "eax"): frozenset((1, 7, 10, 11, 13, 24)),
}

# Bits with state, and its XSAVE components and MSRs.
CARRIED: dict[Bit, Carried] = {
    (1, 0, "ecx", 12): Carried("FMA", _AVX),
    (1, 0, "ecx", 24): Carried("TSC-Deadline", msrs=(0x6E0,)),
    (1, 0, "ecx", 26): Carried("XSAVE", (0, 1)),
    (1, 0, "ecx", 28): Carried("AVX", _AVX),
    (1, 0, "ecx", 29): Carried("F16C", _AVX),
    (1, 0, "edx", 7): Carried("MCE", msrs=(0x17A,)),
    (1, 0, "edx", 11): Carried("SEP", msrs=(0x174, 0x175, 0x176)),
    (1, 0, "edx", 12): Carried("MTRR", msrs=(0x2FF, *_range(0x200, 0x20F), 0x250, 0x258, 0x259, *_range(0x268, 0x26F))),
    (1, 0, "edx", 14): Carried("MCA", msrs=(0x17A, 0x17B, *_range(0x400, 0x47F))),
    (1, 0, "edx", 16): Carried("PAT", msrs=(0x277,)),
    (7, 0, "ebx", 1): Carried("TSC_ADJUST", msrs=(0x3B,)),
    (7, 0, "ebx", 5): Carried("AVX2", _AVX),
    (7, 0, "ebx", 14): Carried("MPX", (3, 4), (0xD90,)),
    **{(7, 0, "ebx", bit): Carried("AVX-512", _AVX512) for bit in (16, 17, 21, 26, 27, 28, 30, 31)},
    (7, 0, "ecx", 1): Carried("AVX512_VBMI", _AVX512),
    (7, 0, "ecx", 3): Carried("PKU", (9,)),
    (7, 0, "ecx", 4): Carried("OSPKE", (9,)),
    (7, 0, "ecx", 5): Carried("WAITPKG", msrs=(0xE1,)),
    **{(7, 0, "ecx", bit): Carried("AVX-512", _AVX512) for bit in (6, 11, 12, 14)},
    (7, 0, "ecx", 9): Carried("VAES", _AVX),
    (7, 0, "ecx", 10): Carried("VPCLMULQDQ", _AVX),
    (7, 0, "ecx", 22): Carried("RDPID", msrs=(0xC0000103,)),
    (7, 0, "ecx", 24): Carried("BUS_LOCK_DETECT", msrs=(0x1D9,)),
    **{(7, 0, "edx", bit): Carried("AVX-512", _AVX512) for bit in (2, 3, 8, 23)},
    (7, 0, "edx", 20): Carried("IBT", msrs=(0x6A0, 0x6A2)),
    **{(7, 0, "edx", bit): Carried("SPEC_CTRL", msrs=_SPEC_CTRL) for bit in (26, 27, 31)},
    (7, 1, "eax", 4): Carried("AVX_VNNI", _AVX),
    (7, 1, "eax", 5): Carried("AVX512_BF16", _AVX512),
    (7, 1, "eax", 23): Carried("AVX_IFMA", _AVX),
    **{(7, 1, "edx", bit): Carried("AVX_VNNI_INT", _AVX) for bit in (4, 5, 10)},
    (7, 1, "edx", 19): Carried("AVX10", _AVX512),
    **{(7, 2, "edx", bit): Carried("SPEC_CTRL", msrs=_SPEC_CTRL) for bit in (0, 1, 2, 3, 4)},
    (0xD, 1, "eax", 3): Carried("XSAVES", (0, 1), (0xDA0,)),
    (0x80000001, 0, "ecx", 11): Carried("XOP", _AVX),
    (0x80000001, 0, "ecx", 16): Carried("FMA4", _AVX),
    (0x80000001, 0, "edx", 7): Carried("MCE", msrs=(0x17A,)),
    (0x80000001, 0, "edx", 12): Carried("MTRR", msrs=(0x2FF,)),
    (0x80000001, 0, "edx", 14): Carried("MCA", msrs=(0x17A, 0x17B, *_range(0x400, 0x47F))),
    (0x80000001, 0, "edx", 16): Carried("PAT", msrs=(0x277,)),
    (0x80000001, 0, "edx", 27): Carried("RDTSCP", msrs=(0xC0000103,)),
    **{(0x80000008, 0, "ebx", bit): Carried("SPEC_CTRL", msrs=_SPEC_CTRL) for bit in (14, 15, 16, 17, 18, 19, 24, 28)},
    (0x80000008, 0, "ebx", 25): Carried("VIRT_SSBD", msrs=(0xC001011F,)),
    (0x80000021, 0, "eax", 17): Carried("CpuidUserDis", msrs=(0xC0010015,)),
    (0x40000001, 0, "eax", 0): Carried("CLOCKSOURCE", msrs=_KVM_CLOCK),
    (0x40000001, 0, "eax", 3): Carried("CLOCKSOURCE2", msrs=(0x4B564D00, 0x4B564D01)),
    (0x40000001, 0, "eax", 4): Carried("ASYNC_PF", msrs=(0x4B564D02,)),
    (0x40000001, 0, "eax", 5): Carried("STEAL_TIME", msrs=_STEAL_TIME),
    (0x40000001, 0, "eax", 6): Carried("PV_EOI", msrs=(0x4B564D04,)),
    (0x40000001, 0, "eax", 9): Carried("PV_TLB_FLUSH", msrs=_STEAL_TIME),
    (0x40000001, 0, "eax", 12): Carried("POLL_CONTROL", msrs=(0x4B564D05,)),
    (0x40000001, 0, "eax", 14): Carried("ASYNC_PF_INT", msrs=(0x4B564D06, 0x4B564D07)),
}

_NESTED = "KVM keeps a guest's own guests apart from its vCPUs, and that is not saved"
_PMU = "counters run by the host's time and model: no two hosts have the same"
_ENCRYPTED = "such memory cannot be read, so not saved"
_POWER = "it is the host's, and no guest's"
_TILES = f"AMX's tiles are more than the {XSAVE_AREA} bytes of XSAVE state that are saved"
_TRACE = "its buffers and MSRs are not saved"

# Bits that KVM offers, or may offer, and a guest does not get: name and reason.
HIDDEN: dict[Bit, tuple[str, str]] = {
    (1, 0, "ecx", 2): ("DTES64", _PMU),
    (1, 0, "ecx", 5): ("VMX", _NESTED),
    (1, 0, "ecx", 6): ("SMX", _NESTED),
    (1, 0, "ecx", 15): ("PDCM", _PMU),
    (1, 0, "edx", 21): ("DS", _PMU),
    (1, 0, "edx", 22): ("ACPI", _POWER),
    (6, 0, "ecx", 0): ("APERFMPERF", _POWER),
    (6, 0, "ecx", 3): ("EPB", _POWER),
    (7, 0, "ebx", 2): ("SGX", _ENCRYPTED),
    (7, 0, "ebx", 12): ("RDT-M", _POWER),
    (7, 0, "ebx", 15): ("RDT-A", _POWER),
    (7, 0, "ebx", 25): ("Intel PT", _TRACE),
    (7, 0, "ecx", 7): ("SHSTK", "SSP is in no MSR, and not saved"),
    (7, 0, "ecx", 13): ("TME", _ENCRYPTED),
    (7, 0, "ecx", 23): ("KL", _ENCRYPTED),
    (7, 0, "ecx", 29): ("ENQCMD", "PASIDs are the host's"),
    (7, 0, "ecx", 30): ("SGX_LC", _ENCRYPTED),
    (7, 0, "ecx", 31): ("PKS", "IA32_PKRS is not saved"),
    (7, 0, "edx", 5): ("UINTR", "its MSRs are not saved"),
    (7, 0, "edx", 18): ("PCONFIG", _ENCRYPTED),
    (7, 0, "edx", 19): ("ARCH_LBR", _TRACE),
    (7, 0, "edx", 22): ("AMX-BF16", _TILES),
    (7, 0, "edx", 24): ("AMX-TILE", _TILES),
    (7, 0, "edx", 25): ("AMX-INT8", _TILES),
    (7, 1, "eax", 8): ("ArchPerfmonExt", _PMU),
    (7, 1, "eax", 17): ("FRED", "its MSRs and stack level are not saved"),
    (7, 1, "eax", 21): ("AMX-FP16", _TILES),
    (7, 1, "eax", 22): ("HRESET", _POWER),
    (7, 1, "edx", 8): ("AMX-COMPLEX", _TILES),
    (7, 1, "edx", 18): ("CET_SSS", "SSP is in no MSR, and not saved"),
    (7, 1, "edx", 21): ("APX_F", "its XSAVE component is not looked at yet"),
    (0xD, 1, "eax", 4): ("XFD", "it is there for AMX"),
    (0x80000001, 0, "ecx", 2): ("SVM", _NESTED),
    (0x80000001, 0, "ecx", 10): ("IBS", _TRACE),
    (0x80000001, 0, "ecx", 12): ("SKINIT", _NESTED),
    (0x80000001, 0, "ecx", 15): ("LWP", _TRACE),
    (0x80000001, 0, "ecx", 23): ("PerfCtrExtCore", _PMU),
    (0x80000001, 0, "ecx", 24): ("PerfCtrExtNB", _PMU),
    (0x80000001, 0, "ecx", 28): ("PerfCtrExtLLC", _PMU),
    (0x80000008, 0, "ebx", 3): ("INVLPGB", "it reaches processors that are the host's"),
    (0x80000008, 0, "ebx", 27): ("CPPC", _POWER),
    (0x80000008, 0, "ebx", 31): ("BRS", _TRACE),
    (0x80000021, 0, "eax", 13): ("PrefetchCtlMsr", "its MSR is not saved"),
    (0x40000001, 0, "eax", 15): ("MSI_EXT_DEST_ID", "interrupts here have destinations of 8 bits"),
    (0x40000001, 0, "eax", 16): ("HC_MAP_GPA_RANGE", _ENCRYPTED),
    (0x40000001, 0, "eax", 17): ("MIGRATION_CONTROL", "no machine's owner asks its guest"),
}

# Leaves with details of a hidden feature: cleared.
EMPTY = {
    0xA: "PMU", 0xF: "RDT-M", 0x10: "RDT-A", 0x12: "SGX", 0x14: "Intel PT", 0x19: "KL", 0x1B: "PCONFIG", 0x1C: "LBR",
    0x1D: "AMX", 0x1E: "AMX", 0x22: "SMX", 0x23: "PMU", 0x27: "RDT-M", 0x28: "RDT-A", 0x8000000A: "SVM",
    0x8000001B: "IBS", 0x8000001C: "LWP", 0x8000001F: "SEV", 0x80000020: "PQOS", 0x80000022: "PMU",
    0x80000023: "memory encryption", 0x80000025: "SEV",
}  # fmt: skip

# Known XSAVE components: x87, SSE, AVX, MPX (two), AVX-512 (three), PKRU
COMPONENTS = frozenset((0, 1, 2, 3, 4, 5, 6, 7, 9))

Leaves = dict[tuple[int, int], dict[str, int]]  # by leaf and subleaf: "eax", "ebx", "ecx", "edx"


def _by_register() -> dict[Register, list[tuple[int, Carried]]]:
    table: dict[Register, list[tuple[int, Carried]]] = {register: [] for register in PLAIN}
    for (function, index, register, bit), by in CARRIED.items():
        table.setdefault((function, index, register), []).append((bit, by))
    for function, index, register, _ in HIDDEN:
        table.setdefault((function, index, register), [])
    return table


_CARRIED_BY_REGISTER = _by_register()
REGISTERS = frozenset(_CARRIED_BY_REGISTER)  # those whose bits are features; without those of XSAVE's components


def components(leaves: Leaves) -> frozenset[int]:
    """Return the XSAVE components in these leaves that are known and fit :data:`XSAVE_AREA` (SDM vol. 1, 13)."""
    user = leaves.get((0xD, 0), {"eax": 0, "edx": 0})
    there = user["eax"] | user["edx"] << 32
    places = {number: leaves.get((0xD, number), {"eax": 0, "ebx": XSAVE_AREA + 1}) for number in COMPONENTS - {0, 1}}
    fits = {0, 1} | {number for number, place in places.items() if place["ebx"] + place["eax"] <= XSAVE_AREA}
    return frozenset(number for number in fits if there >> number & 1)


def allowed(register: Register, held: frozenset[int], msrs: frozenset[int]) -> int:
    """Return the bits of a register that a guest may have if these XSAVE components and MSRs are saved."""
    bits = sum(1 << bit for bit in PLAIN.get(register, ()))
    for bit, by in _CARRIED_BY_REGISTER[register]:
        if held.issuperset(by.components) and msrs.issuperset(by.msrs):
            bits |= 1 << bit
    return bits


def edits(leaves: Leaves, saved_msrs: Iterable[int]) -> Iterator[tuple[int, int, str, int]]:
    """Yield the changes to KVM's leaves that hide features whose state is not saved: leaf, subleaf, register and its
    new value."""
    held, msrs = components(leaves), frozenset(saved_msrs)
    for (function, index), values in leaves.items():
        new = dict.fromkeys(values, 0) if function in EMPTY else dict(values)
        for register in values:
            if (function, index, register) in REGISTERS:
                new[register] &= allowed((function, index, register), held, msrs)
        if function == 0xD:
            _xsave(index, new, leaves, held)
        yield from ((function, index, name, value) for name, value in new.items() if value != values[name])


def _xsave(index: int, new: dict[str, int], leaves: Leaves, held: frozenset[int]) -> None:
    if index == 0:
        ends = [leaves[0xD, number]["ebx"] + leaves[0xD, number]["eax"] for number in held - {0, 1}]
        new["eax"], new["edx"] = sum(1 << number for number in held), 0
        new["ecx"] = max([576, *ends]) if held else 0  # bytes for all; EBX, for those enabled, KVM keeps right
    elif index == 1:  # supervisor components: none is in the area that KVM gives, whose format is the standard one
        new["ecx"] = new["edx"] = 0
    elif index not in held:
        new.update(dict.fromkeys(new, 0))


def withheld(leaves: Leaves, saved_msrs: Iterable[int]) -> list[str]:
    """Return what these leaves offer and a guest does not get: features by name, XSAVE components by number, unknown
    bits by position."""
    named: dict[Bit, str] = {
        **{bit: by.name for bit, by in CARRIED.items()},
        **{b: name for b, (name, _) in HIDDEN.items()},
    }
    lost: dict[str, None] = {}
    for function, index, register, value in edits(leaves, saved_msrs):
        gone = leaves[function, index][register] & ~value
        if function in EMPTY:
            lost[EMPTY[function]] = None
        elif (function, index, register) == (0xD, 0, "eax"):
            lost.update((f"XSAVE component {bit}", None) for bit in range(32) if gone >> bit & 1)
        elif (function, index, register) in REGISTERS:
            where = f"CPUID.{function:X}H.{index}:{register.upper()}"
            bits = (bit for bit in range(32) if gone >> bit & 1)
            lost.update((named.get((function, index, register, bit), f"{where}[{bit}]"), None) for bit in bits)
    return list(lost)


def unknown(leaves: Leaves) -> list[str]:
    """Return the feature bits in these leaves that no table here has: they are cleared until a developer classifies
    them."""
    known = {*CARRIED, *HIDDEN, *((*register, bit) for register, bits in PLAIN.items() for bit in bits)}
    return [
        f"CPUID.{function:X}H.{index}:{register.upper()}[{bit}]"
        for (function, index), values in leaves.items()
        for register, value in values.items()
        if (function, index, register) in REGISTERS
        for bit in range(32)
        if value >> bit & 1 and (function, index, register, bit) not in known
    ]
