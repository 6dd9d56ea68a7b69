"""Signals that end a command, as exceptions: it cleans up its folders and processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from danon.console.exit_status import SIGNALLED

__all__ = ["ENDING", "SignalInterrupt", "interruptible", "status_of"]

ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


class SignalInterrupt(KeyboardInterrupt):
    """A signal other than that of Ctrl-C ends the command.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        """Name the signal in the message."""
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`SignalInterrupt` inside the block.

    Signals after the first one are ignored, so that they do not stop the cleanup. A signal that is
    ignored already (``nohup``) stays ignored. Calls into Ray replace what a handler raises by a
    plain KeyboardInterrupt; it becomes the signal's again.
    """
    received = list[int]()

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise SignalInterrupt(number)

    handlers = {number: signal.getsignal(number) for number in ENDING}
    before = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    except KeyboardInterrupt as error:
        if received and not isinstance(error, SignalInterrupt):
            raise SignalInterrupt(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status of a command that was interrupted: 128 + the signal.

    Args:
        error: that ended the command.
    """
    number = error.number if isinstance(error, SignalInterrupt) else signal.SIGINT
    return SIGNALLED + number
