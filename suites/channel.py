"""What the suites tell the command that started them, line by line.

Without ``DANON_CHANNEL`` (a plain ``pytest suites``) nobody listens and nothing is sent.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

__all__ = ["CHANNEL", "Channel"]

CHANNEL = "DANON_CHANNEL"
"""Environment variable: file descriptor of a connected socket."""
GONE = "the command that started the suites has gone"


class Channel:
    """JSON objects, one a line.

    The other side answers :meth:`ask` once it has stored the object, so that nothing is measured
    while it writes.
    """

    def __init__(self) -> None:
        number = os.environ.get(CHANNEL)
        self._stream = None
        if number is not None:
            self._stream = socket.socket(fileno=int(number)).makefile("rw", encoding="utf-8")

    def send(self, **event: Any) -> None:
        """Tell, and go on.

        Raises:
            KeyboardInterrupt: the other side has gone; ends the session.
        """
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()
        except ConnectionError:
            raise KeyboardInterrupt(GONE) from None

    def ask(self, **event: Any) -> dict[str, Any]:
        """Tell, and wait for the answer; without another side the answer is empty.

        Raises:
            KeyboardInterrupt: the other side has gone; ends the session.
        """
        if self._stream is None:
            return {}
        self.send(**event)
        try:
            answer = self._stream.readline()
        except ConnectionError:
            answer = ""
        if not answer:
            raise KeyboardInterrupt(GONE)
        values: dict[str, Any] = json.loads(answer)
        return values
