"""A thread that is kept for the next run: making one costs as much as a short run of a guest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Runner:
    """A thread that does what it is given, and waits for more. It is made at the first :meth:`start`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._work: Callable[[], object] | None = None  # None: it shall end
        self._given = threading.Lock()  # released for each piece of work
        self._given.acquire()
        self._busy = threading.Lock()

    @property
    def current(self) -> bool:
        """Whether the caller is on this thread."""
        return self._thread is threading.current_thread()

    @property
    def processor_seconds(self) -> float:
        """Processor time that the thread has had since it was made; 0 where there is none."""
        import time

        thread = self._thread
        if thread is None or thread.ident is None:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

    def start(self, work: Callable[[], object]) -> None:
        """Have ``work()`` done. Not before the one before is over."""
        self._busy.acquire()
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self._work = work
        self._given.release()

    def join(self) -> None:
        """Wait until it has nothing to do."""
        with self._busy:
            pass

    def close(self) -> None:
        """End the thread, which has nothing to do."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._given.release()
            thread.join()

    def _loop(self) -> None:
        while True:
            self._given.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            try:
                work()
            finally:
                del work  # what it belongs to is not kept alive by a thread that waits
                self._busy.release()
