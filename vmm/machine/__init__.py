"""A virtual machine: :class:`Machine` is the face, and each other module is one part of it or one step of its life.

``build`` makes the parts; ``parts`` names them. Reading order: ``build``, ``execution``, ``ending``, ``timeline``.
"""

from vmm.machine.face import Machine as Machine
from vmm.machine.stop_reasons import host_outcome as host_outcome

__all__ = ["Machine", "host_outcome"]
