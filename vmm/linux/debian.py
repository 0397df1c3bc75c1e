"""Packages from the Debian archive, downloaded and unpacked below the cache: no root, nothing is installed.

    <cache>/debian/<package>_<version>_<architecture>/    the package's files, as it would install them

apt does the finding, the downloading and the checking of signatures and hashes, by the lists it already has.
What was fetched once is used again without apt when apt cannot help (no network, no lists, another
distribution), so that a machine that has booted once will boot again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vmm.errors import ConfigError, HostError
from vmm.linux import store

# Stock kernels by the short name a user gives: the metapackage that depends on the current one.
FLAVOURS = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}

# Package names (Debian policy 5.6.1): nothing that apt would take for an option, a version or a pattern.
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+-.")


class DebianPackage:
    """An unpacked package: ``name``, ``version`` (as in its file name) and ``root``, below which its files are."""

    __slots__ = ("name", "root", "version")

    def __init__(self, name: str, version: str, root: Path) -> None:
        self.name = name
        self.version = version
        self.root = root


class StockKernel:
    """A distribution's kernel: ``vmlinuz`` (bzImage), ``modules`` (lib/modules/VERSION) and ``version``."""

    __slots__ = ("modules", "version", "vmlinuz")

    def __init__(self, vmlinuz: Path, modules: Path, version: str) -> None:
        self.vmlinuz = vmlinuz
        self.modules = modules
        self.version = version


def fetch(package: str, progress: store.Progress = store.quiet) -> DebianPackage:
    """The current version of ``package``, downloaded and unpacked unless it is already.

    ConfigError: not a package name. HostError: this host has no apt, does not know the package, or could not
    download or unpack it, and no earlier version is there either.
    """
    if len(package) < 2 or not _NAME_CHARACTERS.issuperset(package) or not package[0].isalnum():
        raise ConfigError(
            f"{package!r} is not the name of a Debian package; use lower-case letters, digits, +, - and ."
        )
    try:
        deb = _archive_entry(package)
    except HostError:
        earlier = _newest(package)
        if earlier is None:
            raise
        return earlier
    place = _directory() / deb.name.removesuffix(".deb").replace("%3a", ":")
    store.made(place, lambda temporary: _unpack(package, deb, temporary, progress), progress)
    return _package_at(place)


def stock_kernel(flavour: str = "cloud", progress: store.Progress = store.quiet) -> StockKernel:
    """Debian's current kernel of that flavour ("cloud", "generic"), untouched.

    ConfigError: no such flavour. HostError: as ``fetch``.
    """
    if flavour not in FLAVOURS:
        raise ConfigError(f"no kernel flavour {flavour!r}: one of {', '.join(sorted(FLAVOURS))}")
    package = fetch(_image_package(FLAVOURS[flavour]), progress)
    images = sorted((package.root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise HostError(f"{package.root}: expected one boot/vmlinuz-*, found {len(images)}; remove it and retry")
    version = images[0].name.removeprefix("vmlinuz-")
    # Since Debian 13 the modules lie under usr/lib.
    modules = package.root / "lib/modules" / version
    if not modules.is_dir():
        modules = package.root / "usr/lib/modules" / version
    return StockKernel(images[0], modules, version)


def busybox(progress: store.Progress = store.quiet) -> Path:
    """A statically linked busybox: the host's own, or the one from Debian's busybox-static."""
    for path in (Path("/bin/busybox"), Path("/usr/bin/busybox"), Path("/bin/busybox.static")):
        if path.is_file() and _is_static(path):
            return path
    package = fetch("busybox-static", progress)
    for inside in ("bin/busybox", "usr/bin/busybox"):
        if (package.root / inside).is_file():
            return package.root / inside
    raise HostError(f"{package.root} holds no bin/busybox; install busybox-static, or name one yourself")


class _ArchiveEntry:
    """What the archive offers: the file's ``name`` and its ``size`` in bytes."""

    __slots__ = ("name", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size


def _directory() -> Path:
    return store.root() / "debian"


def _package_at(place: Path) -> DebianPackage:
    name, version, _ = place.name.split("_", 2)
    return DebianPackage(name, version, place)


def _newest(package: str) -> DebianPackage | None:
    """The version of ``package`` that was fetched last, if any."""
    return _last_fetched(lambda name: name == package)


def _newest_image(metapackage: str) -> DebianPackage | None:
    """The kernel fetched last of those ``metapackage`` could stand for, linux-image-[cloud-]amd64, if any."""
    flavour = metapackage.removeprefix("linux-image").removesuffix("amd64").strip("-")

    def of_flavour(name: str) -> bool:
        # linux-image-6.1.0-49-cloud-amd64: what is left between is the version, digits first.
        version = name.removeprefix("linux-image-").removesuffix("-amd64")
        others = any(other in version for other in ("cloud", "rt")) if not flavour else False
        return version[:1].isdecimal() and version.endswith(flavour) and not others

    return _last_fetched(of_flavour)


def _last_fetched(wanted: Callable[[str], bool]) -> DebianPackage | None:
    places = [
        path
        for path in _directory().glob("*_*_*")
        if path.suffix not in (".lock", ".tmp") and wanted(path.name.partition("_")[0])
    ]
    if not places:
        return None
    return _package_at(max(places, key=lambda path: path.stat().st_mtime_ns))


def _archive_entry(package: str) -> _ArchiveEntry:
    # 'http://host/pool/x_1_amd64.deb' x_1_amd64.deb 1234 SHA256:...
    listing = _apt(["apt-get", "download", "--print-uris", package], package)
    for line in listing.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1].startswith(package + "_") and fields[2].isdecimal():
            return _ArchiveEntry(os.path.basename(fields[1]), int(fields[2]))
    raise HostError(f"apt offers no file for {package}; run apt-get update")


def _image_package(metapackage: str) -> str:
    """The versioned kernel package a metapackage stands for now, or without apt the one fetched last."""
    try:
        listing = _apt(["apt-cache", "depends", "--important", metapackage], metapackage)
    except HostError:
        earlier = _newest_image(metapackage)
        if earlier is None:
            raise
        return earlier.name
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(" ")
        if kind == "Depends:" and name.startswith("linux-image-"):
            return name
    raise HostError(f"{metapackage} depends on no kernel; run apt-get update, or give --kernel FILE")


def _apt(argv: list[str], package: str) -> str:
    import subprocess

    try:
        done = subprocess.run(
            argv, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not on this host, so {package} cannot be fetched: give --kernel FILE") from error
    if done.returncode != 0:
        raise HostError(
            f"apt does not know {package} ({_last_line(done.stderr)}): run apt-get update, or give --kernel FILE"
        )
    return done.stdout


def _unpack(package: str, deb: _ArchiveEntry, place: Path, progress: store.Progress) -> None:
    """Download into ``place``, unpack there, and drop the archive."""
    import subprocess

    stage = f"downloading {package}"
    progress(stage, 0, deb.size)
    argv = ["apt-get", "download", "-o", "APT::Sandbox::User=", package]
    with subprocess.Popen(
        argv,
        cwd=place,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as download:
        try:
            while True:
                # apt says its progress to terminals only, but the file it writes is there to be measured.
                try:
                    _, complaint = download.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    progress(stage, min(_size_of_files(place), deb.size), deb.size)
        except BaseException:
            download.kill()
            raise
    archives = list(place.glob("*.deb"))
    if download.returncode != 0 or len(archives) != 1:
        raise HostError(
            f"downloading {package} failed ({_last_line(complaint)}): check the network, "
            "run apt-get update, or give --kernel FILE"
        )
    progress(stage, deb.size, deb.size)
    progress(f"unpacking {package}", 0, None)
    try:
        done = subprocess.run(
            ["dpkg-deb", "-x", str(archives[0]), str(place)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise HostError(f"dpkg-deb is not on this host, so {package} cannot be unpacked") from error
    if done.returncode != 0:
        raise HostError(f"unpacking {package} failed: {_last_line(done.stderr)}")
    archives[0].unlink()


def _size_of_files(place: Path) -> int:
    size = 0
    for path in place.rglob("*"):
        # apt renames its partial file when it is done.
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return size


def _is_static(path: Path) -> bool:
    """Whether an ELF64 file runs without an interpreter: it has no PT_INTERP (ELF gABI, program header)."""
    import struct

    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False
        (table,) = struct.unpack_from("<Q", header, 32)
        entry_size, count = struct.unpack_from("<HH", header, 54)
        file.seek(table)
        segments = file.read(entry_size * count)
    interpreter = 3
    return entry_size >= 4 and all(
        struct.unpack_from("<I", segments, at)[0] != interpreter
        for at in range(0, len(segments) - entry_size + 1, entry_size)
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
