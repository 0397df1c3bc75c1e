"""A guest's CPUID offers no feature whose state is not saved, whatever the host offers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmm.cpu import features
from vmm.cpu.features import CARRIED, EMPTY, HIDDEN, PLAIN, REGISTERS, XSAVE_AREA, Leaves

ALL = 0xFFFFFFFF
# Offset and size of XSAVE components in the standard format on processors that have all of them (SDM vol. 1, 13.4;
# figures as CPUID of such processors has them)
PLACES = {2: (576, 256), 3: (960, 64), 4: (1024, 64), 5: (1088, 64), 6: (1152, 512), 7: (1664, 1024), 8: (0, 128),
          9: (2688, 8), 11: (0, 16), 12: (0, 24), 17: (2752, 64), 18: (2816, 8192), 19: (960, 128)}  # fmt: skip
EVERY_MSR = frozenset(msr for by in CARRIED.values() for msr in by.msrs)


def host(vendor: str, *, xcr0: int = 0x602FF, xss: int = 0x1900, xsaves: bool = True) -> Leaves:
    """A host that offers every bit of every feature register and every leaf, known or not."""
    leaves: Leaves = {}
    for function, index in {(register[0], register[1]) for register in REGISTERS} | {(leaf, 0) for leaf in EMPTY}:
        if vendor == "VMX" and function in (0x8000000A, 0x8000001F):
            continue
        leaves[function, index] = dict.fromkeys(("eax", "ebx", "ecx", "edx"), ALL)
    leaves[0xD, 0] = {"eax": xcr0 & ALL, "ebx": 576, "ecx": 11008, "edx": xcr0 >> 32}
    leaves[0xD, 1] = {"eax": ALL if xsaves else 7, "ebx": 0, "ecx": xss, "edx": 0}
    for number, (offset, size) in PLACES.items():
        if (xcr0 | xss) >> number & 1:
            leaves[0xD, number] = {"eax": size, "ebx": offset, "ecx": int(bool(xss >> number & 1)), "edx": 0}
    return leaves


def guest(leaves: Leaves, msrs: frozenset[int] = EVERY_MSR) -> Leaves:
    """What a guest is offered on that host."""
    offered = {place: dict(values) for place, values in leaves.items()}
    for function, index, register, value in features.edits(leaves, msrs):
        offered[function, index][register] = value
    return offered


@pytest.fixture(params=["VMX", "SVM"])
def everything(request: pytest.FixtureRequest) -> Leaves:
    return host(request.param)


def bits(leaves: Leaves) -> set[features.Bit]:
    return {
        (function, index, register, bit)
        for (function, index), values in leaves.items()
        for register, value in values.items()
        if (function, index, register) in REGISTERS
        for bit in range(32)
        if value >> bit & 1
    }


def test_a_guest_has_no_feature_but_those_whose_state_is_saved(everything: Leaves) -> None:
    plain = {(*register, bit) for register, numbers in PLAIN.items() for bit in numbers}
    offered = bits(guest(everything))
    assert offered == {bit for bit in bits(everything) if bit in plain or bit in CARRIED}
    assert offered.isdisjoint(HIDDEN)


def test_what_no_table_knows_is_not_offered_and_is_named(everything: Leaves) -> None:
    assert everything[7, 0]["edx"] >> 13 & 1
    assert not guest(everything)[7, 0]["edx"] >> 13 & 1
    assert "CPUID.7H.0:EDX[13]" in features.unknown(everything)
    assert "CPUID.7H.0:EDX[13]" in features.withheld(everything, EVERY_MSR)
    assert features.unknown(guest(everything)) == []


@pytest.mark.parametrize(
    ("function", "register", "bit", "name"),
    [(1, "ecx", 5, "VMX"), (0x80000001, "ecx", 2, "SVM"), (7, "edx", 24, "AMX-TILE"), (7, "ecx", 7, "SHSTK"),
     (7, "ebx", 2, "SGX"), (1, "ecx", 15, "PDCM"), (0x80000001, "ecx", 23, "PerfCtrExtCore")],
)  # fmt: skip
def test_features_with_state_that_is_not_saved_are_refused_by_name(
    everything: Leaves, function: int, register: str, bit: int, name: str
) -> None:
    assert not guest(everything)[function, 0][register] >> bit & 1
    assert name in features.withheld(everything, EVERY_MSR)
    assert HIDDEN[function, 0, register, bit][1]  # the reason


def test_leaves_of_hidden_features_are_empty(everything: Leaves) -> None:
    for (function, _), values in guest(everything).items():
        assert function not in EMPTY or set(values.values()) == {0}


# ---- XSAVE ----


def test_a_component_beyond_the_saved_area_goes_with_its_sizes(everything: Leaves) -> None:
    offered = guest(everything)
    assert offered[0xD, 0]["eax"] == 0x2FF  # without AMX's 17 and 18
    assert offered[0xD, 0]["edx"] == 0
    assert offered[0xD, 0]["ecx"] == 2688 + 8
    assert set(offered[0xD, 18].values()) == {0}
    assert offered[0xD, 9] == everything[0xD, 9]
    assert {"XSAVE component 17", "XSAVE component 18"} <= set(features.withheld(everything, EVERY_MSR))


def test_supervisor_components_are_not_offered(everything: Leaves) -> None:
    offered = guest(everything)
    assert (offered[0xD, 1]["ecx"], offered[0xD, 1]["edx"]) == (0, 0)
    assert set(offered[0xD, 11].values()) == set(offered[0xD, 12].values()) == {0}


def test_a_known_component_that_a_host_places_beyond_the_area_takes_its_features_along() -> None:
    leaves = host("VMX")
    leaves[0xD, 9] = {"eax": 8, "ebx": XSAVE_AREA - 7, "ecx": 0, "edx": 0}
    leaves[0xD, 7]["ebx"] = XSAVE_AREA
    offered = guest(leaves)
    assert not offered[7, 0]["ecx"] >> 3 & 1  # PKU
    assert not offered[7, 0]["ebx"] >> 16 & 1  # AVX-512
    assert offered[7, 0]["ebx"] >> 5 & 1  # AVX2
    assert offered[0xD, 0]["eax"] == 0x7F


@pytest.mark.parametrize("xcr0", [0, 1 << 62 | 7, 3, 7, 0x207, 0x2FF])
def test_the_area_that_a_guest_is_told_of_holds_what_it_may_have(xcr0: int) -> None:
    offered = guest(host("SVM", xcr0=xcr0))
    held = [number for number in range(64) if (offered[0xD, 0]["eax"] | offered[0xD, 0]["edx"] << 32) >> number & 1]
    assert set(held) <= set(features.COMPONENTS)
    ends = [sum(PLACES[number]) for number in held if number > 1]
    assert offered[0xD, 0]["ecx"] == (max([576, *ends]) if held else 0) <= XSAVE_AREA
    assert bool(offered[1, 0]["ecx"] >> 28 & 1) == (2 in held)


# ---- MSRs ----


def test_a_feature_goes_where_one_of_its_msrs_cannot_be_saved(everything: Leaves) -> None:
    offered = bits(guest(everything))
    for msrs in {by.msrs for by in CARRIED.values() if by.msrs}:
        for msr in (msrs[0], msrs[-1]):
            lost = offered - bits(guest(everything, EVERY_MSR - {msr}))
            assert lost == {bit for bit, by in CARRIED.items() if msr in by.msrs}, hex(msr)


# ---- the tables ----


def test_each_bit_is_in_one_table() -> None:
    plain = {(*register, bit) for register, numbers in PLAIN.items() for bit in numbers}
    tables = [plain, set(CARRIED), set(HIDDEN)]
    assert all(one.isdisjoint(other) for i, one in enumerate(tables) for other in tables[i + 1 :])
    assert all(0 <= bit[3] < 32 for table in tables for bit in table)
    assert all(by.components or by.msrs for by in CARRIED.values())


def test_no_two_components_overlap_in_the_layout_these_tests_use() -> None:
    user = sorted(PLACES[number] for number in features.COMPONENTS if number in PLACES)
    assert all(offset + size <= following for (offset, size), (following, _) in pairwise(user))


def test_a_host_that_offers_little_is_left_as_it_is() -> None:
    leaves: Leaves = {
        (1, 0): {"eax": 0xF11, "ebx": 0x800, "ecx": 1 << 13, "edx": 0x078BFBFF},
        (0, 0): {"eax": 1, "ebx": 7},
    }
    assert list(features.edits(leaves, EVERY_MSR)) == []
    assert features.withheld(leaves, EVERY_MSR) == []
