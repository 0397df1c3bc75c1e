"""Words for a Linux kernel's command line on hosts whose KVM cannot run everything the kernel might use.

The other remedies (completing instructions, repairing SYSCALL) are native: ``native/compat``.
"""

from __future__ import annotations

# CPUID cannot hide these from the guest on such hosts, so the command line does: the kernel's own code then uses only
# what KVM's emulator supports. User space still has them, natively. Numbers (word * 32 + bit of Linux's cpufeatures.h),
# not names: the kernel reads at most 127 characters. Last two words: without erms and fsrm Linux copies with
# `rep movsq`, an eighth of the emulated iterations of `rep movsb`; with a TSC deadline timer it would rely on the
# local APIC's tick even when told not to (apic_needs_pit), and have none.
_CLEARED = {
    "ssse3": 137, "cx16": 141, "pclmulqdq": 129, "sse4_1": 147, "sse4_2": 148, "movbe": 150,
    "popcnt": 151, "tsc_deadline_timer": 152, "aes": 153, "xsave": 154, "avx": 156, "rdrand": 158, "abm": 197,
    "fsgsbase": 288, "bmi1": 291, "avx2": 293, "bmi2": 296, "erms": 297, "invpcid": 298, "avx512f": 304,
    "rdseed": 306, "adx": 307, "smap": 308, "clflushopt": 311, "clwb": 312, "sha_ni": 317, "fsrm": 580,
}  # fmt: skip
# Programs see the processor's own CPUID all the same, and the C library's string functions would use vector registers
# that a kernel told of no XSAVE neither saves nor restores: a copy that is interrupted between load and store stores
# another program's bytes. glibc listens to this (2.33 and later; names of its cpu_features); the kernel hands words it
# does not know to its first process as environment.
_UNSAVED = ("AVX", "AVX2", "AVX512F", "AVX512VL", "AVX512BW", "AVX_Fast_Unaligned_Load")

CLEARCPUID_LIMIT = 127  # char arg[128] in arch/x86/kernel/cpu/common.c

# Where the guest's TSC cannot be set, it neither goes back with a roll-back nor waits in a snapshot: a kernel that
# keeps time by it would find itself minutes late, and say that its processors had stalled. kvmclock can be set
# everywhere.
KEEP_TIME = ["clocksource=kvm-clock"]


def linux_cmdline() -> list[str]:
    """Words for the kernel command line on a host that emulates guest kernel code.

    Such a host spends milliseconds on every timer tick, so ticks come from our own PIT, which merges them
    (``nolapic_timer``), and the crypto self-tests, minutes of arithmetic, are left out.
    """
    return [
        "clearcpuid=" + ",".join(str(bit) for bit in _CLEARED.values()),
        "mitigations=off",
        "nolapic_timer",
        "highres=off",
        "no_timer_check",
        "cryptomgr.notests",
        "GLIBC_TUNABLES=glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in _UNSAVED),
    ]
