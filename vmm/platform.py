"""The standard devices of a machine, on the addresses of :mod:`vmm.layout`, and the loading of its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm import layout
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.boot import Entry
    from vmm.machine import Machine


def create_devices(machine: Machine) -> None:
    """Create and attach what every machine has."""
    from vmm.devices.native import NativeUart

    uart = NativeUart(machine.line(layout.GSI_COM1), machine.console)
    machine.on_close(uart.destroy)
    machine.attach(uart, port=layout.COM1, size=8)


def load_image(machine: Machine) -> Entry:
    """Put ACPI tables and the configured image into guest memory."""
    from vmm import boot

    config = machine.config
    if config.kernel is None:
        raise ConfigError("there is nothing to boot: give a kernel image")
    image = boot.Image.open(config.kernel)
    initrds = [boot.Image.open(path) for path in config.initrd]
    return boot.load(
        machine.memory,
        image=image,
        kind=config.kind,
        cmdline=config.append,
        initrds=initrds,
        load_address=config.address,
        flat_mode=config.mode,
        unpack=config.unpack,
    )
