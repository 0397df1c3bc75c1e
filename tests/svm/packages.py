"""Debian packages with all that they depend on, downloaded once and unpacked into one tree; nothing is installed.

apt resolves the names against an empty package status, so the closure is complete, whatever this host has installed.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from vmm.errors import HostError
from vmm.linux import store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Documentation is no use in a test host, and a third of the files.
_LEFT_OUT = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/info", "./usr/share/lintian")


class Package:
    """One file of the archive: ``name`` of the package, its ``file`` name (with the version) and ``size`` in bytes."""

    __slots__ = ("file", "name", "size")

    def __init__(self, file: str, size: int) -> None:
        self.name = file.split("_", 1)[0]
        self.file = file
        self.size = size


def closure(names: Iterable[str], *, alone: Iterable[str] = ()) -> list[Package]:
    """``names`` with everything they depend on, and the packages ``alone`` without, sorted by file name.

    Raises :class:`~vmm.errors.HostError` when apt is missing or does not know a package.
    """
    folder = store.root() / "svm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    empty = folder / "no-status"
    empty.touch()
    nothing = folder / "no-archives"  # apt leaves out of its list what it has downloaded before
    (nothing / "partial").mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-qq", "--print-uris", "-o", f"Dir::Cache::archives={nothing}"]
    resolve = [*apt, "-o", f"Dir::State::status={empty}", "-o", "APT::Install-Recommends=0"]
    listing = _apt([*resolve, "install", *names]) + _apt([*apt, "download", *alone])
    found = {}
    for line in listing.splitlines():
        fields = line.split()  # 'URI' x_1_amd64.deb 1234 SHA256:...
        if len(fields) >= 3 and fields[1].endswith(".deb") and fields[2].isdecimal():
            found[fields[1]] = Package(os.path.basename(fields[1]), int(fields[2]))
    return [found[key] for key in sorted(found)]


def unpack(packages: list[Package], archives: Path, tree: Path, progress: store.Progress) -> None:
    """Download what ``archives`` lacks of the packages, and unpack all of them below ``tree``.

    Raises :class:`~vmm.errors.HostError` for a failed download and for an archive that does not unpack.
    """
    archives.mkdir(parents=True, exist_ok=True)
    total = sum(package.size for package in packages)
    missing = [package for package in packages if not (archives / package.file).is_file()]
    _download(missing, archives, total, progress)
    # /bin, /sbin and /lib are links in every Debian since 12; the packages themselves still name both.
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
        (tree / name).symlink_to(f"usr/{name}")
    for number, package in enumerate(packages):
        progress("unpacking packages", number, len(packages))
        _extract(archives / package.file, tree)
    progress("unpacking packages", len(packages), len(packages))


def _download(packages: list[Package], archives: Path, total: int, progress: store.Progress) -> None:
    if not packages:
        return
    wanted = sum(package.size for package in packages)
    stage = "downloading packages"
    progress(stage, 0, wanted)
    argv = ["apt-get", "-o", "APT::Sandbox::User=", "-qq", "download", *(package.name for package in packages)]
    with subprocess.Popen(
        argv, cwd=archives, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as download:
        try:
            while True:
                try:
                    _, complaint = download.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    have = sum(entry.stat().st_size for entry in archives.iterdir() if entry.is_file())
                    progress(stage, max(0, min(wanted, have - (total - wanted))), wanted)
        except BaseException:
            download.kill()
            raise
    lacking = [package.file for package in packages if not (archives / package.file).is_file()]
    if download.returncode != 0 or lacking:
        reason = complaint.strip().splitlines()[-1:] or [f"{lacking[:1]} is missing"]
        raise HostError(f"downloading Debian packages failed ({reason[0]}): check the network, run apt-get update")
    progress(stage, wanted, wanted)


def _extract(archive: Path, tree: Path) -> None:
    left_out = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
    tar = ["tar", "-x", "-C", str(tree), "--keep-directory-symlink", "--no-same-owner", "--delay-directory-restore"]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as source:
        done = subprocess.run([*tar, *left_out], stdin=source.stdout, stderr=subprocess.PIPE, text=True, check=False)
    if source.returncode != 0 or done.returncode != 0:
        archive.unlink(missing_ok=True)
        raise HostError(f"unpacking {archive.name} failed ({done.stderr.strip()[-200:]}): it was removed, try again")


def _apt(argv: list[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise HostError("the SVM host is made of Debian packages: this needs apt-get and dpkg-deb") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HostError(f"apt cannot find the packages of the SVM host ({reason}): run apt-get update")
    return done.stdout
