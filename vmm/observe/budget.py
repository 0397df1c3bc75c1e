"""What looking at a guest may cost the host: seconds, bytes of guest memory that are looked at, bytes that are kept.

A guest can make its memory arbitrarily expensive to analyse: symbol tables that unpack to gigabytes, page tables that
lead round in circles, a million places that look like the beginning of something. Each reader therefore spends as it
goes, in a part of one budget::

    budget = Budget()
    found = []
    with budget.part("its call stack") as part:
        for ...:
            part.spend(looked=8)
            found.append(...)
    # here with all of it, or with what was found when the part was spent; budget.notes says which

A part gets half of what is left, so that no reader leaves nothing to those behind it.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmm.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

# The 150,000 symbols of a stock kernel take 0.6 s, its log and its stack less.
SECONDS = 10.0
_WAITING = 4  # seconds of any time for one of processor time: a busy host shows no less of a guest
LOOKED = 64 << 30  # bytes; searching goes at gigabytes a second
KEPT = 96 << 20  # bytes; the names of a distribution's kernel are 6 MiB


class Spent(VmmError):
    """A budget was used up: what was looked for is not known to be absent."""


class Budget:
    """``seconds`` of this thread's processor time from now on, ``looked`` bytes of guest memory, and ``kept`` bytes in
    this process. No more than ``within`` seconds of any time pass (four times ``seconds`` if it is not given).

    ``notes`` are sentences about the parts that were ended, for the reader of the result.
    """

    __slots__ = ("_begun", "_deadline", "_kept", "_left", "_looked", "_parent", "_seconds", "_what", "notes")

    def __init__(
        self, seconds: float = SECONDS, looked: int = LOOKED, kept: int = KEPT, within: float | None = None
    ) -> None:
        self._begun = time.thread_time()
        self._seconds = seconds
        self._deadline = time.monotonic() + (_WAITING * seconds if within is None else within)
        self._looked = self._left = looked
        self._kept = kept
        self._what = "looking at the guest"
        self._parent: Budget | None = None
        self.notes: list[str] = []

    @property
    def within(self) -> float:
        """Seconds of any time that are left; negative when they are over."""
        return self._deadline - time.monotonic()

    def part(self, what: str) -> Budget:
        """Half of what is left, as a context that ends silently when it is spent, with a note that names ``what``."""
        left = max(0.0, self._begun + self._seconds - time.thread_time())
        part = Budget(left / 2, self._left // 2, self._kept // 2, max(0.0, self.within) / 2)
        part._what, part._parent, part.notes = what, self, self.notes
        return part

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that passes inside is not spent: another machine runs."""
        ran, at = time.thread_time(), time.monotonic()
        try:
            yield
        finally:
            self._begun += time.thread_time() - ran
            self._deadline += time.monotonic() - at

    def spend(self, looked: int = 0, kept: int = 0) -> None:
        """``looked`` more bytes of guest memory were read, ``kept`` more are held here. Raises :class:`Spent`."""
        self._left -= looked
        self._kept -= kept
        if self._left < 0:
            raise Spent(f"{self._what} was ended after {self._looked >> 20} MiB of guest memory")
        if self._kept < 0:
            raise Spent(f"{self._what} was ended: it takes too much of the host's memory")
        if time.thread_time() - self._begun > self._seconds or self.within < 0:
            raise Spent(f"{self._what} was ended: it takes too long")

    def __enter__(self) -> Budget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._parent is not None:
            self._parent._left -= self._looked - self._left
            self._parent._kept = min(self._parent._kept, self._parent._kept // 2 + self._kept)
        if not isinstance(error, Spent):
            return False
        if len(self.notes) < 16 and (note := f"{error}; what was found until then is shown") not in self.notes:
            self.notes.append(note)
        return True
