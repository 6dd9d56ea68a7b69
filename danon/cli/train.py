"""The command ``danon train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from danon.cli.options import refuse
from danon.console import messages
from danon.console.exit_status import NEGATIVE, NOT_WRITTEN

if TYPE_CHECKING:
    from danon.distributed import DistributedTrainer
    from danon.distributed.training_file import TrainingFile
    from danon.training import TrainingResult

__all__ = ["train"]


def train(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml",
            help="Description of the training; examples/train/ has one with comments.",
        ),
    ],
) -> None:
    """Train a language model of bytes as a file describes it; start again to go on.

    `torchrun --nproc-per-node 2 -m danon train CONFIG.toml` trains with two processes. Exit status:
    0 finished; 1 diverged; 2 bad input.
    """
    from danon.config import ConfigError
    from danon.data.corpora import CorpusError
    from danon.distributed.training_file import TrainingFile
    from danon.runs.files import UNWRITABLE
    from danon.tracking.store import StoreError
    from danon.training.ranks import Ranks

    try:
        run = TrainingFile.read(file)
        trainer = run.trainer()
        result = run.fit(trainer)
        ranks = Ranks.join()
    except (ConfigError, CorpusError, StoreError, ImportError, ValueError) as error:
        refuse(str(error))
    except OSError as error:
        if error.errno not in UNWRITABLE and not isinstance(error, FileNotFoundError):
            raise
        messages.refuse(Console(emoji=False), str(error))
        raise typer.Exit(NOT_WRITTEN) from error
    if ranks.is_main:
        _print_result(run, trainer, result, ranks.world_size)
    Ranks.leave()
    if result.outcome == "diverged":
        raise typer.Exit(NEGATIVE)


def _print_result(
    run: TrainingFile, trainer: DistributedTrainer, result: TrainingResult, processes: int
) -> None:
    """Print what was trained, and where it is."""
    console = Console(emoji=False)
    config = trainer.trainer.config
    losses = [metrics["loss"] for metrics in result.history.values() if "loss" in metrics]
    passes = "1 pass" if run.epochs == 1 else f"{run.epochs} passes"
    plural = "process" if processes == 1 else "processes"
    messages.say(
        console,
        result.outcome.capitalize(),
        f"after step {result.step} of {config.steps}: {passes} over the data, strategy "
        f"{config.strategy}, {processes} {plural}",
    )
    if losses:
        messages.say(console, "Loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if result.best is not None:
        text = f"{result.best:.4f} nats a byte on held-out text, at step {result.best_step}"
        messages.say(console, "Best", text)
    messages.say(console, "Written", f"{run.directory} (the same command goes on from there)")
    if run.experiment is not None:
        messages.say(console, "MLflow", f"experiment danon/{run.experiment}: nox -s ui")
