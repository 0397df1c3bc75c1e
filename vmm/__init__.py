"""pyvmm: a KVM virtual machine monitor you can import.

    from vmm import Machine

    with Machine(kernel="bzImage", memory="512M") as m:
        outcome = m.run(timeout=60)

The names below are the public face; each is imported when it is first used, so ``import vmm`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.lazy_names import imported_when_used

if TYPE_CHECKING:
    from vmm.config import MachineConfig as MachineConfig
    from vmm.console import Console as Console
    from vmm.cpu.vcpu import Vcpu as Vcpu
    from vmm.devices.device import Device as Device
    from vmm.errors import BusError as BusError
    from vmm.errors import ConfigError as ConfigError
    from vmm.errors import ConsoleTimeout as ConsoleTimeout
    from vmm.errors import GuestMemoryError as GuestMemoryError
    from vmm.errors import HostError as HostError
    from vmm.errors import ImageError as ImageError
    from vmm.errors import StateError as StateError
    from vmm.errors import VmmError as VmmError
    from vmm.machine import Machine as Machine
    from vmm.memory import GuestMemory as GuestMemory
    from vmm.outcome import Outcome as Outcome
    from vmm.parts import Disk as Disk
    from vmm.parts import Net as Net
    from vmm.parts import Share as Share
    from vmm.parts import Vsock as Vsock

__version__ = "0.1.0"

_HOME = {
    "BusError": "vmm.errors",
    "ConfigError": "vmm.errors",
    "Console": "vmm.console",
    "ConsoleTimeout": "vmm.errors",
    "Device": "vmm.devices.device",
    "Disk": "vmm.parts",
    "GuestMemory": "vmm.memory",
    "GuestMemoryError": "vmm.errors",
    "HostError": "vmm.errors",
    "ImageError": "vmm.errors",
    "Machine": "vmm.machine",
    "MachineConfig": "vmm.config",
    "Net": "vmm.parts",
    "Outcome": "vmm.outcome",
    "Share": "vmm.parts",
    "StateError": "vmm.errors",
    "Vcpu": "vmm.cpu.vcpu",
    "VmmError": "vmm.errors",
    "Vsock": "vmm.parts",
}

__all__ = sorted([*_HOME, "__version__"])


__getattr__ = imported_when_used(__name__, _HOME)
