"""Where pyvmm keeps what it made or fetched: unpacked kernels, findings about the host, packages, booted roots."""

from __future__ import annotations

import os


def cache_root() -> str:
    """Return ``$PYVMM_CACHE``, else ``$XDG_CACHE_HOME/pyvmm``, else ``~/.cache/pyvmm``. It need not exist yet."""
    root = os.environ.get("PYVMM_CACHE")
    if root:
        return root
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "pyvmm")
