"""The end of a session, as an error that no attention raises."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["Interruption", "interrupt_on_signal"]


class Interruption(KeyboardInterrupt):
    """The end of the session: Ctrl-C, or the command that started it has gone.

    A ``KeyboardInterrupt`` of another type was raised by an attention.
    """


def interrupt_on_signal() -> None:
    """Let Ctrl-C raise an :class:`Interruption`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interruption(signal.Signals(number).name)

    signal.signal(signal.SIGINT, interrupt)
