"""What a Linux kernel is told on its command line where KVM cannot run everything it might use.

The other remedies (completing instructions, repairing SYSCALL) are native: ``native/compat``.
"""

from __future__ import annotations

# CPUID cannot hide these from the guest on such hosts, so the kernel is asked to: its own code then keeps to what
# KVM's emulator knows. User space still has them, natively. erms and fsrm: without them Linux copies with
# `rep movsq`, an eighth of the emulated iterations of `rep movsb`.
_CLEARED = (
    "smap,xsave,popcnt,cx16,fsgsbase,rdrand,rdseed,pclmulqdq,ssse3,sse4_1,sse4_2,avx,avx2,avx512f,aes,movbe,"
    "bmi1,bmi2,invpcid,adx,clflushopt,clwb,sha_ni,erms,fsrm"
)


def linux_cmdline() -> list[str]:
    """Words for the kernel command line on a host that emulates guest kernel code."""
    return [f"clearcpuid={_CLEARED}", "mitigations=off", "highres=off", "cryptomgr.notests"]
