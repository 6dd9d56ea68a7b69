"""Events that the suites send to the command that started them.

Without ``DANON_CHANNEL`` (a plain ``pytest suites``) there is no other side, and nothing is sent.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from danon.processes.interruption import Interruption
from danon.processes.json_messages import read_message, write_message

__all__ = ["CHANNEL", "EventChannel"]

CHANNEL = "DANON_CHANNEL"
"""Environment variable: file descriptor of a connected socket."""
GONE = "the command that started the suites has gone"


class EventChannel:
    """A line to the command: JSON objects, one a line.

    The other side answers :meth:`ask` once it has stored the object, so that nothing is measured
    while it writes.
    """

    def __init__(self) -> None:
        """Connect, if the environment names a socket."""
        number = os.environ.get(CHANNEL)
        self._process = os.getpid()
        self._stream = None
        if number is not None:
            with socket.socket(fileno=int(number)) as line:  # the stream keeps it open
                self._stream = line.makefile("rw", encoding="utf-8")

    @property
    def heard(self) -> bool:
        """True if there is another side."""
        return self._stream is not None

    def send(self, **event: Any) -> None:
        """Send an event without waiting.

        Args:
            event: plain data by name.

        Raises:
            Interruption: the other side has gone; ends the session.
        """
        if self._stream is None:
            return
        if os.getpid() != self._process:  # a copy that what is measured has forked
            os._exit(1)
        try:
            write_message(self._stream, event)
        except (OSError, ValueError):  # what is measured may have closed it, too
            raise Interruption(GONE) from None

    def ask(self, **event: Any) -> dict[str, Any]:
        """Send an event and wait for the answer; without another side the answer is empty.

        Args:
            event: plain data by name.

        Raises:
            Interruption: the other side has gone; ends the session.
        """
        if self._stream is None:
            return {}
        self.send(**event)
        try:
            answer: dict[str, Any] = read_message(self._stream)
        except EOFError:
            raise Interruption(GONE) from None
        return answer
