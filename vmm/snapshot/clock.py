"""The guest's clocks after a restore or a migration."""

from __future__ import annotations

from vmm.errors import ConfigError

KINDS = ("advanced", "kept")


def advances(kind: str) -> bool:
    """Return whether the guest's clocks follow the host's (``advanced``), or continue where they stood (``kept``).

    Raises :class:`~vmm.errors.ConfigError` for any other kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no clock {kind!r}: it is advanced to the host's time, or kept as it was")
    return kind == "advanced"
