"""Linux bzImage (Documentation/arch/x86/boot.rst, protocol 2.06 and later), entered in 64-bit mode.

Two ways in. *Host*: the compressed payload inside is unpacked here, once (it is kept in a cache), and the ELF
file found in it is entered directly. *Guest*: the image goes to memory as it is and unpacks itself, as under
a boot loader; slower, but it works whatever the payload is, and only so does KASLR take place.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.boot import elf, payload, places, zeropage
from vmm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from vmm.boot.entry import Entry
    from vmm.boot.image import Image
    from vmm.boot.request import Request

_MAGIC = b"HdrS"
_BOOT_FLAG = 0xAA55
_LOADED_HIGH = 0x01
_XLF_KERNEL_64 = 0x0001
_ENTRY64 = 0x200
_SECTOR = 512
_OLDEST = 0x0206
_HEAD = 0x290

# (name, offset in the image, struct code, first protocol that has it, value before that)
_FIELDS: tuple[tuple[str, int, str, int, int], ...] = (
    ("setup_sects", 0x1F1, "B", 0, 0),
    ("syssize", 0x1F4, "I", 0, 0),
    ("boot_flag", 0x1FE, "H", 0, 0),
    ("version", 0x206, "H", 0, 0),
    ("kernel_version", 0x20E, "H", 0, 0),
    ("loadflags", 0x211, "B", 0, 0),
    ("code32_start", 0x214, "I", 0, 0),
    ("initrd_addr_max", 0x22C, "I", 0x0203, 0x37FFFFFF),
    ("kernel_alignment", 0x230, "I", 0x0205, 0),
    ("relocatable_kernel", 0x234, "B", 0x0205, 0),
    ("xloadflags", 0x236, "H", 0x020C, 0),
    ("cmdline_size", 0x238, "I", 0x0206, 255),
    ("payload_offset", 0x248, "I", 0x0208, 0),
    ("payload_length", 0x24C, "I", 0x0208, 0),
    ("pref_address", 0x258, "Q", 0x020A, 0x100000),
    ("init_size", 0x260, "I", 0x020A, 0),
)


class SetupHeader:
    """The fields of struct setup_header that loading depends on, checked against each other and the file.

    Names and meanings are the boot protocol's; a field younger than the image's protocol has its documented
    value.
    ``setup_size`` is where the protected-mode kernel begins in the file, ``kernel_size`` its length, ``raw``
    the header's bytes from 0x1f1 on, ``release`` the version string the image carries, or "". Immutable.
    """

    __slots__ = (*(field[0] for field in _FIELDS), "kernel_size", "raw", "release", "setup_size")

    setup_sects: int
    syssize: int
    boot_flag: int
    version: int
    kernel_version: int
    loadflags: int
    code32_start: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable_kernel: int
    xloadflags: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int
    setup_size: int
    kernel_size: int
    raw: bytes
    release: str

    def __init__(self, image: Image) -> None:
        """Read and check. ImageError: not a bzImage, too old, truncated, or a field that cannot be true."""
        name = image.name
        head = image.head(_HEAD)
        if not is_bzimage(head):
            raise ImageError(f"{name}: no Linux setup header ('HdrS' at 0x202); this is not a bzImage")
        version = struct.unpack_from("<H", head, 0x206)[0]
        if version < _OLDEST:
            raise ImageError(
                f"{name}: boot protocol {version >> 8}.{version & 0xFF:02} is older than 2.06; "
                "use Linux 2.6.22 or newer"
            )
        head = head.ljust(_HEAD, b"\0")
        end = 0x202 + head[0x201]
        if not 0x23C <= end <= zeropage.HEADER_END:
            raise ImageError(f"{name}: setup header ends at {end:#x}, outside 0x23c..0x290; the image is damaged")
        put = object.__setattr__
        put(self, "raw", head[zeropage.HEADER : end])
        for field, offset, code, since, default in _FIELDS:
            known = version >= since and offset + struct.calcsize(code) <= end
            put(self, field, struct.unpack_from("<" + code, head, offset)[0] if known else default)
        # boot.rst: "if the setup_sects field contains 0, the real value is 4".
        put(self, "setup_size", ((self.setup_sects or 4) + 1) * _SECTOR)
        put(self, "kernel_size", min(image.size - self.setup_size, self.syssize * 16))
        self._check(image)
        put(self, "release", self._read_release(image))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a setup header cannot be changed ({name})")

    def _check(self, image: Image) -> None:
        name = image.name
        if self.boot_flag != _BOOT_FLAG:
            raise ImageError(f"{name}: boot flag {self.boot_flag:#x} instead of 0xaa55; the image is damaged")
        # syssize counts 16-byte paragraphs, rounded up.
        if self.kernel_size <= 0 or image.size + 15 < self.setup_size + self.syssize * 16:
            raise ImageError(
                f"{name}: truncated: the header promises {self.setup_size + self.syssize * 16:#x} bytes, "
                f"the file has {image.size:#x}; fetch or build it again"
            )
        if not self.loadflags & _LOADED_HIGH:
            raise ImageError(f"{name}: a zImage (loaded low); only bzImages can be booted")
        align = self.kernel_alignment
        if self.relocatable_kernel and (align == 0 or align & (align - 1) or align > places.GIB):
            raise ImageError(
                f"{name}: kernel alignment {align:#x} is no power of two up to 1 GiB; the image is damaged"
            )
        if self.payload_offset + self.payload_length > self.kernel_size:
            raise ImageError(
                f"{name}: payload at {self.payload_offset:#x}+{self.payload_length:#x} leaves the kernel of "
                f"{self.kernel_size:#x} bytes; the image is damaged"
            )
        if self.code32_start == 0:
            raise ImageError(
                f"{name}: begins in real mode and needs a BIOS (it has a setup header, as iPXE's images do, whose "
                "code32_start names no other entry); this machine has none: use a kernel with a 64-bit entry, or a PVH "
                "or multiboot image"
            )
        for field, address in (("pref_address", self.pref_address), ("code32_start", self.code32_start)):
            if not places.HIGH_RAM <= address < places.HOLE:
                raise ImageError(f"{name}: {field} {address:#x} is outside 1 MiB..3 GiB; the image is damaged")
        if self.initrd_addr_max < places.HIGH_RAM:
            raise ImageError(f"{name}: initrd_addr_max {self.initrd_addr_max:#x} is below 1 MiB; the image is damaged")

    def _read_release(self, image: Image) -> str:
        offset = self.kernel_version + _SECTOR
        if not self.kernel_version or offset >= self.setup_size:
            return ""
        text = image.read(offset, min(self.setup_size - offset, 128)).split(b"\0")[0]
        words = text.decode("ascii", "replace").split()
        return words[0] if words and words[0].isprintable() else ""


def is_bzimage(head: bytes) -> bool:
    """Whether an image that begins with ``head`` (0x290 bytes do) has a Linux setup header."""
    return len(head) >= 0x208 and head[0x202:0x206] == _MAGIC


def load(request: Request, unpack: str) -> Entry:
    """Load a bzImage. ``unpack``: "host", "guest", or "auto": on the host where that is possible.

    ImageError: damaged, 32-bit only, or "host" asked for and not possible. ConfigError: command line too
    long.
    """
    header = SetupHeader(request.image)
    _need_memory(request, header)
    major, minor = header.version >> 8, header.version & 0xFF
    request.notes.append(f"bzImage {header.release or '(no version string)'}, boot protocol {major}.{minor:02}")
    if unpack == "guest":
        return _load_packed(request, header)
    try:
        kernel = _open_payload(request, header)
    except payload.CannotUnpack as reason:
        if unpack == "host":
            raise ImageError(f"{request.image.name}: {reason}; leave the unpacking to the guest") from None
        request.notes.append(f"unpacked by the guest: {reason}")
        return _load_packed(request, header)
    with kernel:
        return _load_unpacked(request, header, elf.parse(kernel))


def _need_memory(request: Request, header: SetupHeader) -> None:
    # init_size counts from the address the kernel runs at (boot.rst, init_size).
    request.claims.need_ram(header.pref_address, max(header.init_size, header.kernel_size), "the running kernel")


def _open_payload(request: Request, header: SetupHeader) -> Image:
    # init_size covers the unpacked image with its relocations (arch/x86/boot/header.S), so nothing honest is
    # larger; before 2.10 the guest's low RAM is the only bound there is.
    bound = header.init_size or request.claims.low_end
    return payload.open_unpacked(
        request.image, header.setup_size + header.payload_offset, header.payload_length, bound, request.notes
    )


def _load_unpacked(request: Request, header: SetupHeader, kernel: elf.Elf) -> Entry:
    if kernel.bits != 64:
        raise ImageError(f"{request.image.name}: a 32-bit kernel; only 64-bit ones (x86-64) can be booted")
    # The relocations that may follow the ELF file are for kernels that run elsewhere than where they were
    # linked.
    kernel.load(request.claims, clear_bss=False)
    request.claims.keep_clear(header.pref_address, header.init_size, "the running kernel")
    request.notes.append(f"entered at {kernel.physical_entry():#x}, segments at {kernel.low:#x}..{kernel.high:#x}")
    return _enter(request, header, kernel.physical_entry(), kernel.low)


def _load_packed(request: Request, header: SetupHeader) -> Entry:
    if not header.xloadflags & _XLF_KERNEL_64:
        raise ImageError(
            f"{request.image.name}: no 64-bit entry point (xloadflags {header.xloadflags:#x}): a 32-bit "
            "kernel, one older than Linux 3.8 that cannot be unpacked here, or a program that begins in real mode and "
            "needs a BIOS, which this machine has not; use a 64-bit kernel"
        )
    # A kernel that cannot be relocated is loaded at code32_start and moves itself to pref_address.
    address = header.pref_address if header.relocatable_kernel else header.code32_start
    request.claims.claim(address, header.kernel_size, "the kernel image")
    request.claims.read(request.image, header.setup_size, address, header.kernel_size)
    request.claims.keep_clear(header.pref_address, header.init_size, "the running kernel")
    request.notes.append(f"loaded at {address:#x}, entered at its 64-bit entry {address + _ENTRY64:#x}")
    return _enter(request, header, address + _ENTRY64, address)


def _enter(request: Request, header: SetupHeader, rip: int, load_address: int) -> Entry:
    if not header.cmdline_size:
        raise ConfigError(f"{request.image.name}: the setup header allows no command line; the image is damaged")
    return zeropage.enter_linux(
        request,
        kind="bzimage",
        rip=rip,
        header=header.raw,
        load_address=load_address,
        cmdline_max=header.cmdline_size,
        initrd_addr_max=header.initrd_addr_max,
    )
