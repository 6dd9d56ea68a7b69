"""What every command of the gate begins with: commits checked out, inputs, a way to say things."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from danon.config.mechanism import mechanisms
from danon.console.messages import refuse, say
from danon.console.signals import interruptible, status_of
from danon.gate.calls import NEW
from danon.gate.cases import HEAD_DIM, HEADS, LONGEST, gate_cases
from danon.gate.checkout import Checkout, CheckoutError, DirtyError, Repository, RevisionError
from danon.gate.exact_metrics import RecallModels
from danon.gate.history import HistoryError
from danon.gate.paired_processes import Side, WorkerError
from danon.gate.sequential_test import Say
from danon.gate.thresholds import ThresholdsError
from danon.processes.interpreter import python_command
from danon.runs.case import Case
from danon.runs.files import UNWRITABLE
from danon.tracking.store import StoreError

__all__ = ["Options", "Workspace", "guarded", "open_workspace"]

STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (RevisionError, 3),
    (DirtyError, 4),
    (CheckoutError, 5),
    (WorkerError, 6),
    (ThresholdsError, 7),
    (HistoryError, 8),
    (StoreError, 8),
)
"""Exit statuses beside those of a :class:`GateResult`."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        attentions: ``file.py:Class`` in the repository, measured instead of danon's own mechanisms.
        only: registered names, comma separated, to measure.
        dirty: measure changes that no commit has.
        minutes: that a comparison takes at most.
        results: folder that gets gate.json, gate.md and gate.xml.
        against: revision that is the base; empty compares with the thresholds.
    """

    attentions: tuple[str, ...]
    only: str
    dirty: bool
    minutes: float
    results: Path
    against: str = ""

    @property
    def cases(self) -> list[Case]:
        own = [target.rpartition(":")[2] for target in self.attentions]
        named = [name for name in self.only.split(",") if name]
        return list(gate_cases(own + named or mechanisms()))


@dataclass(frozen=True)
class Workspace:
    """Where it all happens, and what every measurement needs."""

    repository: Repository
    head: Checkout
    side: Side
    scratch: Path
    inputs: Path
    log: Path
    say: Say

    def models(self, folder: Path) -> RecallModels:
        """Trained ones."""
        return RecallModels(folder)


@contextlib.contextmanager
def open_workspace(
    options: Options, console: Console, *, committed: bool = False
) -> Iterator[Workspace]:
    """What is checked out, in a folder that is gone afterwards.

    Args:
        committed: the last commit, whatever has changed since.
    """
    folder = tempfile.TemporaryDirectory(prefix="danon-gate-", ignore_cleanup_errors=True)
    with folder as name:
        scratch = Path(name)
        repository = Repository(Path.cwd())
        place = scratch / "head"
        head = (
            repository.base("HEAD", place)
            if committed
            else repository.head(place, dirty=options.dirty)
        )
        with console.status("starting", spinner="line") as status:
            told = ""

            def progress(stage: str, done: int, of: int) -> None:
                nonlocal told
                status.update(f"{stage}: {done} of {of} cases")
                if stage != told and not console.is_terminal:  # a log has no spinner
                    say(console, "", f"{stage}: {of} cases")
                told = stage

            yield Workspace(
                repository,
                head,
                Side("head", head.root, options.attentions, repository.root),
                scratch,
                _inputs(scratch / "inputs.pt"),
                scratch / "workers.log",
                progress,
            )


def _inputs(place: Path) -> Path:
    """The suites' text as q, k and v, which all sides are measured with."""
    code = (
        "import sys, torch\n"
        "from danon.data.qkv import text_qkv\n"
        f"torch.save(list(text_qkv(1, {HEADS}, {LONGEST + NEW}, {HEAD_DIM})), sys.argv[1])"
    )
    command = python_command("-c", code, str(place.resolve()))
    subprocess.run(command, check=True)
    return place


def guarded(console: Console, run: Callable[[], int]) -> int:
    """Errors as messages with statuses of their own: 1 would be a regression."""
    try:
        with interruptible():
            return run()
    except KeyboardInterrupt as error:
        _tell(console, f"{str(error) or 'interrupted'}: nothing is decided")
        return status_of(error)
    except tuple(kind for kind, _ in STATUSES) as error:
        _tell(console, str(error))
        return next(status for kind, status in STATUSES if isinstance(error, kind))
    except SystemExit:  # of rich: nobody reads what it prints
        return os.EX_IOERR
    except Exception as error:  # noqa: BLE001  not with the status of a regression
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            _tell(console, str(error))
            return os.EX_IOERR
        traceback.print_exc()
        _tell(console, "this is an error of the gate itself: nothing is decided")
        return os.EX_SOFTWARE


def _tell(console: Console, reason: str) -> None:
    """Somebody, if there is; the log may be on the disk that is full, the reader gone."""
    with contextlib.suppress(OSError, SystemExit):
        refuse(console, reason)
