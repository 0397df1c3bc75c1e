"""A UNIX socket that nobody but its owner can connect to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.errors import ConfigError

if TYPE_CHECKING:
    import socket


def listen(path: str, failed: str, backlog: int = 4) -> socket.socket:
    """Listen at ``path``, made with mode 0600. ``failed`` begins the :class:`~vmm.errors.ConfigError` where that cannot
    be. Who closes it removes the path."""
    import socket

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        why = "it exists: remove it first" if os.path.exists(path) else error.strerror or str(error)
        raise ConfigError(f"{failed}: {why}") from error
    finally:
        os.umask(mask)
    return listener
