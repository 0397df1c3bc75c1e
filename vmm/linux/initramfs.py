"""Initramfs archives in cpio's newc format (Documentation/driver-api/early-userspace/buffer-format.rst).

They are written uncompressed: the kernel copies what it unpacks page by page, but decompressing is a hundred times
the instructions. For the same reason there is one busybox and no forest of links: its shell finds its applets
by itself.

A command's exit status leaves the guest twice. The console gets a line "pyvmm: exit status N", which works under
every kernel and console. A status other than 0 is also written to the isa-debug-exit port, through /dev/port
(CONFIG_DEVPORT: in the small kernel and in Debian's), so that the machine's outcome says it without reading the
console: pyvmm then exits with (N << 1) | 1, QEMU's semantics. Status 0, or no such port: the guest powers off.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from vmm.errors import ConfigError, HostError
from vmm.linux import store

STATUS_LINE = "pyvmm: exit status "
BEGIN_LINE = "pyvmm: command"  # the command's output begins behind it

_TRAILER = "TRAILER!!!"
# The kernel's unpacker refuses longer names (init/initramfs.c, do_header: PATH_MAX with the NUL).
_NAME_MAX = 4095
# newc's fields are 32 bits.
_SIZE_MAX = 0xFFFFFFFF

_FSTAB = b"proc /proc proc\nsysfs /sys sysfs\ndevtmpfs /dev devtmpfs\n"


class Entry:
    """One name in an archive: what is there, its mode (type and permissions, as st_mode), its owner being root.

    ``content`` is a file's bytes, or the host file (Path) that has them, read when the archive is built; for a
    symbolic link its target. ``device`` is (major, minor) of a device node. ConfigError: the name is empty,
    too long, has a NUL, or leaves the archive through "..".
    """

    __slots__ = ("content", "device", "mode", "name")

    def __init__(self, name: str, mode: int, content: bytes | Path = b"", device: tuple[int, int] = (0, 0)) -> None:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or ".." in parts or "\0" in name or len(os.fsencode("/".join(parts))) > _NAME_MAX:
            raise ConfigError(f"{name!r} cannot be a name in an initramfs: give a path below its root")
        if parts == [_TRAILER]:
            raise ConfigError(f"an initramfs cannot hold a file {_TRAILER}: the name marks its end")
        self.name = "/".join(parts)
        self.mode = mode
        self.content = content
        self.device = device


def file(name: str, content: bytes | Path, permissions: int = 0o755) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | permissions, content)


def directory(name: str, permissions: int = 0o755) -> Entry:
    """A directory; the parents of every entry come by themselves."""
    return Entry(name, stat.S_IFDIR | permissions)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to ``target``, which is taken as it is."""
    return Entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node; making it takes no privilege here."""
    return Entry(name, stat.S_IFCHR | permissions, device=(major, minor))


def tree(host: Path, below: str = "") -> list[Entry]:
    """The directory ``host`` and all in it as entries below ``below`` (default: the root), owned by root.

    Symbolic links stay links; sockets and FIFOs are left out. ConfigError: no such directory.
    """
    if not host.is_dir():
        raise ConfigError(f"{host} is not a directory; give the path of one")
    entries = []
    for top, directories, names in os.walk(host):
        inside = Path(below) / Path(top).relative_to(host)
        for name in directories + names:
            path = Path(top, name)
            info = path.lstat()
            kind = stat.S_IFMT(info.st_mode)
            content: bytes | Path = b""
            device = (0, 0)
            if kind == stat.S_IFREG:
                content = path
            elif kind == stat.S_IFLNK:
                content = os.fsencode(path.readlink())
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                device = (os.major(info.st_rdev), os.minor(info.st_rdev))
            elif kind != stat.S_IFDIR:
                continue
            entries.append(Entry(str(inside / name), info.st_mode, content, device))
    return entries


def build(entries: Iterable[Entry]) -> bytes:
    """The archive of ``entries``, in memory. The same entries give the same bytes, in whatever order they come.

    Of several entries with one name the last counts. ConfigError: a host file cannot be read, or is too large.
    """
    named: dict[str, Entry] = {}
    for entry in entries:
        named[entry.name] = entry
    for name in list(named):
        while "/" in name:
            name = name.rpartition("/")[0]
            named.setdefault(name, directory(name))
    archive = bytearray()
    # A parent's name is a prefix of its children's, so sorting puts it first, as the unpacker needs.
    for inode, name in enumerate(sorted(named), 1):
        _append(archive, inode, named[name])
    _append_record(archive, 0, 0, os.fsencode(_TRAILER), b"", (0, 0))
    return bytes(archive)


def save(archive: bytes) -> Path:
    """``archive`` as a file of the cache, named by its content. HostError: the cache cannot be written."""
    import hashlib

    place = store.root() / "initramfs" / hashlib.sha256(archive).hexdigest()[:32]
    return store.made(place, lambda temporary: _write(temporary / "initramfs.cpio", archive)) / "initramfs.cpio"


def default(busybox: Path | None = None, entries: Iterable[Entry] = ()) -> Path:
    """An initramfs with an interactive shell on the console; the machine powers off when the shell exits.

    ``busybox``: a static one (default: the host's, or Debian's). ``entries`` come on top, and may replace what
    is there. HostError: no busybox to be had.
    """
    shell = file("etc/shell", _script("shell.sh"), 0o644)
    return save(build([*_base(busybox, "init-shell.sh"), shell, *entries]))


def command(
    argv: list[str],
    busybox: Path | None = None,
    entries: Iterable[Entry] = (),
    shares: Iterable[tuple[str, str]] = (),
) -> Path:
    """An initramfs that runs ``argv``, reports its exit status (this module's first lines) and powers off.

    ``argv[0]`` is a path in the archive or a busybox applet. ``shares`` are virtio-fs tags with mount options; each is
    mounted at /mnt/TAG. ConfigError: ``argv`` is empty or holds a NUL.
    HostError: no busybox to be had.
    """
    import shlex

    if not argv or any("\0" in word for word in argv):
        raise ConfigError("the command to run in the guest needs at least one word, and none with a NUL")
    words = "set -- " + " ".join(shlex.quote(word) for word in argv) + "\n"
    argument_file = file("etc/argv", os.fsencode(words), 0o644)
    shares = list(shares)
    mounts = [directory(f"mnt/{tag}") for tag, _ in shares]
    table = _FSTAB + b"".join(_mount_line(tag, options) for tag, options in shares)
    fstab = file("etc/fstab", table, 0o644)
    return save(build([*_base(busybox, "init-command.sh"), argument_file, fstab, *mounts, *entries]))


def network(leases: Iterable[bool]) -> list[Entry]:
    """What the first process brings a machine's interfaces up with; for each of them, whether it is to get a lease."""
    up = ""
    for number, lease in enumerate(leases):
        up += f"/bin/busybox ip link set eth{number} up\n"
        if lease:
            up += f"/bin/busybox udhcpc -i eth{number} -s /etc/lease -n -q -t 5 -T 2 >/dev/null 2>&1 ||\n"
            up += f'\techo "eth{number} got no address"\n'
    if not up:
        return []
    return [file("etc/up", up.encode(), 0o644), file("etc/lease", _script("lease.sh"))]


def _mount_line(tag: str, options: str) -> bytes:
    # fstab(5): what would end a field is written in octal.
    field = "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in tag)
    return os.fsencode(f"{field} /mnt/{field} virtiofs {options}\n")


def _script(name: str) -> bytes:
    from importlib import resources

    return (resources.files("vmm.linux") / name).read_bytes()


def _base(busybox: Path | None, init: str) -> list[Entry]:
    if busybox is None:
        from vmm.linux import debian

        busybox = debian.busybox()
    return [
        # The kernel opens /dev/console for init before anything is mounted.
        character_device("dev/console", 5, 1),
        character_device("dev/null", 1, 3, 0o666),
        directory("proc"),
        directory("sys"),
        directory("tmp", 0o1777),
        file("etc/fstab", _FSTAB, 0o644),
        file("bin/busybox", busybox),
        symlink("bin/sh", "busybox"),
        file("init", _script(init)),
    ]


def _append(archive: bytearray, inode: int, entry: Entry) -> None:
    content = entry.content
    if isinstance(content, Path):
        host = content
        try:
            content = host.read_bytes()
        except OSError as error:
            raise ConfigError(f"{host}: {error.strerror}: it was to go into the initramfs") from error
    if len(content) > _SIZE_MAX:
        raise ConfigError(f"{entry.name}: {len(content)} bytes are too many for an initramfs; at most 4 GiB - 1")
    _append_record(archive, inode, entry.mode, os.fsencode(entry.name), content, entry.device)


def _append_record(
    archive: bytearray, inode: int, mode: int, name: bytes, content: bytes, device: tuple[int, int]
) -> None:
    links = 2 if stat.S_ISDIR(mode) else 1
    owner = group = mtime = 0
    fields = (inode, mode, owner, group, links, mtime, len(content), 0, 0, *device, len(name) + 1, 0)
    archive += b"070701" + b"".join(b"%08X" % field for field in fields)
    # Header with name, and content, are each padded to 4 bytes.
    archive += name + b"\0"
    archive += bytes(-len(archive) % 4)
    archive += content
    archive += bytes(-len(archive) % 4)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}: set PYVMM_CACHE elsewhere", error.errno or 0) from error
