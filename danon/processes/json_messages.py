"""JSON messages between two processes, one a line of a text stream."""

from __future__ import annotations

import json
from typing import Any, TextIO

__all__ = ["read_message", "write_message"]


def write_message(stream: TextIO, message: Any) -> None:
    """Send a message.

    Args:
        stream: of a connected socket.
        message: plain data.

    Raises:
        OSError: the other side has gone.
        ValueError: the stream is closed, or the message is no plain data.
    """
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def read_message(stream: TextIO) -> Any:
    """Wait for a message.

    Args:
        stream: of a connected socket.

    Raises:
        EOFError: the other side has gone, perhaps in the middle of a message.
    """
    try:
        line = stream.readline()
        if line:
            return json.loads(line)
    except (OSError, ValueError) as error:
        raise EOFError(str(error)) from error
    raise EOFError("the stream has ended")
