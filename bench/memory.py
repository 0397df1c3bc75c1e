"""The memory a monitor has for itself, out of /proc (proc(5), "smaps")."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST_RAM = "/memfd:"  # every monitor measured here has its guest's RAM on a memfd, and nothing else


def own_bytes(pid: int | str) -> tuple[int, int]:
    """(PSS, RSS) in bytes of a process, without its guest's RAM.

    PSS divides what several processes map among them, so it is smaller while other Python programs run; RSS counts it
    all.
    """
    total = {"Pss:": 0, "Rss:": 0}
    for path, sizes in _mappings(pid):
        if not path.startswith(GUEST_RAM):
            total = {name: total[name] + sizes[name] for name in total}
    return total["Pss:"], total["Rss:"]


def guest_bytes(pid: int | str) -> int:
    """Bytes of RAM that a process's guests have in all: of their files, once, and of what each wrote over them.

    PSS would do, but for pages of a file that nobody has mapped at the moment.
    """
    files = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd") if _is_guest_ram(pid, fd)]
    own = sum(sizes["Anonymous:"] for path, sizes in _mappings(pid) if path.startswith(GUEST_RAM))
    return own + sum({file.st_ino: 512 * file.st_blocks for file in files}.values())


def _is_guest_ram(pid: int | str, fd: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith(GUEST_RAM)
    except OSError:  # closed meanwhile: the directory itself
        return False


def _mappings(pid: int | str) -> Iterator[tuple[str, dict[str, int]]]:
    """Each mapping's file ("": none), and its sizes in bytes by their names in smaps."""
    path, sizes = "", dict.fromkeys(("Pss:", "Rss:", "Anonymous:"), 0)
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):  # "start-end perms offset device inode [path]"
                yield path, sizes
                path, sizes = words[5] if len(words) > 5 else "", dict.fromkeys(sizes, 0)
            elif words[0] in sizes:
                sizes[words[0]] = int(words[1]) * 1024
    yield path, sizes
