"""A thread that is kept for the next run: creating one costs as much as a short run of a guest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Runner:
    """A thread that runs one callable after another. The first :meth:`start` creates it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._work: Callable[[], object] | None = None  # None asks the thread to end
        self._given = threading.Lock()  # released for each piece of work
        self._given.acquire()
        self._busy = threading.Lock()

    @property
    def current(self) -> bool:
        """Return whether the caller runs on this thread."""
        return self._thread is threading.current_thread()

    @property
    def processor_seconds(self) -> float:
        """Return the processor time of the thread since its creation, in seconds; 0 if it does not exist."""
        import time

        thread = self._thread
        if thread is None or thread.ident is None:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

    def start(self, work: Callable[[], object]) -> None:
        """Run ``work()`` on the thread. The previous one must have finished."""
        self._busy.acquire()
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self._work = work
        self._given.release()

    def join(self) -> None:
        """Wait until the thread is idle."""
        with self._busy:
            pass

    def close(self) -> None:
        """End the thread, which must be idle."""
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
                del work  # an idle thread must not keep the owner of `work` alive
                self._busy.release()
