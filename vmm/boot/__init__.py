"""Images into guest memory: bzImage, vmlinux, PVH, multiboot, bare-metal ELF, flat binaries; ACPI tables."""

from __future__ import annotations

from vmm.boot.entry import Entry
from vmm.boot.image import Image
from vmm.boot.loader import KINDS, UNPACK, identify, load

__all__ = ["KINDS", "UNPACK", "Entry", "Image", "identify", "load"]
