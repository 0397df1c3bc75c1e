"""Bochs as the processor of the VT-x host: a CD with the kernel, disks of ours, a serial port into a file."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.svm import emulator
from vmm.errors import HostError

if TYPE_CHECKING:
    from tests.svm.root import Root

PROGRAM = "bochs"
PACKAGES = "bochs bochs-term bochsbios vgabios isolinux syslinux-common genisoimage"

_APPEND = "console=ttyS0 mitigations=off panic=-1 loglevel=3 nowatchdog rdinit=/init disks=/dev/sd tsc=reliable"

# The processor is the newest of Bochs's with VMX and EPT. A guest's power-off is a panic of the device's: fatal ends.
_CONFIGURATION = """\
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, serial=1
display_library: term
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=corei7_skylake_x, count=1, ips=100000000, reset_on_triple_fault=1
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, path="{root}", mode=volatile
ata0-slave: type=disk, path="{project}", mode=flat
ata1-master: type=disk, path="{results}", mode=flat
ata1-slave: type=cdrom, path="{cd}", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev="{serial}"
clock: sync=none, time0=local
panic: action=fatal
log: "{log}"
"""

# Where Debian's packages have them.
_ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
_LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
_ROOT_LINK = "root.img"


def require() -> None:
    """Raise :class:`~vmm.errors.HostError` where Bochs, or what makes a CD for it, is missing."""
    emulator.require(PROGRAM, PACKAGES)
    emulator.require("genisoimage", PACKAGES)
    for path in (_ISOLINUX, _LDLINUX):
        if not path.exists():
            raise HostError(f"{path} is missing, and Bochs boots from a CD with it: apt-get install {PACKAGES}")


def _make_cd(root: Root, folder: Path) -> Path:
    tree = folder / "cd"
    (tree / "isolinux").mkdir(parents=True)
    shutil.copyfile(_ISOLINUX, tree / "isolinux/isolinux.bin")
    shutil.copyfile(_LDLINUX, tree / "isolinux/ldlinux.c32")
    shutil.copyfile(root.kernel, tree / "vmlinuz")
    shutil.copyfile(root.initramfs, tree / "initrd")
    menu = f"default linux\nlabel linux\n  kernel /vmlinuz\n  append initrd=/initrd {_APPEND}\n"
    (tree / "isolinux/isolinux.cfg").write_text(menu)
    image = folder / "boot.iso"
    argv = ["genisoimage", "-quiet", "-o", str(image), "-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"]
    argv += ["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-r", str(tree)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostError(f"genisoimage failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    shutil.rmtree(tree)
    return image


def run(root: Root, project: Path, results: emulator.Results, *, silence: float) -> None:
    """Boot the host and show its serial port until it powers off.

    ``silence``: seconds without a byte of output after which it counts as hung. Raises
    :class:`~vmm.errors.HostError` then, and when Bochs ends before the host does. Bochs has ended in every case.
    """
    folder = results.disk.parent
    serial, log = folder / "serial.out", folder / "bochs.log"
    serial.touch()
    # What is written to the root goes into a file beside its name, so that name lies in our folder.
    link = folder / _ROOT_LINK
    link.symlink_to(root.image)
    text = _CONFIGURATION.format(
        root=link, project=project, results=results.disk, cd=_make_cd(root, folder), serial=serial, log=log
    )
    (folder / "bochsrc").write_text(text)
    # The Debian package starts in its debugger, on the terminal it was given: "c" goes on.
    control, terminal = pty.openpty()
    process = emulator.start(
        [PROGRAM, "-q", "-f", str(folder / "bochsrc")], stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm"}, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    try:
        os.write(control, b"c\n")
        with _Screens(control) as screens:
            _stream(process, screens, serial, silence)
    finally:
        emulator.end(process)
    if not _powered_off(log):
        raise HostError(f"Bochs ended before its guest did: {_last_panic(log)}")


class _Screens:
    """Bochs's terminal, and the second one that it makes for the guest's screen: both are read, lest it waits."""

    _MADE = re.compile(rb"/dev/pts/\d+")
    _SAID = 4096  # bytes in which the second one's name is looked for

    def __init__(self, control: int) -> None:
        self._open = [control]
        self._said = b""

    def __enter__(self) -> _Screens:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open:
            os.close(fd)

    def drain(self, seconds: float) -> None:
        """Read what comes within that time, and drop it."""
        ready, _, _ = select.select(self._open, [], [], seconds)
        for fd in ready:
            with contextlib.suppress(OSError):  # EIO: Bochs has ended
                data = os.read(fd, 1 << 16)
                if len(self._open) == 1 and len(self._said) < self._SAID:
                    self._said += data
                    self._join()
                continue
            self._open.remove(fd)
            os.close(fd)

    def _join(self) -> None:
        # Both ends of a terminal are one's own to open: it is this user's Bochs.
        if made := self._MADE.search(self._said):
            with contextlib.suppress(OSError):
                self._open.append(os.open(made[0], os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))


def _stream(process: subprocess.Popen[bytes], screens: _Screens, serial: Path, silence: float) -> None:
    last = time.monotonic()
    with open(serial, "rb") as file:
        while True:
            ended = process.poll() is not None
            screens.drain(0.5)
            if data := file.read():
                last = time.monotonic()
                emulator.show(data)
            elif ended:
                return
            elif time.monotonic() - last > silence:
                raise HostError(f"the VT-x host printed nothing for {silence:.0f} s: it was ended")


def _powered_off(log: Path) -> bool:
    return "soft power off" in log.read_text(errors="replace") if log.exists() else False


def _last_panic(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if "PANIC" in line), "its log says nothing of it")
