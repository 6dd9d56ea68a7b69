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
    NEGATIVE: "done, with a negative answer",
    REFUSED: "refused: a wrong argument; or no decision: too little time, cases without an outcome",
    REVISION: "`danon gate`: an unknown revision (also: a shallow clone)",
    DIRTY: "`danon gate`: changes that no commit has; `--dirty` measures them too",
    CHECKOUT: "`danon gate`: no git, or no repository",
    WORKER: "`danon gate`: a side cannot be measured",
    THRESHOLDS: "`danon gate`: thresholds, or the model of one, are missing or wrong",
    RECORDS: "`danon history`: no run is recorded, too few, or the store cannot be read",
    DEFECT: "a defect of danon, with its traceback",
    NOT_WRITTEN: "a file cannot be read or written; what was printed before remains valid",
    SIGNALLED + signal.SIGINT: "ended by Ctrl-C; any other signal gives 128 + its number",
}
"""Meaning of each status, in a phrase."""
