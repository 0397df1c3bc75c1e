"""Initial ram disks and boot modules: read straight into the top of low RAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.boot.request import Request

# Far above any use, and it keeps the module tables within their page.
MODULES_MAX = 64
_NAME_MAX = 255


def place_concatenated(request: Request, addr_max: int) -> tuple[int, int]:
    """All initrds in one piece, each at a multiple of 4 bytes as the kernel's unpacker wants archives.

    ``addr_max`` is the highest address the last byte may have (setup header, initrd_addr_max). Returns
    (address, size), zeros without initrds. ImageError: it does not fit.
    """
    if not request.initrds:
        return 0, 0
    offsets = []
    size = 0
    for initrd in request.initrds:
        size = (size + 3) & ~3
        offsets.append(size)
        size += initrd.size
    claims = request.claims
    gpa = claims.claim_top(size, addr_max + 1, _title(request))
    end = 0
    for initrd, offset in zip(request.initrds, offsets, strict=True):
        claims.memory.write(gpa + end, bytes(offset - end))
        claims.read(initrd, 0, gpa + offset, initrd.size)
        end = offset + initrd.size
    request.notes.append(f"initrd: {size} bytes at {gpa:#x}")
    return gpa, size


def place_modules(request: Request) -> list[tuple[int, int, str]]:
    """Each initrd as a page-aligned module of its own: (address, size, name). ImageError: it does not fit."""
    if len(request.initrds) > MODULES_MAX:
        raise ConfigError(f"{len(request.initrds)} boot modules; at most {MODULES_MAX} can be passed")
    modules = []
    for initrd in request.initrds:
        gpa = request.claims.claim_top(initrd.size, request.claims.low_end, f"{initrd.name}: module")
        request.claims.read(initrd, 0, gpa, initrd.size)
        request.notes.append(f"module {initrd.name}: {initrd.size} bytes at {gpa:#x}")
        modules.append((gpa, initrd.size, initrd.name))
    return modules


def module_name(name: str) -> bytes:
    """``name`` as the NUL-terminated string a module table points at; cut so that 64 of them fit 24 KiB."""
    return name.encode("utf-8", "surrogateescape").replace(b"\0", b"?")[:_NAME_MAX] + b"\0"


def _title(request: Request) -> str:
    names = ", ".join(initrd.name for initrd in request.initrds)
    return f"{names}: initrd"
