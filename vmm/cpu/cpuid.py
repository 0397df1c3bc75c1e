"""The guest's CPUID: KVM's supported leaves, with each vCPU's place in the topology."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib
from vmm.cpu import features
from vmm.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm._ffi import vmm_vcpu, vmm_vm

MAX_ENTRIES = 256

# CPUID.1:ECX
HYPERVISOR = 1 << 31
TSC_DEADLINE = 1 << 24
# CPUID.1:EDX
HTT = 1 << 28
# KVM paravirtual features (Documentation/virt/kvm/x86/cpuid.rst), CPUID.40000001:EAX
KVM_FEATURES = 0x40000001
KVM_HYPERCALL_FEATURES = 1 << 7 | 1 << 11 | 1 << 13  # PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD: each ends in VMCALL

PCID = 1 << 17  # CPUID.1:ECX
GIB_PAGES = 1 << 26  # CPUID.80000001:EDX


_COLUMNS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_LEAF = Struct(f"={len(_COLUMNS)}I12x")  # a vmm_cpuid_entry

_STAMPED = (1, 4, 0xB, 0x1F, 0x8000001E)  # leaves that tell a vCPU's place


class _Supported:
    """The leaves that KVM supports and a guest may have, and an index of each function's entries."""

    def __init__(self, vm: vmm_vm) -> None:
        entries = ffi.new("vmm_cpuid_entry[]", MAX_ENTRIES)
        self.count = check(lib.vmm_vm_supported_cpuid(vm, entries, MAX_ENTRIES))
        self.places: dict[int, list[int]] = {}
        for i in range(self.count):
            self.places.setdefault(entries[i].function, []).append(i)
        offered = _leaves(entries, self.count)
        by_place = {(entries[i].function, entries[i].index): entries[i] for i in range(self.count)}
        for function, index, register, value in features.edits(offered, saved_msrs(vm)):
            setattr(by_place[function, index], register, value)
        self.leaves = bytes(ffi.buffer(entries, self.count * _LEAF.size))


def _leaves(entries: Any, count: int) -> features.Leaves:
    leaves = _LEAF.iter_unpack(ffi.buffer(entries, count * _LEAF.size))
    return {(row[0], row[1]): dict(zip(_COLUMNS[3:], row[3:], strict=True)) for row in leaves}


def offered(vm: vmm_vm) -> features.Leaves:
    """Return the leaves that KVM supports, before any is withheld."""
    entries = ffi.new("vmm_cpuid_entry[]", MAX_ENTRIES)
    return _leaves(entries, check(lib.vmm_vm_supported_cpuid(vm, entries, MAX_ENTRIES)))


def saved_msrs(vm: vmm_vm) -> list[int]:
    """Return the MSRs that are saved for a vCPU that has them."""
    indices = ffi.new("uint32_t[]", lib.VMM_STATE_MSRS_MAX)
    return [indices[i] for i in range(check(lib.vmm_vm_saved_msrs(vm, indices, len(indices))))]


# Cached per process: it does not change while KVM is loaded, and a query takes 0.3 ms where CPUID exits to a
# hypervisor below. (Fields that depend on the querying CPU are set for each vCPU.)
_supported: _Supported | None = None


class CpuidTable:
    """The host's supported leaves without the features whose state is not saved (:mod:`vmm.cpu.features`), edited once
    for the machine, then stamped for each vCPU."""

    def __init__(self, vm: vmm_vm, cpus: int, *, hypercalls: bool = True) -> None:
        global _supported
        _supported = _supported or _Supported(vm)
        self._places = _supported.places
        self.count = _supported.count
        self._entries = ffi.from_buffer("vmm_cpuid_entry[]", bytearray(_supported.leaves))
        self.cpus = cpus
        self._per_vcpu = list(self._entries_of(*_STAMPED))
        width = max(0, (cpus - 1).bit_length())
        for e in self._entries_of(1):
            e.ecx |= HYPERVISOR | TSC_DEADLINE
            e.edx = e.edx | HTT if cpus > 1 else e.edx & ~HTT
        for e in self._entries_of(KVM_FEATURES):
            if not hypercalls:
                e.eax &= ~KVM_HYPERCALL_FEATURES
        for e in self._entries_of(0xB, 0x1F):
            self._topology(e, width)
        for e in self._entries_of(0x80000008):
            e.ecx = (e.ecx & ~0xF0FF) | min(cpus - 1, 0xFF) | width << 12

    def value(self) -> list[list[int]]:
        """Return the leaves as plain values: function, index, flags, EAX, EBX, ECX, EDX of each."""
        return [list(leaf) for leaf in _LEAF.iter_unpack(ffi.buffer(self._entries, self.count * _LEAF.size))]

    def become(self, value: object) -> None:
        """Load the leaves that :meth:`value` returned, possibly on another host. Call it before :meth:`apply`.

        Raises ``ValueError`` for any other value, :class:`~vmm.errors.HostError` naming the features that this host
        lacks.
        """
        leaves = rows(value)
        if missing := _missing(leaves, self.value()):
            raise HostError(
                f"this host's processor or KVM lacks what the machine has: {', '.join(missing)}; "
                "use a host of the same kind, or one with more"
            )
        self.count = len(leaves)
        self._entries = ffi.from_buffer("vmm_cpuid_entry[]", bytearray(b"".join(_LEAF.pack(*row) for row in leaves)))
        self._places = {}
        for i, row in enumerate(leaves):
            self._places.setdefault(row[0], []).append(i)
        self._per_vcpu = list(self._entries_of(*_STAMPED))

    def _entries_of(self, *functions: int) -> Iterator[Any]:
        return (self._entries[i] for function in functions for i in self._places.get(function, ()))

    @property
    def physical_bits(self) -> int:
        """MAXPHYADDR: the width of a guest-physical address in bits."""
        return next((int(e.eax) & 0xFF for e in self._entries_of(0x80000008)), 36)

    @property
    def gigabyte_pages(self) -> bool:
        """Whether a page may be 1 GiB."""
        return any(e.edx & GIB_PAGES for e in self._entries_of(0x80000001))

    def xsave_offset(self, component: int) -> int:
        """Return the offset of a state component in an XSAVE area; 0 if the guest lacks it (SDM vol. 1, 13.5.2)."""
        supported = any(e.index == 0 and e.eax >> component & 1 for e in self._entries_of(0xD))
        return next((int(e.ebx) for e in self._entries_of(0xD) if supported and e.index == component), 0)

    def _topology(self, e: Any, width: int) -> None:
        # One thread per core, all cores in one package (SDM vol. 2, CPUID leaf 0BH: level types 1 SMT, 2 core).
        shift, threads, kind = ((0, 1, 1), (width, self.cpus, 2))[e.index] if e.index < 2 else (0, 0, 0)
        e.eax, e.ebx, e.ecx = shift, threads, kind << 8 | e.index

    def apply(self, vcpu: vmm_vcpu, apic_id: int) -> None:
        """Set the leaves of a vCPU with this APIC id."""
        for e in self._per_vcpu:
            if e.function == 1:
                e.ebx = (e.ebx & 0xFFFF) | min(self.cpus, 0xFF) << 16 | (apic_id & 0xFF) << 24
            elif e.function == 4 and e.eax & 0x1F:
                e.eax = (e.eax & 0x3FFF) | min(self.cpus - 1, 0x3F) << 26
            elif e.function in (0xB, 0x1F):
                e.edx = apic_id
            elif e.function == 0x8000001E:
                e.eax, e.ebx, e.ecx = apic_id, apic_id & 0xFF, 0
        check(lib.vmm_vcpu_set_cpuid(vcpu, self._entries, self.count))


# Registers whose bits are features: a guest must find its features on every host where it continues.
_FEATURES = features.REGISTERS | {(0xD, 0, "eax"), (0xD, 0, "edx")}


def rows(value: object) -> list[list[int]]:
    """Check and return a value of :meth:`CpuidTable.value`. Raises ``ValueError``."""
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise ValueError("not a table of CPUID leaves")
    for row in value:
        if not isinstance(row, list) or len(row) != len(_COLUMNS):
            raise ValueError("a CPUID leaf has 7 numbers")
        if not all(isinstance(n, int) and 0 <= n < 1 << 32 for n in row):
            raise ValueError("a CPUID leaf has numbers of 32 bits")
    return value


def _missing(wanted: list[list[int]], found: list[list[int]]) -> list[str]:
    """Return the names of what the second table lacks: the vendor, or feature bits."""
    here = {(row[0], row[1]): row for row in found}
    missing = []
    for row in wanted:
        has = here.get((row[0], row[1]), [0] * len(_COLUMNS))
        if row[0] == 0 and row[4:] != has[4:]:
            missing.append(f"vendor {_vendor(row)} (this one is {_vendor(has)})")
        for column, register in enumerate(_COLUMNS[3:], 3):
            if (row[0], row[1], register) not in _FEATURES:
                continue
            bits = row[column] & ~has[column]
            missing += [f"CPUID.{row[0]:X}H.{row[1]}:{register.upper()}[{bit}]" for bit in range(32) if bits >> bit & 1]
    return missing


def _vendor(row: list[int]) -> str:
    return b"".join(row[i].to_bytes(4, "little") for i in (4, 6, 5)).decode("latin-1")
