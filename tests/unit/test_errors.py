"""Native error codes: the host's answers keep their own words, native code's refusals are told apart from them."""

from __future__ import annotations

import errno
import os

import pytest

from vmm._ffi import check, ffi, from_native, lib
from vmm.errors import BusError, ConfigError, HostError, StateError


@pytest.mark.parametrize(
    ("number", "source", "kind", "sentence"),
    [
        (
            errno.ENOSPC,
            lib.VMM_ERROR_HOST,
            HostError,
            "doing it: No space left on device: make room on the host's disk",
        ),
        (errno.EEXIST, lib.VMM_ERROR_HOST, HostError, "doing it: File exists"),
        (errno.EBUSY, lib.VMM_ERROR_HOST, HostError, "doing it: Device or resource busy"),
        (
            errno.EMFILE,
            lib.VMM_ERROR_HOST,
            HostError,
            "doing it: Too many open files: too many open files; raise the limit",
        ),
        (errno.ENOMEM, lib.VMM_ERROR_HOST, HostError, "doing it: Cannot allocate memory: give the host more memory"),
        (errno.ENOSPC, lib.VMM_ERROR_REFUSED, ConfigError, "doing it: that is as many as there can be"),
        (errno.EEXIST, lib.VMM_ERROR_REFUSED, StateError, "doing it"),
        (errno.EBUSY, lib.VMM_ERROR_REFUSED, StateError, "doing it"),
        (errno.EALREADY, lib.VMM_ERROR_REFUSED, StateError, "doing it"),
        (errno.EDEADLK, lib.VMM_ERROR_REFUSED, StateError, "doing it: call it from another thread"),
        (errno.EINVAL, lib.VMM_ERROR_REFUSED, HostError, "doing it: Invalid argument"),
        (errno.EIO, lib.VMM_ERROR_UNTOLD, HostError, "a request to native code failed: Input/output error"),
    ],
)
def test_a_number_is_read_by_whose_it_is(number: int, source: int, kind: type[Exception], sentence: str) -> None:
    error = from_native(-number, "doing it", source)
    assert type(error) is kind
    assert str(error).startswith(sentence)
    assert vars(error)["errno"] == number
    assert not isinstance(error, BusError)


def test_a_full_disk_of_the_host_is_that() -> None:
    page = ffi.new("uint8_t[]", b"\1" * 4096)  # zeros would be a hole
    sums = ffi.new("uint32_t[]", 1)
    file = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(HostError, match="make room on the host's disk") as refused:
            check(lib.vmm_pages_write(file, 0, page, 4096, ffi.new("uint64_t[]", [1]), sums))
    finally:
        os.close(file)
    assert refused.value.errno == errno.ENOSPC


def test_a_text_is_never_shown_for_another_code() -> None:
    assert lib.vmm_console_create(0, 1, 1, ffi.new("vmm_console **")) == -errno.EINVAL
    assert lib.vmm_error_source(-errno.EINVAL) == lib.VMM_ERROR_REFUSED
    assert lib.vmm_error_source(-errno.EIO) == lib.VMM_ERROR_UNTOLD
    with pytest.raises(HostError, match="a request to native code failed: Input/output error"):
        check(-errno.EIO)
