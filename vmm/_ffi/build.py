"""Build ``vmm._native``: cffi in API mode over the declarations sliced out of ``native/include/*.h``.

The headers are the only declaration of the native half; the compiler checks every line of the slices against them.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "native" / "include"

# Python behind the (function, opaque) pairs that native code calls. Defined in vmm/_ffi/__init__.py.
UPCALLS = """
extern "Python" {
    uint64_t vmm_py_read(void *opaque, uint64_t offset, uint32_t size);
    void vmm_py_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value);
    void vmm_py_hook_access(void *opaque, vmm_access *access);
    void vmm_py_hook_exit(void *opaque, uint32_t vcpu, const vmm_exit_record *record);
    void vmm_py_say(void *opaque, const char *text);
    void vmm_py_virtio_start(void *opaque);
    void vmm_py_virtio_kick(void *opaque, uint32_t queue);
    void vmm_py_virtio_stop(void *opaque);
    void vmm_py_virtio_quiesce(void *opaque);
}
"""

# KVM's own numbers (<linux/kvm.h>) that Python names; the compiler gives their values.
KVM_NUMBERS = [
    "KVM_CAP_IRQCHIP", "KVM_CAP_USER_MEMORY", "KVM_CAP_EXT_CPUID", "KVM_CAP_NR_VCPUS", "KVM_CAP_NR_MEMSLOTS",
    "KVM_CAP_MP_STATE", "KVM_CAP_IRQFD", "KVM_CAP_PIT2", "KVM_CAP_IOEVENTFD", "KVM_CAP_MAX_VCPUS",
    "KVM_CAP_SYNC_REGS", "KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER",
    "KVM_CAP_BINARY_STATS_FD", "KVM_CAP_EXIT_ON_EMULATION_FAILURE", "KVM_EXIT_UNKNOWN", "KVM_EXIT_EXCEPTION",
    "KVM_EXIT_IO", "KVM_EXIT_HYPERCALL", "KVM_EXIT_DEBUG", "KVM_EXIT_HLT", "KVM_EXIT_MMIO",
    "KVM_EXIT_IRQ_WINDOW_OPEN", "KVM_EXIT_SHUTDOWN", "KVM_EXIT_FAIL_ENTRY", "KVM_EXIT_INTR",
    "KVM_EXIT_INTERNAL_ERROR", "KVM_EXIT_SYSTEM_EVENT", "KVM_EXIT_X86_RDMSR", "KVM_EXIT_X86_WRMSR",
    "KVM_MP_STATE_RUNNABLE", "KVM_MP_STATE_UNINITIALIZED", "KVM_MP_STATE_INIT_RECEIVED", "KVM_MP_STATE_HALTED",
    "KVM_MP_STATE_SIPI_RECEIVED",
]  # fmt: skip


# Headers of the core in the order of dependence, as native/include/vmmcore.h has them.
CORE = ["error", "vm", "memory", "dirty", "line", "bus", "vcpu", "state", "checkpoint", "run", "history", "compat",
        "console", "uart"]  # fmt: skip


def headers() -> list[str]:
    """Return the headers of the boundary in order of dependence: the core, virtio, then their users."""
    first = [*(f"vmm/{name}.h" for name in CORE), "vmmvirtio.h"]
    rest = sorted(path.name for path in INCLUDE.glob("vmm*.h") if path.name != "vmmcore.h")
    return first + [name for name in rest if name not in first]


def declarations() -> str:
    """Return the parts of the headers between the cdef marks, without comments."""
    sliced = ""
    for header in headers():
        sliced += (INCLUDE / header).read_text().split("/* cdef: begin */")[1].split("/* cdef: end */")[0]
    return re.sub(r"/\*.*?\*/", "", sliced, flags=re.DOTALL)


builder = FFI()
builder.cdef(declarations() + UPCALLS + "".join(f"#define {name} ...\n" for name in KVM_NUMBERS))
builder.set_source(
    "vmm._native",
    "#include <linux/kvm.h>\n" + "".join(f'#include "{header}"\n' for header in headers()),
    include_dirs=["native/include"],
    extra_objects=["build/native/libvmmcore.a"],
    depends=[*(f"native/include/{header}" for header in headers()), "build/native/libvmmcore.a"],
    extra_compile_args=["-std=c11", "-O2"],
    libraries=["pthread"],
)

if __name__ == "__main__":
    builder.compile(verbose=True)
