"""Kernels and loaders of others, from the package archive, come as far as they can on this machine."""

from __future__ import annotations

import gzip
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmm import HostError, Machine
from vmm.linux import debian

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def package(name: str) -> Path:
    try:
        return debian.fetch(name).root
    except HostError as error:
        pytest.skip(f"no {name}: {error}")


def unpacked(archive: Path, to: Path) -> str:
    to.write_bytes(gzip.decompress(archive.read_bytes()))
    return str(to)


def test_xen_prints_its_banner_and_asks_for_a_domain(tmp_path: Path) -> None:
    image = next(package("xen-hypervisor-4.17-amd64").glob("boot/xen-*-amd64.gz"))
    with Machine(
        kernel=unpacked(image, tmp_path / "xen"), memory="256M", append="console=com1 com1=115200,8n1,0x3f8,4"
    ) as machine:
        machine.start()
        machine.console.expect(rb"Xen version 4\.\d+", timeout=300)
        machine.console.expect(rb"Bootloader: pyvmm", timeout=300)
        machine.console.expect(rb"dom0 kernel not specified", timeout=600)
        assert machine.stop().reason == "stopped"


def test_gnu_mach_comes_to_its_debugger_and_answers_there(tmp_path: Path) -> None:
    image = next(package("gnumach-image-1.8-486-dbg").glob("boot/gnumach-*-dbg.gz"))
    with Machine(kernel=unpacked(image, tmp_path / "mach"), memory="32M", append="console=com0 -d") as machine:
        machine.start()
        machine.console.expect(rb"GNU Mach 1\.8", timeout=300)
        machine.console.expect(rb"db> ", timeout=900)
        machine.console.send("show registers\r")
        machine.console.expect(rb"eip\s+0x[0-9a-f]+", timeout=300)
        assert machine.stop().reason == "stopped"


def grub_image(modules: Path, platform: str, to: Path) -> str:
    tool = next(package("grub-common").glob("usr/bin/grub-mkimage"))
    command = [tool, "-O", platform, "-d", modules, "-p", "/", "-o", to, "serial", "terminal", "echo"]
    made = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"grub-mkimage does not run here: {made.stderr.strip()}")
    return str(to)


def test_grub_for_coreboot_prints_on_the_text_screen(tmp_path: Path) -> None:
    modules = package("grub-coreboot-bin") / "usr/lib/grub/i386-coreboot"
    with Machine(kernel=grub_image(modules, "i386-coreboot", tmp_path / "grub.elf"), memory="64M") as machine:
        machine.start()
        machine.wait(120)  # it has no console but the screen, and no coreboot that told it of memory
        screen = machine.memory.read(0xB8000, 4000)[::2]
    assert screen.startswith(b"No memory found")


def test_ipxe_is_said_to_need_a_bios() -> None:
    image = next(package("ipxe").glob("boot/ipxe.lkrn"))
    with pytest.raises(Exception, match="begins in real mode and needs a BIOS"), Machine(kernel=str(image)) as machine:
        machine.load()
