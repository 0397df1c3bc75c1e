"""The types of the native half that mypy sees are those of the built extension."""

from __future__ import annotations

from vmm._ffi import ffi, lib, stub
from vmm._ffi.build import KVM_NUMBERS


def test_the_stub_is_what_the_built_extension_gives() -> None:
    assert stub.FILE.read_text() == stub.stub(), "run: python -m vmm._ffi.stub"


def test_handles_of_different_kinds_have_different_types() -> None:
    text = stub.stub()
    assert "def vmm_vm_pause(self, _0: vmm_vm) -> int: ..." in text
    assert "def vmm_vcpu_run(self, _0: vmm_vcpu) -> int: ..." in text
    assert "    cs: vmm_segment\n" in text  # a field that is a struct


def test_native_numbers_are_those_of_the_kernel() -> None:
    assert all(isinstance(getattr(lib, name), int) for name in KVM_NUMBERS)
    assert (lib.KVM_CAP_MAX_VCPUS, lib.KVM_EXIT_MMIO, lib.KVM_MP_STATE_HALTED) == (66, 6, 3)
    assert ffi.offsetof("vmm_trace_event", "rip") == 8
