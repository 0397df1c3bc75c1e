"""``python -m vmm`` is ``pyvmm``."""

from vmm.cli import entry

entry()
