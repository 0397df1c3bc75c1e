"""Plain values as CBOR: one value, one encoding; of other bytes nothing comes but ValueError."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.snapshot import cbor

INTEGERS = st.integers(-(2**66), 2**66) | st.integers(-(2**2000), 2**2000)
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.binary(max_size=300) | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=30)
        | st.dictionaries(st.integers(-300, 70000) | st.text(max_size=9), inner, max_size=30)
    ),
    max_leaves=60,
)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: 1 is not True."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, list):
        return all(map(same, one, other))
    if isinstance(one, dict):
        return all(same(value, other[key]) for key, value in one.items())
    return True


@given(PLAIN)
@settings(max_examples=examples(200), deadline=None)
def test_what_was_encoded_is_decoded(value: Any) -> None:
    assert same(cbor.decode(cbor.encode(value)), value)


@given(st.binary(max_size=200) | PLAIN.map(cbor.encode), st.data())
@settings(max_examples=examples(300), deadline=None)
def test_hostile_bytes_are_refused_or_are_the_encoding_of_what_they_become(encoded: bytes, data: st.DataObject) -> None:
    changed = bytearray(encoded)
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        value = cbor.decode(bytes(changed))
    except ValueError:
        return
    assert cbor.encode(value) == changed


# RFC 8949, appendix A
@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("1903e8", 1000),
        ("1bffffffffffffffff", 18446744073709551615),
        ("c249010000000000000000", 18446744073709551616),
        ("3bffffffffffffffff", -18446744073709551616),
        ("c349010000000000000000", -18446744073709551617),
        ("3903e7", -1000),
        ("f6", None),
        ("f5", True),
        ("4401020304", bytes([1, 2, 3, 4])),
        ("62c3bc", "\u00fc"),
        ("8301820203820405", [1, [2, 3], [4, 5]]),
        ("a201020304", {1: 2, 3: 4}),
        ("a26161016162820203", {"a": 1, "b": [2, 3]}),
    ],
)
def test_the_encoding_is_that_of_the_standard(encoded: str, value: Any) -> None:
    assert cbor.encode(value).hex() == encoded
    assert same(cbor.decode(bytes.fromhex(encoded)), value)


@pytest.mark.parametrize(
    "encoded",
    [
        "", "1817", "190017", "1a0000ffff", "9f01ff", "5f4101ff", "fb3ff199999999999a", "f7", "a2616201616101",
        "a2010101 02", "a1f501", "0000", "c24100", "c2480100000000000000", "c24900ffffffffffffffff", "c001", "62ffff",
        "9bffffffffffffffff", "5bffffffffffffffff", "81" * 100 + "00",
    ],
)  # fmt: skip
def test_other_encodings_are_refused(encoded: str) -> None:
    with pytest.raises(ValueError):
        cbor.decode(bytes.fromhex(encoded))


@pytest.mark.parametrize(
    "value",
    [1.5, (1,), {b"a": 1}, [bytearray(1)], {"huge": 1 << 40000}, {1.0: 2}, {1 << 64: 0}, "x" * ((1 << 20) + 1)],
    ids=["float", "tuple", "bytes key", "bytearray", "huge", "float key", "large key", "long text"],
)
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        cbor.encode(value)


@pytest.mark.parametrize(
    "item", ["80", "a0", "a1f5f6", "40", "60", "00", "c249010000000000000000"], ids=lambda item: f"items {item}"
)
def test_a_small_record_does_not_become_a_large_value(item: str) -> None:
    """A million values are decoded into 100 MB at most; of one more not even the list is made."""
    n = cbor.VALUES_MAX + 1
    encoded = b"\x9a" + n.to_bytes(4, "big") + bytes.fromhex(item) * n
    tracemalloc.start()
    with pytest.raises(ValueError, match="more values than a record may have"):
        cbor.decode(encoded)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_values_are_counted_wherever_they_are() -> None:
    nested: Any = {"a": [1, {"b": 2}, []], 5: None}  # 4 in the dict, 3 in the list, 2 in its dict
    assert cbor.decode(cbor.encode(nested), 9) == nested
    with pytest.raises(ValueError, match="more values"):
        cbor.decode(cbor.encode(nested), 8)


def test_integer_keys_that_a_dict_would_not_tell_apart_are_refused() -> None:
    """Python's hash of an integer is its remainder by 2^61 - 1: keys chosen by it take quadratic time."""
    key = cbor.encode([((1 << 61) - 1) << 64])[1:]
    with pytest.raises(ValueError, match="no number or text"):
        cbor.decode(b"\xa1" + key + b"\x00")


def test_a_text_is_bounded() -> None:
    with pytest.raises(ValueError, match="1048576 are the most"):
        cbor.decode(b"\x7a" + ((1 << 20) + 1).to_bytes(4, "big") + b"x" * ((1 << 20) + 1))


def test_the_sentence_says_where_the_odd_value_is() -> None:
    with pytest.raises(ValueError, match=r"value\['vcpus'\]\[1\] is a float"):
        cbor.encode({"vcpus": [1, 2.0]})
