"""The memory balloon (virtio 1.2, 5.5): the guest gives pages up, the host has them. ``native/virtio/balloon.c``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm._ffi import vmm_vm

PAGE = 4096

MEMORY = (
    "swapped_in", "swapped_out", "major_faults", "minor_faults", "free", "total", "available", "caches",
    "hugetlb_allocations", "hugetlb_failures", "oom_kills", "allocation_stalls", "async_scans", "direct_scans",
    "async_reclaims", "direct_reclaims",
)  # fmt: skip
"""What a guest may tell of its memory, by tag (virtio 1.2, 5.5.6.4; from oom_kills on, Linux's). The first two and
``free`` to ``caches`` are bytes, the others counts."""


class Balloon(VirtioDevice):
    """Set :attr:`target`, and the guest gives up that much memory as soon as it can; lower it, and it takes it back.

    ``deflate_on_oom``: the guest may take pages back before it kills a process for memory. ``reporting``: it names
    free pages by itself, and the host has them back until they are used again. ``statistics``: it can be asked for
    its :meth:`memory`. Raises :class:`~vmm.errors.ConfigError` where memory is in huge pages.
    """

    device_id = 5
    remembers = ("target", *(f"progress{queue}" for queue in range(5)))  # pages; bytes into the oldest buffer

    def __init__(
        self,
        vm: vmm_vm,
        index: int = 0,
        *,
        deflate_on_oom: bool = True,
        reporting: bool = True,
        statistics: bool = True,
    ) -> None:
        import errno

        self.name = f"virtio-balloon{index}"
        flags = (
            (lib.VMM_BALLOON_DEFLATE_ON_OOM if deflate_on_oom else 0)
            | (lib.VMM_BALLOON_REPORTING if reporting else 0)
            | (lib.VMM_BALLOON_STATISTICS if statistics else 0)
        )
        out = ffi.new("vmm_balloon **")
        code = lib.vmm_balloon_create(vm, self.name.encode(), flags, out)
        if code == -errno.ENOTSUP:
            raise ConfigError("a balloon gives back pages of 4 KiB: leave out huge pages, or the balloon")
        check(code)
        self._balloon: Any = out[0]
        self.virtio = lib.vmm_balloon_virtio(self._balloon)

    @property
    def target(self) -> int:
        """Bytes the guest is to give up, a multiple of 4 KiB. Setting raises :class:`~vmm.errors.ConfigError` for
        more than the guest has."""
        return int(self._info().target) * PAGE

    @target.setter
    def target(self, size: int) -> None:
        """Tell the guest."""
        if size < 0 or size % PAGE or size // PAGE > 0xFFFFFFFF:
            raise ConfigError(f"a balloon of {size} bytes: give a multiple of 4096, not below 0")
        if lib.vmm_balloon_set_target(self._balloon, size // PAGE) < 0:
            raise ConfigError(f"a balloon of {size} bytes is more than the guest has: give less")

    @property
    def actual(self) -> int:
        """Bytes the guest says it has given up."""
        return int(self._info().actual) * PAGE

    def counters(self) -> dict[str, int]:
        """Bytes since the start: ``inflated``, ``deflated`` and ``reported`` by the guest; of these ``released`` to
        the host, and ``refused`` because they were not RAM."""
        info = self._info()
        return {name: int(getattr(info, name)) * PAGE for name in _COUNTERS}

    def memory(self, timeout: float = 1.0) -> dict[str, int]:
        """What the guest tells of its memory, asked now: those of :data:`MEMORY` that it knows.

        Raises :class:`~vmm.errors.HostError` when no driver gives statistics, or none came for ``timeout`` seconds.
        """
        memory = ffi.new("vmm_balloon_memory *")
        check(lib.vmm_balloon_ask(self._balloon, int(timeout * 1000), memory))
        return {name: int(memory.value[tag]) for tag, name in enumerate(MEMORY) if memory.present >> tag & 1}

    def _info(self) -> Any:
        info = ffi.new("vmm_balloon_info *")
        lib.vmm_balloon_get_info(self._balloon, info)
        return info

    def destroy(self) -> None:
        """Free the native half."""
        if self._balloon is not None:
            lib.vmm_balloon_destroy(self._balloon)
            self._balloon = self.virtio = None


_COUNTERS = ("inflated", "deflated", "reported", "released", "refused")
