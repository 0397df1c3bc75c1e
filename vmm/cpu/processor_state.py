"""The processors of a machine as a plain value: all vCPUs, the chips KVM models, the clock.

The order in which KVM takes them is in ``native/time/state.c``; here its structs become values and values structs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm._ffi import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm._ffi import vmm_vm
    from vmm.cpu.vcpu import Vcpu
    from vmm.devices.device import State

VERSION = 2
_MSRS = ("n_msrs", "msrs")  # a counted list in C, a list here


def save(vm: vmm_vm, vcpus: Sequence[Vcpu]) -> State:
    """Return the state of a machine that is paused or does not run."""
    native, chips = ffi.new("vmm_vcpu_state[]", len(vcpus)), ffi.new("vmm_chips_state *")
    check(lib.vmm_vm_save(vm, native, chips))
    return {
        "version": VERSION,
        "vcpus": [_vcpu_value(native[i]) for i in range(len(vcpus))],
        "chips": plain(chips[0]),
    }


def load(vm: vmm_vm, vcpus: Sequence[Vcpu], state: State, *, ahead: bool = False) -> None:
    """Become what :func:`save` gave, on a machine with as many vCPUs and the same chips.

    TSCs and kvmclock continue from their saved values; with ``ahead`` the time since is added (:func:`passed_since`).
    Raises ``ValueError`` for an invalid state, :class:`~vmm.errors.HostError` if KVM refuses a part of it or cannot run
    the guest's TSC at its saved rate.
    """
    if not isinstance(state, dict) or state.keys() != {"version", "vcpus", "chips"} or state["version"] != VERSION:
        raise ValueError(f"not the state of processors of version {VERSION}")
    if not isinstance(state["vcpus"], list) or len(state["vcpus"]) != len(vcpus):
        raise ValueError(f"the state of processors is not of {len(vcpus)} vCPUs")
    native, chips = ffi.new("vmm_vcpu_state[]", len(vcpus)), ffi.new("vmm_chips_state *")
    for i, value in enumerate(state["vcpus"]):
        _fill_vcpu(native[i], value)
    fill(chips[0], state["chips"], "chips")
    check(lib.vmm_vm_load(vm, native, chips, ahead))


def passed_since(state: State) -> int:
    """Return the nanoseconds by the host's clock since a state was saved; negative if the clock was set back."""
    import time

    return time.time_ns() - int(state["chips"]["realtime"])


def _vcpu_value(native: Any) -> State:
    value = plain(native, without=_MSRS)
    value["msrs"] = [[int(native.msrs[i].index), int(native.msrs[i].value)] for i in range(native.n_msrs)]
    return value


def _fill_vcpu(native: Any, value: object) -> None:
    if not isinstance(value, dict) or not isinstance(msrs := value.get("msrs"), list):
        raise ValueError("vcpu: a list of MSRs is missing")
    fill(native, {name: part for name, part in value.items() if name != "msrs"}, "vcpu", without=_MSRS)
    if len(msrs) > len(native.msrs):
        raise ValueError(f"vcpu: {len(msrs)} MSRs are more than {len(native.msrs)}")
    native.n_msrs = len(msrs)
    for i, pair in enumerate(msrs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("vcpu: an MSR is an index and a value")
        fill(native.msrs[i], {"index": pair[0], "value": pair[1]}, "vcpu: MSR")


# ---- structs and values ----


def plain(native: Any, without: Sequence[str] = ()) -> State:
    """Convert a struct to a value: numbers to ints, byte arrays to bytes, other arrays to lists, structs to dicts."""
    return {name: _value(getattr(native, name), field.type) for name, field in _fields(native) if name not in without}


def fill(native: Any, value: object, where: str, without: Sequence[str] = ()) -> None:
    """Fill a struct from a value. Raises ``ValueError``, naming ``where``, for a missing, unknown or unfit field."""
    fields = [(name, field) for name, field in _fields(native) if name not in without]
    if not isinstance(value, dict) or value.keys() != {name for name, _ in fields}:
        names = value.keys() ^ {name for name, _ in fields} if isinstance(value, dict) else [where]
        raise ValueError(f"{where}: fields missing or unknown: {', '.join(sorted(map(str, names)))}")
    for name, field in fields:
        _set(native, name, field.type, value[name], f"{where}.{name}")


def _fields(native: Any) -> list[tuple[str, Any]]:
    kind = ffi.typeof(native)
    return (kind.item if kind.kind == "pointer" else kind).fields  # type: ignore[no-any-return]


def _value(native: Any, kind: Any) -> Any:
    if kind.kind == "struct":
        return plain(native)
    if kind.kind != "array":
        return int(native)
    if kind.item.cname == "uint8_t":
        return bytes(ffi.buffer(native))
    return [_value(native[i], kind.item) for i in range(kind.length)]


def _set(native: Any, name: str, kind: Any, value: object, where: str) -> None:
    if kind.kind == "struct":
        fill(getattr(native, name), value, where)
    elif kind.kind == "array" and kind.item.cname == "uint8_t":
        if not isinstance(value, bytes) or len(value) != kind.length:
            raise ValueError(f"{where} is not {kind.length} bytes")
        ffi.memmove(getattr(native, name), value, kind.length)
    elif kind.kind == "array":
        if not isinstance(value, list) or len(value) != kind.length:
            raise ValueError(f"{where} is not a list of {kind.length}")
        for i, item in enumerate(value):
            if kind.item.kind == "struct":
                fill(getattr(native, name)[i], item, f"{where}[{i}]")
            else:
                getattr(native, name)[i] = _number(item, kind.item, where)
    else:
        setattr(native, name, _number(value, kind, where))


def _number(value: object, kind: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}, not a number")
    signed = kind.cname == "int64_t"
    low, high = (-(1 << 63), (1 << 63) - 1) if signed else (0, (1 << 8 * ffi.sizeof(kind)) - 1)
    if not low <= value <= high:
        raise ValueError(f"{where} is {value:#x}, which does not fit")
    return value
