"""Errors of the gate's commands: a message, and an exit status of its own."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable

from rich.console import Console

from danon.console import exit_status
from danon.console.messages import refuse
from danon.console.signals import interruptible, status_of
from danon.gate.case_history import HistoryError
from danon.gate.checkout import CheckoutError, DirtyError, RevisionError
from danon.gate.thresholds import ThresholdsError
from danon.gate.worker_client import WorkerError
from danon.runs.files import UNWRITABLE
from danon.tracking.store import StoreError

__all__ = ["run_guarded"]

STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (RevisionError, exit_status.REVISION),
    (DirtyError, exit_status.DIRTY),
    (CheckoutError, exit_status.CHECKOUT),
    (WorkerError, exit_status.WORKER),
    (ThresholdsError, exit_status.THRESHOLDS),
    (HistoryError, exit_status.RECORDS),
    (StoreError, exit_status.RECORDS),
)
"""Exit statuses beside those of a :class:`danon.gate.result.GateResult`; the first match counts."""


def run_guarded(console: Console, run: Callable[[], int]) -> int:
    """Run a command; print an error as a message and return a status of its own.

    Args:
        console: gets the messages.
        run: returns the exit status. No error may end with 1, which is a regression.
    """
    try:
        with interruptible():
            return run()
    except KeyboardInterrupt as error:
        _refuse(console, f"{str(error) or 'interrupted'}: nothing is decided")
        return status_of(error)
    except tuple(kind for kind, _ in STATUSES) as error:
        _refuse(console, str(error))
        return next(status for kind, status in STATUSES if isinstance(error, kind))
    except SystemExit:  # rich raises it when nobody reads what it prints
        return exit_status.NOT_WRITTEN
    except Exception as error:  # noqa: BLE001  not with the status of a regression
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            _refuse(console, str(error))
            return exit_status.NOT_WRITTEN
        traceback.print_exc()
        _refuse(console, "this is an error of the gate itself: nothing is decided")
        return exit_status.DEFECT


def _refuse(console: Console, reason: str) -> None:
    """Print a reason if that is possible: the log's disk may be full, its reader gone."""
    with contextlib.suppress(OSError, SystemExit):
        refuse(console, reason)
