"""The settings of the process that code can change, and their restoration.

state = ProcessState()
torch.set_default_dtype(torch.float64)
state.restore().described     # {"torch's default dtype": "float32 -> float64"}
"""

from __future__ import annotations

import contextlib
import locale
from dataclasses import dataclass
from typing import Any

from danon.measure.interpreter_settings import INTERPRETER_SETTINGS
from danon.measure.patched_functions import PATCHED_FUNCTIONS
from danon.measure.process_setting import Setting
from danon.measure.torch_settings import TORCH_SETTINGS

__all__ = ["SETTINGS", "Changes", "ProcessState"]

SETTINGS = (
    PATCHED_FUNCTIONS,  # first: the others are read and set through functions
    *TORCH_SETTINGS,
    *INTERPRETER_SETTINGS,
)
_REFUSALS = (RuntimeError, OSError, ValueError, locale.Error)


@dataclass(frozen=True)
class Changes:
    """The differences from a state.

    Attributes:
        described: setting -> how it differed, in words.
        unrestored: settings that could not be set back: only another process has them as they were.
    """

    described: dict[str, str]
    unrestored: tuple[str, ...]


class ProcessState:
    """The settings of this process at the moment of construction."""

    def __init__(self) -> None:
        """Read all settings."""
        self._values = {setting.name: _read(setting) for setting in SETTINGS}

    def restore(self) -> Changes:
        """Set back what has changed since.

        Returns:
            The changes that were found. Random generators are set back without a note.
        """
        now = {setting.name: _read(setting) for setting in SETTINGS}
        changed = [s for s in SETTINGS if self._values[s.name] != now[s.name]]
        words = {s.name: _describe(s, self._values[s.name], now[s.name]) for s in changed}
        for setting in changed:
            if setting.write is not None:
                with contextlib.suppress(*_REFUSALS):  # then it is among the unrestored
                    setting.write(self._values[setting.name])
        described = {name: text for name, text in words.items() if text}
        lasting = (s for s in changed if self._values[s.name] != _read(s))
        return Changes(described, tuple(s.name for s in lasting if s.name in described))


@dataclass(frozen=True)
class _Unreadable:
    """The stand-in for a value whose reading raised.

    Attributes:
        error: the name of the error's type.
    """

    error: str


def _read(setting: Setting) -> Any:
    try:
        return setting.read()
    except _REFUSALS as error:  # torch refuses to name what is set in two ways
        return _Unreadable(type(error).__name__)


def _describe(setting: Setting, before: Any, now: Any) -> str:
    for value in (before, now):
        if isinstance(value, _Unreadable):
            return f"reading it raises {value.error}"
    return setting.describe(before, now)
