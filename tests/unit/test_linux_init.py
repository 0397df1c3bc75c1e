"""The first process of an initramfs, as the first one of a process namespace: what ends it, and how."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import resources
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

BUSYBOX = shutil.which("busybox")


def script(name: str, folder: Path) -> Path:
    """A script of vmm/linux that calls a busybox which only says what it is to do, and finds its files here."""
    busybox = folder / "busybox"
    busybox.write_text('#!/bin/sh\n[ "$2" != -f ] || echo "did $1"\n')
    busybox.chmod(0o755)
    text = (resources.files("vmm.linux") / name).read_text()
    path = folder / name
    path.write_text(text.replace("/bin/busybox ", f"{busybox} ").replace("/etc/", f"{folder}/"))
    return path


def first_process(*words: str, typed: str = "", **environment: str) -> list[str]:
    """Run a busybox shell as process 1; the lines it prints."""
    if BUSYBOX is None or shutil.which("unshare") is None:
        pytest.skip("needs busybox and unshare")
    alone = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces are not permitted here")
    command = [*alone, BUSYBOX, "sh", *words]
    done = subprocess.run(
        command, input=typed, env={"PATH": "/bin:/usr/bin:/sbin:/usr/sbin", **environment}, stdout=subprocess.PIPE,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout.splitlines()


def said(lines: list[str]) -> list[str]:
    """What is not the shell's own; its prompt may stand before it."""
    return re.findall(r"(?:did|still) \w+$", "\n".join(lines), re.MULTILINE)


KINDS = ["poweroff", "reboot", "halt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["{}", "(sleep 0; {})& wait", "sh -c {}", "busybox {}"])
def test_each_way_to_end_works_in_the_default_shell(tmp_path: Path, how: str, kind: str) -> None:
    lines = first_process("-i", typed=how.format(kind) + "\n", ENV=str(script("shell.sh", tmp_path)))
    assert said(lines)[0] == f"did {kind}"


def test_the_end_of_the_shell_is_a_power_off_and_that_of_one_inside_it_is_not(tmp_path: Path) -> None:
    shell = script("shell.sh", tmp_path)
    lines = first_process("-i", typed="busybox sh -ic exit\necho still on\nexit\n", ENV=str(shell))
    assert said(lines) == ["still on", "did poweroff"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_end_works_in_a_session(tmp_path: Path, kind: str) -> None:
    lines = first_process(str(script("init-session.sh", tmp_path)), typed=f"run token 'busybox {kind}'\n")
    assert lines[:2] == ["pyvmm: ready", f"did {kind}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_that_ends_the_machine_has_its_status_and_then_its_way(tmp_path: Path, kind: str) -> None:
    init = script("init-command.sh", tmp_path)
    (tmp_path / "argv").write_text(f"set -- busybox {kind}\n")
    assert first_process(str(init)) == ["pyvmm: command", "pyvmm: exit status 0", f"did {kind}"]
