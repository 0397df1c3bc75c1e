"""Mutated bytes for fuzz tests, and the limits under which what reads them runs."""

from __future__ import annotations

import contextlib
import random
import resource
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MEMORY = 512 << 20  # bytes that one execution may add to the process
SECONDS = 10.0  # of CPU time that one may take: a hundred times what the slowest does on a slow host
_ODD = [0, 1, 0x17, 0x18, 0x1B, 0x1F, 0x7F, 0x80, 0x9A, 0x9B, 0xA0, 0xBA, 0xC2, 0xF6, 0xFF]


def mutated(chance: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of ``corpus`` with up to eight changes: bits, bytes, numbers; pieces repeated, cut out or spliced in."""
    data = bytearray(chance.choice(corpus))
    for _ in range(chance.randrange(1, 9)):
        at = chance.randrange(len(data) + 1)
        size = chance.choice([1, 1, 2, 4, 8, chance.randrange(1, 65)])
        how = chance.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = chance.choice(_ODD)
        elif how == 2:
            data[at : at + size] = chance.choice([b"\0", b"\xff", b"\x80", b"\x7f"]) * size
        elif how == 3:
            data[at:at] = data[at : at + size] * chance.choice([1, 2, 100])
        elif how == 4:
            del data[at : at + size]
        elif how == 5:
            other = chance.choice(corpus)
            start = chance.randrange(len(other) + 1)
            data[at : at + size] = other[start : start + size]
        else:
            number = chance.choice([0, 1, len(data), 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62])
            data[at : at + 8] = number.to_bytes(8, chance.choice(["big", "little"]))
        del data[1 << 16 :]
    return bytes(data)


def replaced(chance: random.Random, value: Any, others: Sequence[Any]) -> Any:
    """A copy of a plain value with one part, anywhere in it, replaced by one of ``others``, removed, or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.05:
            return {name: part for name, part in value.items() if name != key}
        if chance.random() < 0.05:
            return {**value, chance.choice(["path", "more", 7]): chance.choice(others)}
        return {**value, key: replaced(chance, value[key], others)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        if chance.random() < 0.1:
            return value[:at] + value[at:] * chance.choice([0, 2, 50])
        return [*value[:at], replaced(chance, value[at], others), *value[at + 1 :]]
    return chance.choice(others)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Executions within may add :data:`MEMORY` to the process together: one that asks for more gets MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(times: int, seed: int, once: Callable[[random.Random], object]) -> None:
    """Call ``once`` so many times under the limits, each with a generator of its own: a failure names its number."""
    with limited():
        for number in range(times):
            began = time.process_time()
            try:
                once(random.Random(f"{seed}:{number}"))
            except BaseException as error:
                raise AssertionError(f"execution {number} of seed {seed}: {error!r}") from error
            took = time.process_time() - began
            assert took < SECONDS, f"execution {number} of seed {seed} took {took:.1f} s"
