"""Settings that studies found best, and the spaces that they search."""

from danon.tuned.settings import (
    GOALS,
    HYPERPARAMETERS,
    TunedSettings,
    file_of,
    known_row,
    known_rows,
    named,
    read,
    rows,
    settings_for,
)

__all__ = [
    "GOALS",
    "HYPERPARAMETERS",
    "TunedSettings",
    "file_of",
    "known_row",
    "known_rows",
    "named",
    "read",
    "rows",
    "settings_for",
]
