"""KVM's internal errors beside failed emulation (KVM_EXIT_INTERNAL_ERROR), in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# What happened, and the names of the numbers that KVM reports with it, in order (linux/kvm.h; arch/x86/kvm of Linux
# defines their content)
_SUBERRORS = {
    2: ("an exception came while another was delivered", ("vectoring", "interruption", "error code")),
    3: (
        "the processor left the guest while an exception or interrupt was delivered",
        ("vectoring", "exit reason", "exit qualification"),
    ),
    4: ("the processor left the guest for a reason that KVM does not know", ("exit reason", "host CPU")),
}


def sentence(suberror: int, data: Sequence[int]) -> str:
    """Return a sentence about the error, with every number that KVM reported.

    ``vectoring`` and ``interruption`` are as VMX has them (SDM vol. 3, 25.9.2 and 25.9.3): vector in bits 7:0, type
    10:8, bit 31 set.
    """
    what, names = _SUBERRORS.get(suberror, (f"internal error {suberror}", ()))
    named = [f"{name} {value:#x}" for name, value in zip(names, data, strict=False)]
    rest = [f"{value:#x}" for value in data[len(names) :]]
    numbers = ", ".join([*named, *rest])
    return f"KVM cannot go on: {what}" + (f" ({numbers})" if numbers else "") + "; the host's kernel log may say more"
