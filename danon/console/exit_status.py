"""Exit statuses of all commands; docs/commands.md has the table for users."""

from __future__ import annotations

import signal

__all__ = [
    "CHECKOUT",
    "DEFECT",
    "DIRTY",
    "DONE",
    "MEANINGS",
    "NEGATIVE",
    "NOT_WRITTEN",
    "RECORDS",
    "REFUSED",
    "REVISION",
    "SIGNALLED",
    "THRESHOLDS",
    "WORKER",
]

DONE = 0
NEGATIVE = 1
REFUSED = 2
REVISION = 3
DIRTY = 4
CHECKOUT = 5
WORKER = 6
THRESHOLDS = 7
RECORDS = 8
DEFECT = 70  # EX_SOFTWARE of sysexits.h, which Windows has not
NOT_WRITTEN = 74  # EX_IOERR
SIGNALLED = 128
"""Status of a command that a signal ended, less the number of the signal."""

MEANINGS = {
    DONE: "done",
    NEGATIVE: "done, with a negative answer: a failed case, a regression, no recommendation",
    REFUSED: "refused: a wrong argument, or nothing was decided",
    REVISION: "`danon gate`: git does not know the revision",
    DIRTY: "`danon gate`: uncommitted changes without `--dirty`",
    CHECKOUT: "`danon gate`: git failed, or a commit cannot be measured",
    WORKER: "`danon gate`: a measuring process failed",
    THRESHOLDS: "`danon gate`: the stored thresholds are missing or wrong",
    RECORDS: "`danon gate`, `danon history`: the records cannot be read",
    DEFECT: "a defect of danon, with a traceback",
    NOT_WRITTEN: "results cannot be written",
    SIGNALLED + signal.SIGINT: "interrupted by Ctrl-C; another signal N gives 128 + N",
}
"""Meaning of each status, in a phrase."""
