"""What time it is for a machine that goes on elsewhere, or later."""

from __future__ import annotations

from vmm.errors import ConfigError

KINDS = ("advanced", "kept")


def advances(kind: str) -> bool:
    """Whether a machine's clocks go on with the host's (``advanced``) or from where they stood (``kept``).

    Raises :class:`~vmm.errors.ConfigError` for a kind there is not.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no clock {kind!r}: it is advanced to the host's time, or kept as it was")
    return kind == "advanced"
