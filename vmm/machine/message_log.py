"""Messages of the monitor to the user about a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGES_MAX = 1000  # a guest can cause messages: later ones are dropped
MESSAGE_MAX = 1000  # characters of one


class MessageLog:
    """The messages so far, and a function that is called with each new one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.on_message: Callable[[str], object] | None = None

    def add(self, text: str) -> None:
        """Add a message, from any thread. Control characters are escaped, as a guest may have chosen the words."""
        text = printable(text, MESSAGE_MAX)
        if len(self.texts) < MESSAGES_MAX:
            self.texts.append(text)
            if self.on_message is not None:
                self.on_message(text)
