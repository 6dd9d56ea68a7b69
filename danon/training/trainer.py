"""A whole training run: batches, evaluations, checkpoints, early stop, and what is told of it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from danon.training import checkpoint
from danon.training.base import BaseTrainer
from danon.training.config import TrainingConfig
from danon.training.order import Order

__all__ = ["Listener", "Trainer", "TrainingResult"]

Outcome = Literal["finished", "stopped early", "diverged"]

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears of a run's metrics while it goes on."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass
class TrainingResult:
    """What a run came to.

    Attributes:
        step: optimizer steps done.
        outcome: ``diverged``: the loss was not finite at ``step``.
        history: metrics by step: ``loss``, ``learning_rate``, and of evaluations ``eval_loss`` and
            what ``evaluate`` returns beside it.
        best: lowest ``eval_loss``, None without an evaluation.
        best_step: where it was.
    """

    step: int = 0
    outcome: Outcome = "finished"
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None


class Trainer(BaseTrainer):
    """Trains a model; goes on where a killed run with the same directory was.

    Args:
        model: called with a batch's inputs.
        config: settings.
        directory: of the checkpoints; None keeps none.
        listeners: told of the metrics as they come.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig | Mapping[str, Any], *,
        directory: Path | str | None = None, listeners: tuple[Listener, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, config)
        self.directory = None if directory is None else Path(directory)
        self.listeners = listeners
        self.result = TrainingResult()
        self.waited = 0

    def fit(
        self, train_dataset: Dataset[Any], eval_dataset: Dataset[Any] | None = None
    ) -> TrainingResult:
        """Train for ``config.steps`` steps in all.

        Args:
            train_dataset: example i is the same whenever it is asked for.
            eval_dataset: what ``eval_loss`` is measured on.

        Raises:
            ValueError: an empty dataset, or a checkpoint of another configuration.
        """
        c = self.config
        torch.manual_seed(c.seed)
        self.setup_training()
        if self.directory is not None:
            self._resume(self.directory)
        batches = self._batches(train_dataset)
        self.model.train()
        while self.result.outcome == "finished" and self.step < c.steps:
            loss = self._one_step(batches)
            if not math.isfinite(loss):
                self.result.outcome = "diverged"
                _log.warning("the loss is %s at step %d: training stops", loss, self.step)
                break
            last = self.step == c.steps
            if self.step % c.log_every == 0 or last:
                rate = c.learning_rate * c.rate(self.step - 1)
                self._tell({"loss": loss, "learning_rate": rate})
            if eval_dataset is not None and (last or _due(self.step, c.eval_every)):
                self._judge(eval_dataset)
            if self.directory is not None and (
                last or _due(self.step, c.checkpoint_every) or self.result.outcome != "finished"
            ):
                self._save(self.directory)
        return self.result

    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Mean loss over a dataset, by example; draws of training are not disturbed.

        Raises:
            ValueError: an empty dataset.
        """
        size, total, seen = _size(dataset), 0.0, 0
        loader = DataLoader(dataset, batch_size=self.config.batch_size)
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            for batch in loader:
                self.batch = self._place(batch)
                with self.accelerator.autocast():
                    loss = self.compute_loss(self.forward(self.batch))
                n = len(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))
                total, seen = total + n * float(loss), seen + n
        self.model.train()
        assert seen == size
        return {"eval_loss": total / seen}

    def _one_step(self, batches: Iterator[Any]) -> float:
        loss = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.config.gradient_accumulation_steps):
            self.batch = self._place(next(batches))
            with self.accelerator.accumulate(self.model):
                loss += self.train_step(self.batch)
        self.step += 1
        self.result.step = self.step
        return float(loss) / self.config.gradient_accumulation_steps

    def _batches(self, dataset: Dataset[Any]) -> Iterator[Any]:
        c, a = self.config, self.accelerator
        first = self.step * c.gradient_accumulation_steps
        order = Order(_size(dataset), c.batch_size, c.seed, first, a.process_index, a.num_processes)
        # A loader draws a number as it begins: not from what training draws, or resuming shows.
        return iter(DataLoader(dataset, batch_sampler=order, generator=torch.Generator()))

    def _place(self, batch: Any) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.accelerator.device)

    def _tell(self, metrics: dict[str, float]) -> None:
        self.result.history.setdefault(self.step, {}).update(metrics)
        for listener in self.listeners:
            listener(self.step, metrics)

    def _judge(self, dataset: Dataset[Any]) -> None:
        """Evaluate, and stop where nothing has improved for long."""
        found = self.evaluate(dataset)
        self._tell(found)
        result, loss = self.result, found["eval_loss"]
        if result.best is None or loss < result.best:
            result.best, result.best_step, self.waited = loss, self.step, 0
            return
        self.waited += 1
        if self.config.patience is not None and self.waited >= self.config.patience:
            result.outcome = "stopped early"

    def _save(self, directory: Path) -> None:
        def write(place: Path) -> None:
            self.accelerator.save_state(str(place), safe_serialization=True)

        known = {"config": self.config.to_dict(), "waited": self.waited,
                 "result": dataclasses.asdict(self.result)}  # fmt: skip
        checkpoint.save(directory, self.step, write, known, self.config.keep_checkpoints)

    def _resume(self, directory: Path) -> None:
        found = checkpoint.newest(directory)
        if found is None:
            return
        path, step, known = found
        theirs, ours = known["config"], self.config.to_dict()
        differ = [name for name in ours if theirs.get(name) != ours[name]]
        if differ:
            raise ValueError(
                f"{path} is of a run with "
                + ", ".join(f"{name} = {theirs.get(name)!r}" for name in differ)
                + ": must have "
                + ", ".join(f"{name} = {ours[name]!r}" for name in differ)
                + ", or train in another directory"
            )
        self.accelerator.load_state(str(path))
        self.step, self.waited = step, known["waited"]
        self.result = TrainingResult(**known["result"])
        self.result.history = {int(k): v for k, v in known["result"]["history"].items()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _size(dataset: Dataset[Any]) -> int:
    if not isinstance(dataset, Sized):
        raise ValueError(f"{type(dataset).__name__} has no length: a map-style dataset is needed")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    return len(dataset)
