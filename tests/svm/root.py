"""The SVM host's root disk and boot files, made from packages and kept in the cache by what is in them.

<cache>/svm/root-<recipe>/    root.img (ext4)
<cache>/svm/archives/         the packages' files, so that another recipe downloads little
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.svm import packages
from vmm.errors import HostError
from vmm.linux import debian, initramfs, modules, store

HERE = Path(__file__).parent

# Raise it when the way of building changes what is built.
_BUILDER_VERSION = 2

# A Debian system that runs the tests: what pyvmm uses beside KVM, and what the tests build and look with.
PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "diffutils", "findutils", "grep", "gzip", "hostname",
    "mawk", "mount", "procps", "sed", "tar", "util-linux", "kmod", "iproute2", "libc-bin", "netbase",
    "python3", "gcc", "libc6-dev", "binutils", "busybox-static", "cpio", "xz-utils", "lzop", "openssl",
    "e2fsprogs", "acpica-tools", "gdb", "passt", "ca-certificates",
    "libseccomp2", "libcap-ng0", "libglib2.0-0", "libnuma1", "liburing2",
)  # fmt: skip
# Without what it depends on, which is QEMU: only its virtiofsd is wanted.
ALONE = ("qemu-system-common",)

# What the disks and the root file system need, and /dev/kvm with its companions, by the module behind the latter.
_MODULES = {
    "kvm_amd": ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "kvm_amd", "tun", "dummy", "fuse"),
    "kvm_intel": ("ata_piix", "sd_mod", "crc32c_generic", "ext4", "kvm_intel", "tun", "dummy", "fuse"),
}

# What pyvmm depends on, and what its tests do.
_DISTRIBUTIONS = (
    "cffi", "capstone", "pyelftools", "lz4", "zstandard", "rich", "numpy", "pytest", "pytest-timeout", "pytest-xdist",
    "hypothesis",
)  # fmt: skip

# Kernels that the tests boot as they are, from pyvmm's own cache.
_FLAVOURS = ("cloud", "generic")

_SPARE = 6 << 30  # bytes; the file is sparse


class Root:
    """A built root: ``image`` (raw ext4), ``kernel`` (bzImage) and ``initramfs``, which mounts it."""

    __slots__ = ("image", "initramfs", "kernel")

    def __init__(self, folder: Path, kernel: debian.StockKernel, driver: str) -> None:
        self.image = folder / "root.img"
        self.kernel = kernel.vmlinuz
        self.initramfs = initramfs.save(_boot_archive(kernel, driver))


def root(driver: str, progress: store.Progress = store.quiet) -> Root:
    """The root of today's packages, for a host with that KVM module; made on first use, else found by its recipe.

    Where apt cannot help, the one made last is used. Raises :class:`~vmm.errors.HostError` with what is missing.
    """
    _require("mke2fs", "e2fsprogs")
    _require("busybox", "busybox-static")
    kernels = [debian.stock_kernel(flavour, progress) for flavour in _FLAVOURS]
    try:
        progress("looking at the archive", 0, None)
        wanted = packages.closure(PACKAGES, alone=ALONE)
    except HostError:
        made = sorted((store.root() / "svm").glob("root-????????????????"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise
        return Root(made[-1], kernels[-1], driver)
    pins = _pins()
    whole = [str(_BUILDER_VERSION), *(package.file for package in wanted), *pins, *(k.version for k in kernels)]
    recipe = hashlib.sha256("\0".join(whole).encode()).hexdigest()[:16]
    place = store.root() / "svm" / f"root-{recipe}"

    def make(temporary: Path) -> None:
        tree = temporary / "tree"
        tree.mkdir()
        packages.unpack(wanted, store.root() / "svm" / "archives", tree, progress)
        _finish(tree)
        _install(pins, tree, progress)
        for folder in ("usr/lib/python3", f"usr/lib/python{python_version(tree)}", "opt/site"):
            compile_python(tree / folder)
        _add_kernels(kernels, tree)
        progress("making the root disk", 0, None)
        make_ext4(tree, temporary / "root.img", _SPARE)
        shutil.rmtree(tree)

    made_root = Root(store.made(place, make, progress), kernels[-1], driver)
    _drop_older(place)
    return made_root


def _drop_older(current: Path) -> None:
    for other in current.parent.glob("root-????????????????"):
        if other != current:
            shutil.rmtree(other, ignore_errors=True)


def _require(command: str, package: str) -> None:
    if shutil.which(command, path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin") is None:
        raise HostError(f"{command} is missing, and the SVM host's disks are made with it: apt-get install {package}")


def _pins() -> list[str]:
    """``name==version`` of each distribution and all it needs, as they are in this Python."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    wanted = list(_DISTRIBUTIONS)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise HostError(f"{name} is not installed beside this Python: run make setup") from error
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return sorted(f"{name}=={version}" for name, version in found.items())


def _finish(tree: Path) -> None:
    """What the packages' scripts would have done, as far as this needs it."""
    for link, target in (
        ("usr/bin/sh", "dash"),
        ("usr/bin/cc", "gcc"),
        ("usr/bin/awk", "mawk"),
        ("usr/bin/which", "/bin/busybox"),
    ):
        if not os.path.lexists(tree / link):
            (tree / link).symlink_to(target)
    etc = tree / "etc"
    for name in ("passwd", "group"):
        shutil.copyfile(tree / "usr/share/base-passwd" / f"{name}.master", etc / name)
    (etc / "hosts").write_text("127.0.0.1 localhost svm\n::1 localhost\n")
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    (etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (etc / "machine-id").write_text("0" * 31 + "1\n")
    for name in ("proc", "sys", "dev", "run", "project", "root", "results", "mnt", "tmp", "var/tmp", "var/cache/pyvmm"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (tree / name).chmod(0o1777)


def python_version(tree: Path) -> str:
    """``3.11`` of the Debian Python in ``tree``."""
    return os.readlink(tree / "usr/bin/python3").removeprefix("python")


def _install(pins: list[str], tree: Path, progress: store.Progress) -> None:
    progress("installing Python packages", 0, None)
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    argv += ["--target", str(tree / "opt/site"), "--python-version", python_version(tree), "--implementation", "cp"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"):
        argv += ["--platform", platform]
    done = subprocess.run([*argv, *pins], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HostError(f"pip could not get the Python packages of the SVM host ({reason}): check the network")


def compile_python(folder: Path) -> None:
    """Compile the Python sources below ``folder`` to bytecode here: under TCG it takes every new process seconds.

    Bytecode carries its version in its name: that of another Python than the host's is no harm, and no help.
    """
    argv = [sys.executable, "-m", "compileall", "-q", "-j", "2", "--invalidation-mode", "unchecked-hash", str(folder)]
    # Its status is of no use: sources that do not compile (test cases of another version) stay as they are.
    subprocess.run(argv, capture_output=True, check=False)


def _add_kernels(kernels: list[debian.StockKernel], tree: Path) -> None:
    """Put the stock kernels where pyvmm in there looks for what it has fetched."""
    cache = tree / "var/cache/pyvmm/debian"
    cache.mkdir(parents=True)
    for kernel in kernels:
        package = kernel.vmlinuz.parent.parent
        shutil.copytree(package, cache / package.name, symlinks=True)


def make_ext4(tree: Path, image: Path, spare: int) -> None:
    """Make ``image``: ext4 with the content of ``tree``, owned by root, and ``spare`` more bytes, unprivileged."""
    measured = subprocess.run(["du", "-s", "-B1", str(tree)], capture_output=True, text=True, check=True).stdout
    used = int(measured.split()[0])
    size = (used + used // 8 + spare) >> 20
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-i", "32768", "-m", "0"]
    argv += ["-E", "root_owner=0:0,lazy_itable_init=1", "-d", str(tree), str(image), f"{size}M"]
    if os.geteuid() != 0 and _may_map_root():
        argv = ["unshare", "--map-root-user", *argv]  # files of the caller's are root's in there
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/sbin:/usr/sbin"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostError(f"{image}: mke2fs failed ({done.stderr.strip()[-200:]}): is the disk full?")


def _may_map_root() -> bool:
    done = subprocess.run(["unshare", "--map-root-user", "true"], capture_output=True, check=False)
    return done.returncode == 0


def _boot_archive(kernel: debian.StockKernel, driver: str) -> bytes:
    return initramfs.build(
        [
            initramfs.character_device("dev/console", 5, 1),
            initramfs.directory("proc"),
            initramfs.directory("sys"),
            initramfs.directory("dev"),
            initramfs.directory("root"),
            initramfs.file("bin/busybox", debian.busybox()),
            initramfs.file("init", (HERE / "init.sh").read_bytes()),
            *modules.entries(kernel.modules, _MODULES[driver]),
        ]
    )
