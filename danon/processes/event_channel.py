"""What the suites tell the command that started them, line by line.

Without ``DANON_CHANNEL`` (a plain ``pytest suites``) nobody listens and nothing is sent.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from danon.processes.interruption import Interruption

__all__ = ["CHANNEL", "EventChannel"]

CHANNEL = "DANON_CHANNEL"
"""Environment variable: file descriptor of a connected socket."""
GONE = "the command that started the suites has gone"


class EventChannel:
    """JSON objects, one a line.

    The other side answers :meth:`ask` once it has stored the object, so that nothing is measured
    while it writes.
    """

    def __init__(self) -> None:
        number = os.environ.get(CHANNEL)
        self._process = os.getpid()
        self._stream = None
        if number is not None:
            with socket.socket(fileno=int(number)) as line:  # the stream keeps it open
                self._stream = line.makefile("rw", encoding="utf-8")

    @property
    def heard(self) -> bool:
        """Whether there is another side."""
        return self._stream is not None

    def send(self, **event: Any) -> None:
        """Tell, and go on.

        Raises:
            Interruption: the other side has gone; ends the session.
        """
        if self._stream is None:
            return
        if os.getpid() != self._process:  # a copy that what is measured has forked
            os._exit(1)
        try:
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # what is measured may have closed it, too
            raise Interruption(GONE) from None

    def ask(self, **event: Any) -> dict[str, Any]:
        """Tell, and wait for the answer; without another side the answer is empty.

        Raises:
            Interruption: the other side has gone; ends the session.
        """
        if self._stream is None:
            return {}
        self.send(**event)
        try:
            answer = self._stream.readline()
        except (OSError, ValueError):
            answer = ""
        if not answer:
            raise Interruption(GONE)
        values: dict[str, Any] = json.loads(answer)
        return values
