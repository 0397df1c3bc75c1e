"""The project as the SVM host sees it: the tests, the built guests, pyvmm's wheel unpacked, and one job to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.svm.root import HERE, compile_python, make_ext4
from vmm.errors import HostError

if TYPE_CHECKING:
    from vmm.linux import store

ROOT = HERE.parents[1]
_SPARE = 1 << 30


def project_disk(job: str, folder: Path, progress: store.Progress) -> Path:
    """A disk image below ``folder`` with the project in its present state and ``job``, a shell script."""
    tree = folder / "project"
    tree.mkdir()
    _copy_sources(tree)
    _install_wheel(tree, folder, progress)
    _add_guests(tree, progress)
    _add_small_kernel(tree)
    for name, content in (("run", (HERE / "run.sh").read_text()), ("job", job)):
        (tree / name).write_text(content)
        (tree / name).chmod(0o755)
    _rewrite_tests(tree, progress)
    programs = tree / "bin"
    programs.mkdir()
    (programs / "pyvmm").write_text("#!/usr/bin/python3 -P\nfrom vmm.cli import entry\n\nentry()\n")
    (programs / "pyvmm").chmod(0o755)
    image = folder / "project.img"
    make_ext4(tree, image, _SPARE)
    shutil.rmtree(tree)
    return image


def _copy_sources(tree: Path) -> None:
    """Every file that git knows or would take, but the package: what is tested is the wheel."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode != 0:
        raise HostError(f"{ROOT} is no git checkout: make svm copies what git lists")
    for name in filter(None, listing.stdout.split("\0")):
        source = ROOT / name
        if name.startswith("vmm/") or not source.is_file():
            continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, tree / name)


def _install_wheel(tree: Path, folder: Path, progress: store.Progress) -> None:
    progress("building pyvmm's wheel", 0, None)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*argv, str(ROOT)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("pyvmm-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise HostError(f"building pyvmm's wheel failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    site = tree / "site"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(site)
    wheels[0].unlink()
    compile_python(site)
    (tree / "vmm").symlink_to("site/vmm")


def _rewrite_tests(tree: Path, progress: store.Progress) -> None:
    """Have pytest leave its rewritten tests beside them: each worker in there would take a minute over it."""
    progress("collecting the tests", 0, None)
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'site'}:{tree}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    argv = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    # Its status is of no use: what cannot be collected is said in there.
    subprocess.run(argv, cwd=tree, env=environment, capture_output=True, check=False)


def _add_guests(tree: Path, progress: store.Progress) -> None:
    progress("building the guests", 0, None)
    build = ROOT / "build" / "guests"
    build.mkdir(parents=True, exist_ok=True)
    for command in (["cmake", "-S", str(ROOT / "guests"), "-B", str(build)], ["cmake", "--build", str(build), "-j2"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise HostError(f"building the guests failed: {(done.stdout.strip().splitlines() or ['?'])[-1]}")
    shutil.copytree(build / "bin", tree / "guests-built")


def _add_small_kernel(tree: Path) -> None:
    """The small kernel, where this host has built it; without it the tests that boot it are skipped by name."""
    from vmm.linux import kernel

    if kernel.is_built():
        built = kernel.small_kernel().bzimage.parent
        shutil.copytree(built, tree / "linux" / built.name)


def quoted(words: list[str]) -> str:
    """``words`` for a shell script."""
    import shlex

    return " ".join(shlex.quote(word) for word in words)


def environment(names: list[str]) -> str:
    """Shell lines that hand on those variables of this process that are set."""
    return "".join(f"export {name}={quoted([os.environ[name]])}\n" for name in names if name in os.environ)
