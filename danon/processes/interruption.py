"""The end of a session, told apart from what an attention raises."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["Interruption", "interrupt_on_signal"]


class Interruption(KeyboardInterrupt):
    """Somebody ends the session: Ctrl-C, or the command that started it has gone.

    A ``KeyboardInterrupt`` that is none of these was raised by what is measured.
    """


def interrupt_on_signal() -> None:
    """Let Ctrl-C raise an :class:`Interruption`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interruption(signal.Signals(number).name)

    signal.signal(signal.SIGINT, interrupt)
