"""Waiting for a file descriptor from asyncio."""

from __future__ import annotations

import asyncio
import os


async def readable(fd: int, timeout: float | None) -> bool:
    """Wait until ``fd`` is readable, at most ``timeout`` seconds; return whether it is.

    The loop watches a duplicate, since a loop takes one reader for each descriptor and several tasks may wait.
    """
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    own = os.dup(fd)
    loop.add_reader(own, ready.set)
    try:
        async with asyncio.timeout(timeout):
            await ready.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(own)
        os.close(own)
    return True
