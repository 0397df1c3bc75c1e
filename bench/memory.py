"""The memory a monitor has for itself, out of /proc (proc(5), "smaps")."""

from __future__ import annotations

GUEST_RAM = "/memfd:"  # every monitor measured here has its guest's RAM on a memfd, and nothing else


def own_bytes(pid: int | str) -> tuple[int, int]:
    """(PSS, RSS) in bytes of a process, without its guest's RAM.

    PSS divides what several processes map among them, so it is smaller while other Python programs run; RSS counts it
    all.
    """
    total = {"Pss:": 0, "Rss:": 0}
    guest = False
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):  # "start-end perms offset device inode [path]"
                guest = len(words) > 5 and words[5].startswith(GUEST_RAM)
            elif words[0] in total and not guest:
                total[words[0]] += int(words[1]) * 1024
    return total["Pss:"], total["Rss:"]
