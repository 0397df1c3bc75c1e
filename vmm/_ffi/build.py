"""Make ``vmm._native``: cffi in API mode over the declarations sliced out of ``native/include/vmmcore.h``.

The header is the only declaration of the native half; the compiler checks every line of the slice against it.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "native" / "include" / "vmmcore.h"

# Python behind the (function, opaque) pairs that native code calls. Defined in vmm/_ffi/__init__.py.
UPCALLS = """
extern "Python" {
    uint64_t vmm_py_read(void *opaque, uint64_t offset, uint32_t size);
    void vmm_py_write(void *opaque, uint64_t offset, uint32_t size, uint64_t value);
}
"""


def declarations() -> str:
    """The part of the header between the cdef marks, without comments."""
    text = HEADER.read_text()
    sliced = text.split("/* cdef: begin */")[1].split("/* cdef: end */")[0]
    return re.sub(r"/\*.*?\*/", "", sliced, flags=re.DOTALL)


builder = FFI()
builder.cdef(declarations() + UPCALLS)
builder.set_source(
    "vmm._native",
    '#include "vmmcore.h"\n',
    include_dirs=["native/include"],
    extra_objects=["build/native/libvmmcore.a"],
    depends=["native/include/vmmcore.h", "build/native/libvmmcore.a"],
    extra_compile_args=["-std=c11", "-O2"],
    libraries=["pthread"],
)

if __name__ == "__main__":
    builder.compile(verbose=True)
