"""How hard property tests try: each says its own number of examples; `make fuzz` multiplies it."""

from __future__ import annotations

import os

_FUZZING = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
FUZZ_TIMES = 100


def examples(usual: int) -> int:
    """``usual``, or a hundred times as many under `make fuzz`."""
    return usual * FUZZ_TIMES if _FUZZING else usual
