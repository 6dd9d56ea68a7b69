"""Print errors of a study as a line each, and give each an exit status."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from danon.cluster.connection import ClusterError
from danon.console.exit_status import NOT_WRITTEN, REFUSED
from danon.console.messages import refuse
from danon.console.signals import interruptible, status_of
from danon.runs.files import UNWRITABLE
from danon.tracking.store import StoreError, root_cause
from danon.tuning import storage
from danon.tuning.evaluator import TrialError
from danon.tuning.study import StudyError

__all__ = ["guarded"]


def guarded(console: Console, run: Callable[[Path], int]) -> int:
    """Call a function, and print an expected error as one line; the study stays in its storage.

    Args:
        console: gets the line.
        run: called with a log file for the measuring process; returns an exit status.

    Returns:
        The function's exit status, or that of the error.
    """
    folder = tempfile.TemporaryDirectory(prefix="danon-tune-", ignore_cleanup_errors=True)
    with folder as scratch:
        try:
            with interruptible():
                return run(Path(scratch) / "trials.log")
        except (ValueError, ClusterError, StudyError, StoreError, TrialError) as error:
            refuse(console, str(error))
            return REFUSED
        except KeyboardInterrupt as error:
            refuse(
                console, f"{str(error) or 'interrupted'}: the same command goes on with the study"
            )
            return status_of(error)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            refuse(console, f"{error}; the study stays, the same command goes on")
            return NOT_WRITTEN
        except storage.failures() as error:
            refuse(
                console,
                f"the storage failed: {root_cause(error)}; what it has stays, the same "
                "command goes on",
            )
            return REFUSED
