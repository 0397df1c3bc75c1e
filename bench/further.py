"""What each further machine costs a process: PSS less guest RAM, as machines are added. Used by run.py.

usage: further.py GUEST COUNT     GUEST prints a line and then halts; prints a JSON list of bytes, one a machine
"""

from __future__ import annotations

import json
import sys

from memory import own_bytes

from vmm.machine import Machine


def main(guest: str, count: int) -> None:
    """Start ``count`` machines, one after the other, all kept running."""
    machines: list[Machine] = []
    pss = []
    for _ in range(count):
        machine = Machine(kernel=guest)
        machine.start()
        machine.console.expect(r"\n")
        machines.append(machine)
        pss.append(own_bytes("self")[0])
    for machine in machines:
        machine.close()
    print(json.dumps(pss))


main(sys.argv[1], int(sys.argv[2]))
