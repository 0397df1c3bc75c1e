"""The small kernel: Debian's Linux source, unpatched, configured by the fragments beside this file.

    <cache>/linux/<variant>-<recipe>-<source version>/    bzImage, vmlinux, config
    <cache>/linux/<the same>.log                          what the last build said

The recipe is the sha256 of everything this package decides: the fragments, the compiler flags, the builder's own
version. Together with the source version it names the kernel by its content. A kernel that was built is used
without asking the archive for a newer source: `refresh` asks.

The configuration starts from allnoconfig, so the fragments are the whole of it; docs in small.config say what
each choice saves on a host that emulates guest kernel code, where an instruction costs 0.6 us.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from vmm.errors import ConfigError, HostError
from vmm.linux import store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SOURCE_PACKAGE = "linux-source-6.1"

# A variant is a stack of fragments, the later ones over the earlier.
VARIANTS = {"small": ("small.config", "small-virtio.config")}

# Raise it when the way of building changes the kernel built.
_BUILDER_VERSION = 1

# GCC clears and copies in functions it takes for cold (all of __init) with `rep stosb`: eight times the
# iterations of the kernel's own memset. No string operation is worth inlining here.
_KCFLAGS = "-mstringop-strategy=libcall"

# What a build prints a line for, for the progress report; an estimate is enough.
_BUILD_STEPS = 1700

# Commands a build runs, and the Debian package that has each. tar, gzip, sed and perl-base are essential there.
_TOOLS = {
    "gcc": "gcc",
    "ld": "binutils",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
}
# Headers its host programs include: objtool, which the x86-64 kernel always builds, reads ELF with libelf.
_HEADERS = {"stdlib.h": "libc6-dev", "gelf.h": "libelf-dev"}


class SmallKernel:
    """A built kernel: ``bzimage``, and ``vmlinux``, the same as ELF with its symbol table, no debug sections."""

    __slots__ = ("bzimage", "vmlinux")

    def __init__(self, bzimage: Path, vmlinux: Path) -> None:
        self.bzimage = bzimage
        self.vmlinux = vmlinux


def small_kernel(variant: str = "small", progress: store.Progress = store.quiet, refresh: bool = False) -> SmallKernel:
    """The kernel of that variant, built on first use (minutes); later uses take microseconds.

    ``refresh``: build again when the archive has a newer source. ConfigError: no such variant. HostError: a tool
    is missing, the source cannot be had, or the build failed; the sentence says which package or log file.
    """
    place = None if refresh else _built(variant)
    if place is None:
        from vmm.linux import debian

        _require_tools()
        source = debian.fetch(SOURCE_PACKAGE, progress)
        place = _directory() / f"{variant}-{recipe(variant)}-{source.version}"
        log = place.with_name(place.name + ".log")
        store.made(place, lambda temporary: _build(variant, source.root, temporary, log, progress), progress)
    return SmallKernel(place / "bzImage", place / "vmlinux")


def is_built(variant: str = "small") -> bool:
    """Return whether ``small_kernel`` can return without a build. ConfigError: no such variant."""
    return _built(variant) is not None


def fragment(variant: str) -> str:
    """The variant's whole configuration fragment. ConfigError: no such variant."""
    if variant not in VARIANTS:
        raise ConfigError(f"no kernel variant {variant!r}: one of {', '.join(sorted(VARIANTS))}")
    here = resources.files("vmm.linux")
    return "".join((here / name).read_text("ascii") for name in VARIANTS[variant])


def recipe(variant: str) -> str:
    """What is built and how, but for the source's version, as 16 hex digits. ConfigError: no such variant."""
    import hashlib

    whole = f"{_BUILDER_VERSION}\0{_KCFLAGS}\0{fragment(variant)}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _directory() -> Path:
    return store.root() / "linux"


def _built(variant: str) -> Path | None:
    places = [path for path in _directory().glob(f"{variant}-{recipe(variant)}-*") if (path / "vmlinux").is_file()]
    # A build in progress has its vmlinux in the directory to be, last of all, but under a temporary's name.
    places = [path for path in places if path.suffix != ".tmp"]
    return max(places, key=lambda path: path.stat().st_mtime_ns, default=None)


def _require_tools() -> None:
    """HostError naming every package to install, if a build needs any."""
    import shutil
    import subprocess

    packages = [package for command, package in _TOOLS.items() if shutil.which(command) is None]
    if "gcc" not in packages:
        for header, package in _HEADERS.items():
            looked = subprocess.run(
                ["gcc", "-E", "-x", "c", "-"],
                input=f"#include <{header}>\n".encode(),
                capture_output=True,
                check=False,
            )
            if looked.returncode != 0:
                packages.append(package)
    else:
        # Nothing can look for the headers; gcc alone does not bring them.
        packages.extend(_HEADERS.values())
    if packages:
        raise HostError(
            f"building the small kernel needs more tools: apt-get install {' '.join(packages)} (or give --kernel FILE)"
        )


def _build(variant: str, package: Path, place: Path, log: Path, progress: store.Progress) -> None:
    """Build in ``place``, and leave only the results there."""
    import shutil

    archives = sorted((package / "usr/src").glob("linux-source-*.tar.xz"))
    if len(archives) != 1:
        raise HostError(f"{package}/usr/src holds no linux-source-*.tar.xz; remove {package} and retry")
    source, objects = place / "source", place / "objects"
    source.mkdir()
    objects.mkdir()
    with log.open("wb") as file:
        output = _Output(log, file.fileno())
        progress("unpacking the kernel source", 0, None)
        output.run(["tar", "-xJf", str(archives[0]), "--strip-components=1", "-C", str(source)])
        progress("configuring the kernel", 0, None)
        wanted = place / "wanted.config"
        wanted.write_text(fragment(variant), "ascii")
        make = ["make", f"-j{os.cpu_count() or 1}", "-C", str(source), f"O={objects}", "ARCH=x86_64"]
        output.run([*make, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"])
        missed = unmet(wanted.read_text("ascii"), (objects / ".config").read_text("ascii"))
        if missed:
            raise HostError(f"this kernel source does not take {', '.join(missed)}; see vmm/linux/*.config")
        make.append(f"KCFLAGS={_KCFLAGS}")
        output.run([*make, "bzImage"], lambda done: progress("building the kernel", done, _BUILD_STEPS))
        # Symbols are for the symboliser; without -s, --strip-debug keeps .symtab.
        output.run(["strip", "--strip-debug", "-o", str(place / "vmlinux"), str(objects / "vmlinux")])
    shutil.copyfile(objects / "arch/x86/boot/bzImage", place / "bzImage")
    shutil.copyfile(objects / ".config", place / "config")
    progress("tidying up", 0, None)
    wanted.unlink()
    shutil.rmtree(source)
    shutil.rmtree(objects)


def unmet(wanted: str, config: str) -> list[str]:
    """The lines of fragment ``wanted`` that ``config`` (a .config) does not have, the last word on a symbol counting.

    Kconfig drops silently what a dependency forbids; a kernel that lacks what was asked for must not be kept.
    """
    have = _symbols(config.splitlines())
    return [
        f"{symbol}={value}" for symbol, value in _symbols(wanted.splitlines()).items() if have.get(symbol, "n") != value
    ]


def _symbols(lines: Iterable[str]) -> dict[str, str]:
    values = {}
    for line in lines:
        line = line.strip()
        if line.startswith("CONFIG_"):
            symbol, _, value = line.partition("=")
            values[symbol] = value
        elif line.startswith("# CONFIG_") and line.endswith(" is not set"):
            values[line.split()[1]] = "n"
    return values


class _Output:
    """Runs the commands of a build, all they say going to one log file."""

    __slots__ = ("_fd", "_log")

    def __init__(self, log: Path, fd: int) -> None:
        self._log = log
        self._fd = fd

    def run(self, argv: list[str], step: Callable[[int], None] | None = None) -> None:
        """Run ``argv``; ``step`` gets the number of lines printed, at most _BUILD_STEPS. HostError: it failed."""
        import subprocess

        # Nothing of the caller's environment may change the kernel built: not its make's flags, not its compiler's.
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C",
            "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
            "KBUILD_BUILD_USER": "pyvmm",
            "KBUILD_BUILD_HOST": "pyvmm",
            "KBUILD_BUILD_TIMESTAMP": "Thu Jan 1 00:00:00 UTC 1970",
        }
        with subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            try:
                for lines, line in enumerate(process.stdout, 1):
                    os.write(self._fd, line)
                    if step is not None:
                        step(min(lines, _BUILD_STEPS))
            except BaseException:
                # The compilers below it end by themselves when make does.
                process.terminate()
                raise
        if process.returncode != 0:
            raise HostError(f"building the small kernel failed in {argv[0]}: read {self._log}")
