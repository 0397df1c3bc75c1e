"""Why a machine stopped: the native reasons, and the codes with which the host stops one."""

from __future__ import annotations

from vmm._ffi import lib
from vmm.outcome import Outcome

# enum vmm_stop_reason -> vmm.outcome.REASONS; VMM_STOP_HOST is told apart by its code.
REASONS: dict[int, str] = {
    lib.VMM_STOP_POWEROFF: "power-off",
    lib.VMM_STOP_RESET: "reset",
    lib.VMM_STOP_DEBUG_EXIT: "debug-exit",
    lib.VMM_STOP_PANIC: "panic",
    lib.VMM_STOP_TRIPLE_FAULT: "triple-fault",
    lib.VMM_STOP_EMULATION: "emulation-failure",
    lib.VMM_STOP_FAIL_ENTRY: "entry-failure",
    lib.VMM_STOP_HALT: "halt",
    lib.VMM_STOP_SYSTEM_EVENT: "reset",
    lib.VMM_STOP_UNKNOWN_EXIT: "unknown-exit",
    lib.VMM_STOP_RUN_FAILED: "host-failure",
    lib.VMM_STOP_DEBUG: "debug",
    lib.VMM_STOP_MEMORY: "memory-lost",
    lib.VMM_STOP_NO_BIOS: "no-bios",
}

HOST_REASONS = {0: "stopped", 1: "timeout", 2: "interrupted", 3: "terminated", 4: "stalled"}


def host_outcome(code: int) -> Outcome:
    """Return the outcome of a run that the host ends between two machines; ``code`` is a key of HOST_REASONS."""
    return Outcome(HOST_REASONS[code], code)
