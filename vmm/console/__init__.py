"""A machine's console: the object that tests talk to (guest_end), and where its bytes go on the host (host_end)."""

from vmm.console.guest_end import Console as Console

__all__ = ["Console"]
