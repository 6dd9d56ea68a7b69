"""One run of the gate: commit checked out, inputs written, workers to start, progress to tell."""

from __future__ import annotations

import contextlib
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console

from danon.config.mechanism import mechanisms
from danon.console.messages import say
from danon.gate.calls import NEW
from danon.gate.cases import HEAD_DIM, HEADS, LONGEST, gate_cases
from danon.gate.checkout import Checkout, Repository
from danon.gate.recall_models import RecallModels
from danon.gate.worker_client import Side, WorkerClient
from danon.processes.interpreter import python_command
from danon.runs.case import Case

__all__ = [
    "MODELS",
    "THRESHOLDS",
    "Options",
    "Progress",
    "Workspace",
    "open_workspace",
    "write_inputs",
]

THRESHOLDS = Path("results") / "thresholds.json"
"""File of a repository with what it accepts."""
MODELS = Path("results") / "recall"
"""Folder of a repository with the trained models that thresholds of recall are about."""

Progress = Callable[[str, int, int], object]
"""Called with a stage, the number of its cases that are done, and the number of all."""


@dataclass(frozen=True)
class Options:
    """Choices of the user.

    Attributes:
        attentions: ``file.py:Class`` in the repository, measured instead of danon's mechanisms.
        only: registered names to measure, comma separated.
        dirty: True to measure changes that no commit has.
        time_limit_minutes: the most that a comparison takes.
        results: folder that gets gate.json, gate.md and gate.xml.
        against: revision that is the base; empty to compare with the thresholds.
    """

    attentions: tuple[str, ...]
    only: str
    dirty: bool
    time_limit_minutes: float
    results: Path
    against: str = ""

    @property
    def cases(self) -> list[Case]:
        """Every case of the chosen attentions."""
        classes = [target.rpartition(":")[2] for target in self.attentions]
        registered = [name for name in self.only.split(",") if name]
        return list(gate_cases(classes + registered or mechanisms()))


@dataclass(frozen=True)
class Workspace:
    """The object that every measurement of one run of the gate takes.

    Attributes:
        head: the commit that is judged, as files.
        repository: folder that it is a commit of.
        targets: ``file.py:Class`` attentions of the user.
        scratch: folder of this run, removed at its end.
        inputs: file of q, k and v that all workers read.
        progress: hears how far the run is.
        end: value of ``perf_counter`` at which workers are killed.
    """

    head: Checkout
    repository: Path
    targets: tuple[str, ...]
    scratch: Path
    inputs: Path
    progress: Progress
    end: float = math.inf

    @property
    def log(self) -> Path:
        """File that gets what workers print."""
        return self.scratch / "workers.log"

    @property
    def new_models(self) -> RecallModels:
        """Models that are trained in this run."""
        return RecallModels(self.scratch / "models")

    @property
    def committed_models(self) -> RecallModels:
        """Models that the commit has."""
        return RecallModels(self.head.root / MODELS)

    def side(self, name: str, root: Path | None = None) -> Side:
        """Return a side to measure.

        Args:
            name: ``base`` or ``head``.
            root: folder of another checkout than the head's.
        """
        return Side(name, root or self.head.root, self.targets, self.repository)

    def start_worker(self, side: Side) -> WorkerClient:
        """Start a process that measures a side.

        Raises:
            WorkerError: It does not start, or the time is over.
        """
        return WorkerClient(side, self.inputs, self.log, self.end)


@contextlib.contextmanager
def open_workspace(
    repository: Repository, options: Options, console: Console, *, committed: bool = False
) -> Iterator[Workspace]:
    """Check the head out and write the inputs, in a folder that is removed afterwards.

    Args:
        repository: the user's.
        options: choices of the user; their time limit begins now.
        console: shows the progress.
        committed: True to take the last commit, whatever has changed since.

    Raises:
        CheckoutError: The head cannot be checked out.
    """
    end = perf_counter() + 60 * options.time_limit_minutes
    folder = tempfile.TemporaryDirectory(prefix="danon-gate-", ignore_cleanup_errors=True)
    with folder as name, console.status("starting", spinner="line") as status:
        scratch = Path(name)
        root = scratch / "head"
        head = (
            repository.base("HEAD", root)
            if committed
            else repository.head(root, dirty=options.dirty)
        )
        last_stage = ""

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last_stage
            status.update(f"{stage}: {done} of {total} cases")
            if stage != last_stage and not console.is_terminal:  # a log has no spinner
                say(console, "", f"{stage}: {total} cases")
            last_stage = stage

        yield Workspace(
            head,
            repository.root,
            options.attentions,
            scratch,
            write_inputs(scratch / "inputs.pt"),
            progress,
            end,
        )


def write_inputs(path: Path) -> Path:
    """Write the suites' text as q, k and v, which all sides are measured with; return the path."""
    code = (
        "import sys, torch\n"
        "from danon.data.qkv import text_qkv\n"
        f"torch.save(list(text_qkv(1, {HEADS}, {LONGEST + NEW}, {HEAD_DIM})), sys.argv[1])"
    )
    subprocess.run(python_command("-c", code, str(path.resolve())), check=True)
    return path
