"""Errors of a study as a line and an exit status each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from danon.cluster.connection import ClusterError
from danon.console.messages import refuse
from danon.console.signals import interruptible, status_of
from danon.runs.files import UNWRITABLE
from danon.tracking.store import StoreError, root_cause
from danon.tuning import storage
from danon.tuning.evaluator import TrialError
from danon.tuning.study import StudyError

__all__ = ["guarded"]

REFUSED = 2


def guarded(console: Console, run: Callable[[Path], int]) -> int:
    """Errors as one line each; what the study knows is in its storage."""
    with (
        tempfile.TemporaryDirectory(prefix="danon-tune-", ignore_cleanup_errors=True) as scratch,
        interruptible(),
    ):
        try:
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
            return os.EX_IOERR
        except storage.failures() as error:
            refuse(
                console,
                f"the storage failed: {root_cause(error)}; what it has stays, the same "
                "command goes on",
            )
            return REFUSED
