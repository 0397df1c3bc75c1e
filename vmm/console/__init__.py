"""A machine's console: the object that tests use (guest_end), and its back ends on the host (host_end)."""

from vmm.console.guest_end import Console as Console

__all__ = ["Console"]
