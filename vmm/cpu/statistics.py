"""KVM's own statistics of a vCPU (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD; Linux 5.14 and later)."""

from __future__ import annotations

import os
from struct import Struct

_HEADER = Struct("=6I")  # struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = Struct("=IhHII")  # struct kvm_stats_desc: flags, exponent, size (in values), offset, bucket_size
_VALUE = Struct("=Q")


class Statistics:
    """The single-value counters of a vCPU by name. They can be read while the vCPU runs.

    Takes the file of ``vmm_vcpu_stats_fd``, which :meth:`close` closes. Raises ``OSError`` where it cannot be read.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            _, name_size, count, _, at, data = _HEADER.unpack(os.pread(self._fd, _HEADER.size, 0))
            size = _DESCRIPTOR.size + name_size
            table = os.pread(self._fd, size * count, at)
            self._places: dict[str, int] = {}
            for start in range(0, len(table) - size + 1, size):
                _, _, values, offset, _ = _DESCRIPTOR.unpack_from(table, start)
                if values == 1:
                    name = table[start + _DESCRIPTOR.size : start + size].split(b"\0")[0]
                    self._places[name.decode()] = data + offset
        except BaseException:
            self.close()
            raise

    def read(self, *names: str) -> dict[str, int]:
        """Return the counters with these names, as far as this KVM has them."""
        places = {name: self._places[name] for name in names if name in self._places}
        return {name: _VALUE.unpack(os.pread(self._fd, _VALUE.size, at))[0] for name, at in places.items()}

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
