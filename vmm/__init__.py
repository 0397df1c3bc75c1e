"""pyvmm: a KVM virtual machine monitor you can import.

    from vmm import Machine

    with Machine(kernel="bzImage", memory="512M") as m:
        outcome = m.run(timeout=60)

The names below are the public face; each is imported when it is first used, so ``import vmm`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    "BusError": "errors",
    "ConfigError": "errors",
    "Console": "console",
    "ConsoleTimeout": "errors",
    "Device": "devices.device",
    "Disk": "parts",
    "GuestMemory": "memory",
    "GuestMemoryError": "errors",
    "HostError": "errors",
    "ImageError": "errors",
    "Machine": "machine",
    "MachineConfig": "config",
    "Net": "parts",
    "Outcome": "outcome",
    "Share": "parts",
    "StateError": "errors",
    "Vcpu": "cpu.vcpu",
    "VmmError": "errors",
    "Vsock": "parts",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'vmm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"vmm.{_HOME[name]}"), name)
    globals()[name] = value
    return value
