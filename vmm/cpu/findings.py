"""Findings of the probes of a host's KVM, and their text form in the cache."""

from __future__ import annotations

# The findings with a basis, in the order of a report
VERDICTS = (
    "native", "missing", "syscall_broken", "vmcall_loops", "cpuid_forced", "tsc_fixed", "shadowed", "unstopped",
    "unpaged",
)  # fmt: skip


PAGING_KINDS = ("32-bit", "PAE")


class Findings:
    """Findings of the probes. ``remedies`` are what a machine enables because of them.

    ``native``: guest kernel code runs on the processor (False: KVM emulates it, instruction by instruction).
    ``missing``: instructions KVM cannot execute at CPL 0. ``syscall_broken``: SYSCALL from CPL 3 stays at CPL 3.
    ``vmcall_loops``: a hypercall never returns. ``cpuid_forced``: feature names the guest sees although hidden.
    ``tsc_fixed``: the guest's TSC is the host's, whatever is written to it. ``shadowed``: KVM keeps using page tables
    as they were before the host wrote them. ``unstopped``: kinds of a debugger's points (``vmm.cpu.debug.KINDS``) at
    which KVM does not stop a guest. ``unpaged``: kinds of paging outside long mode (:data:`PAGING_KINDS`) that a guest
    cannot switch on.

    ``basis`` maps the name of each verdict to its measurement. ``instruction_ns`` and ``pio_us`` are for the user only:
    no verdict depends on them.
    """

    __slots__ = (
        "basis",
        "cpuid_forced",
        "instruction_ns",
        "missing",
        "native",
        "pio_us",
        "shadowed",
        "syscall_broken",
        "tsc_fixed",
        "unpaged",
        "unstopped",
        "vmcall_loops",
    )

    def __init__(self) -> None:
        self.native = True
        self.instruction_ns = 0.0
        self.pio_us = 0.0
        self.missing: list[str] = []
        self.syscall_broken = False
        self.vmcall_loops = False
        self.tsc_fixed = False
        self.shadowed = False
        self.cpuid_forced: list[str] = []
        self.unstopped: list[str] = []
        self.unpaged: list[str] = []
        self.basis: dict[str, str] = {}

    @property
    def departs(self) -> bool:
        """Whether this host departs from the architecture in a way that needs a remedy."""
        return bool(self.missing) or self.syscall_broken or self.vmcall_loops

    def verdicts(self) -> dict[str, object]:
        """Return every finding with a basis; they are equal in each probe of one host."""
        return {name: getattr(self, name) for name in VERDICTS}

    def as_text(self) -> str:
        """Return the findings as lines ``name=value``, for the cache."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "basis"}
        lines = {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}
        lines.update((f"basis.{name}", text) for name, text in self.basis.items())
        return "".join(f"{name}={value}\n" for name, value in lines.items())

    @classmethod
    def from_text(cls, text: str) -> Findings:
        """Parse the text of :meth:`as_text`. Raises ``ValueError`` for anything else."""
        found = cls()
        lines = dict(line.split("=", 1) for line in text.splitlines())
        found.basis = {name: lines.pop(f"basis.{name}") for name in VERDICTS if f"basis.{name}" in lines}
        if set(lines) != set(cls.__slots__) - {"basis"}:
            raise ValueError("not a record of findings")
        for name, value in lines.items():
            kind = type(getattr(found, name))
            if kind is bool:
                setattr(found, name, value == "True")
            elif kind is list:
                setattr(found, name, [part for part in value.split(",") if part])
            else:
                setattr(found, name, float(value))
        return found
