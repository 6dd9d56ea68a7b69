"""A whole training run: batches, evaluations, checkpoints, early stop, and its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from danon.attention.ucsa.layer import anneal
from danon.training import checkpoint
from danon.training.base import IGNORED, BaseTrainer, DivergenceError, needed
from danon.training.batch_order import BatchOrder
from danon.training.config import TrainingConfig

__all__ = ["Listener", "Trainer", "TrainingResult"]

Outcome = Literal["finished", "stopped early", "diverged"]

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Receiver of a run's metrics while it trains."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive metrics.

        Args:
            step: number of optimizer steps done.
            metrics: as in :attr:`TrainingResult.history`.
        """
        ...


@dataclass
class TrainingResult:
    """Result of a run.

    Attributes:
        step: number of optimizer steps done.
        outcome: ``finished``, ``stopped early`` or ``diverged``. Diverged: loss or gradient was not
            finite in step ``step``, and the weights are those of the step before.
        history: metrics by step. ``loss`` is the mean over the labels of the step, if it has any;
            ``learning_rate`` beside it. An evaluation adds ``eval_loss`` and the other metrics that
            ``evaluate`` returns.
        best: lowest ``eval_loss``, in nats a label; None without an evaluation.
        best_step: step of that evaluation.
    """

    step: int = 0
    outcome: Outcome = "finished"
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None


class Trainer(BaseTrainer):
    """Trainer of a model, which resumes a killed run of the same directory.

    Batches of one optimizer step count by their labels other than ``-100``, so accumulated
    gradients equal those of one large batch. A step without any label leaves the weights as they
    are. UCSA layers that anneal their sparsity are told the step.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from danon import create_msra_model
        >>> from danon.training import Trainer, TrainingConfig
        >>> tokens = torch.arange(65).remainder(16).repeat(8, 1)
        >>> data = TensorDataset(tokens[:, :-1], tokens[:, 1:])  # (8, 64) inputs and labels
        >>> model = create_msra_model(
        ...     hidden_size=16, num_heads=2, num_layers=1, vocab_size=16, task="lm"
        ... )
        >>> config = TrainingConfig(steps=4, batch_size=4)
        >>> result = Trainer(model, config, progress=False).fit(data, eval_dataset=data)
        >>> result.outcome, result.step, result.best_step
        ('finished', 4, 4)

    Args:
        model: module that is called with the inputs of a batch.
        config: settings, or a dictionary of them.
        directory: folder of the checkpoints; None writes none.
        listeners: called with the metrics of a step as they come.
        progress: True shows a bar on stderr, False none; None shows it on a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | Mapping[str, Any],
        *,
        directory: Path | str | None = None,
        listeners: tuple[Listener, ...] = (),
        progress: bool | None = None,
    ) -> None:
        super().__init__(model, config)
        self.directory = None if directory is None else Path(directory)
        self.listeners, self.progress = listeners, progress
        self.result = TrainingResult()
        self.waited = 0
        self._num_examples = 0  # of the dataset
        self._unlabelled = 0  # examples since the last label
        self._saw_label = self._warned = False

    def fit(
        self, train_dataset: Dataset[Any], eval_dataset: Dataset[Any] | None = None
    ) -> TrainingResult:
        """Train for ``config.steps`` steps in all.

        Args:
            train_dataset: map-style dataset; example i is the same whenever it is read.
            eval_dataset: dataset of ``eval_loss``; None evaluates nothing.

        Returns:
            Outcome, metrics by step, and the best evaluation.

        Raises:
            ImportError: accelerate is not installed.
            ValueError: an empty dataset, or one without a label; a directory in use, only damaged
                checkpoints in it, or one of another configuration or model.
        """
        torch.manual_seed(self.config.seed)
        self.setup_training()
        with contextlib.ExitStack() as held:
            if self.directory is not None:
                if self.accelerator.is_main_process:
                    held.enter_context(checkpoint.alone(self.directory))
                self.accelerator.wait_for_everyone()  # the main one removes what a killed run left
                self._resume(self.directory)
            batches = self._batches(train_dataset)
            bar = held.enter_context(self._bar())
            self.model.train()
            while self.result.outcome == "finished" and self.step < self.config.steps:
                try:
                    loss = self._one_step(batches)
                except DivergenceError as error:
                    self.model.zero_grad()  # the next training of this model must not find them
                    self.result.outcome, self.result.step = "diverged", self.step + 1
                    _log.warning("%s at step %d: training stops", error, self.result.step)
                    break
                if loss is not None:
                    bar.set_postfix(loss=loss, refresh=False)
                bar.update()
                self._after_step(loss, eval_dataset)
        return self.result

    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Return the mean loss over a dataset.

        A batch counts by its labels other than ``-100``, or by its examples if it has no labels.
        The random numbers of training stay the same.

        Args:
            dataset: dataset as in :meth:`fit`.

        Returns:
            ``eval_loss`` in nats a label; a subclass may add metrics.

        Raises:
            ValueError: an empty dataset, or one whose labels are all ``-100``.
        """
        _size(dataset)
        total, seen = 0.0, 0
        loader = DataLoader(dataset, batch_size=self.config.batch_size)
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            for batch in loader:
                weight = _weight(batch)
                if weight == 0:
                    continue  # the mean over nothing is not a number
                self.batch = self._to_device(batch)
                with self.accelerator.autocast():
                    loss = self.compute_loss(self.forward(self.batch))
                total, seen = total + weight * float(loss), seen + weight
        self.model.train()
        if seen == 0:
            raise ValueError(f"every label of the dataset is {IGNORED}: at least one must not be")
        return {"eval_loss": total / seen}

    def load_best(self) -> None:
        """Load the weights of the best evaluation into the model; nothing else changes.

        Raises:
            ValueError: there is no checkpoint of it, it is damaged, or it is of another model.
        """
        last = None if self.directory is None else checkpoint.newest(self.directory)
        best = None if last is None else last[2]["result"]["best_step"]
        if last is None or best is None:
            raise ValueError(
                f"directory = {self.directory}: must hold checkpoints of a run with evaluations"
            )
        path = checkpoint.folder(last[0].parent, best)
        self._require_same_shapes(path, checkpoint.read(path)[1])
        needed("safetensors.torch").load_model(self.model, path / "model.safetensors")

    def _bar(self) -> Any:
        hidden = None if self.progress is None else not self.progress  # None: tqdm asks the stream
        if not self.accelerator.is_main_process:
            hidden = True
        return needed("tqdm").tqdm(
            total=self.config.steps, initial=self.step, unit="step", disable=hidden
        )

    def _one_step(self, batches: Iterator[Any]) -> float | None:
        """Take one optimizer step and return the mean loss over its labels, None without one."""
        c, a = self.config, self.accelerator
        accumulated = [next(batches) for _ in range(c.gradient_accumulation_steps)]
        labels = [_weight(batch) for batch in accumulated]
        in_all = int(self._over_processes(sum(labels), "sum"))
        if in_all == 0:
            self._pass_over()
            mean = None
        else:
            self._unlabelled, self._saw_label = 0, True
            a.gradient_accumulation_steps = len(
                accumulated
            )  # accelerate keeps one for the whole process
            loss = torch.zeros((), device=a.device)
            for batch, count in zip(accumulated, labels, strict=True):
                self.label_share = count * len(accumulated) * a.num_processes / in_all
                self.batch = self._to_device(batch)
                with a.accumulate(self.model):
                    batch_loss = self.train_step(self.batch)
                if count > 0:  # the mean over nothing need not be a number
                    loss += batch_loss * self.label_share
            mean = self._over_processes(float(loss) / len(accumulated), "mean")
            if not math.isfinite(mean):
                raise DivergenceError(
                    f"the loss is {mean}"
                )  # an overridden train_step need not notice
        self.step += 1
        self.result.step = self.step
        anneal(self.model, self.step)
        return mean

    def _pass_over(self) -> None:
        """Count a step without a label, and warn at the first.

        Raises:
            ValueError: no example of the dataset, or of the whole run, has a label.
        """
        c = self.config
        if not self._warned:
            self._warned = True
            _log.warning(
                "the batches of step %d have no label other than %d: the step changes nothing",
                self.step + 1,
                IGNORED,
            )
        self._unlabelled += c.batch_size * c.gradient_accumulation_steps
        last = self.step + 1 == c.steps
        # Twice: the order is one permutation after the other.
        if self._unlabelled >= 2 * self._num_examples or (last and not self._saw_label):
            raise ValueError(
                f"every label of the training's examples is {IGNORED}: at least one must not be"
            )

    def _over_processes(self, value: float, how: Literal["sum", "mean"]) -> float:
        if self.accelerator.num_processes == 1:
            return value
        local = torch.tensor(value, device=self.accelerator.device)
        return float(self.accelerator.reduce(local, how))

    def _after_step(self, loss: float | None, eval_dataset: Dataset[Any] | None) -> None:
        """Log, evaluate and save what is due; save last, so that the checkpoint has the rest."""
        c = self.config
        last = self.step == c.steps
        if self.step % c.log_every == 0 or last:
            rate = c.learning_rate * c.rate(self.step - 1)
            losses = {} if loss is None else {"loss": loss}
            self._log_metrics({**losses, "learning_rate": rate})
        if eval_dataset is not None and (last or _due(self.step, c.eval_every)):
            self._run_evaluation(eval_dataset)
        if self.directory is not None and (
            last
            or _due(self.step, c.checkpoint_every)
            or self.result.outcome != "finished"
            or self.result.best_step == self.step
        ):
            self._save(self.directory)

    def _batches(self, dataset: Dataset[Any]) -> Iterator[Any]:
        c, a = self.config, self.accelerator
        self._num_examples, first = _size(dataset), self.step * c.gradient_accumulation_steps
        self._saw_label = self.step > 0
        order = BatchOrder(
            self._num_examples, c.batch_size, c.seed, first, a.process_index, a.num_processes
        )
        # A loader draws a number as it begins. From a generator of its own, so resuming is exact.
        return iter(DataLoader(dataset, batch_sampler=order, generator=torch.Generator()))

    def _to_device(self, batch: Any) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.accelerator.device)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        self.result.history.setdefault(self.step, {}).update(metrics)
        for listener in self.listeners:
            listener(self.step, metrics)

    def _run_evaluation(self, dataset: Dataset[Any]) -> None:
        """Evaluate, and stop the training after ``patience`` evaluations without improvement."""
        metrics = self.evaluate(dataset)
        self._log_metrics(metrics)
        result, loss = self.result, metrics["eval_loss"]
        if loss < (math.inf if result.best is None else result.best):
            result.best, result.best_step, self.waited = loss, self.step, 0
            return
        self.waited += 1
        if self.config.patience is not None and self.waited >= self.config.patience:
            result.outcome = "stopped early"

    def _save(self, directory: Path) -> None:
        """Write one checkpoint, to which every process adds its random state."""
        from accelerate.utils import broadcast_object_list

        a = self.accelerator

        def write(folder: Path | None) -> None:
            (shared,) = broadcast_object_list([folder])
            a.save_state(str(shared), safe_serialization=True)
            a.wait_for_everyone()

        state = {
            "config": self.config.to_dict(),
            "waited": self.waited,
            "result": dataclasses.asdict(self.result),
            "shapes": self._shapes(),
        }
        if a.is_main_process:
            keep, best = self.config.keep_checkpoints, self.result.best_step
            checkpoint.save(directory, self.step, write, state, keep, best)
        else:
            write(None)
        a.wait_for_everyone()

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.model.named_parameters()}

    def _require_same_shapes(self, path: Path, state: Mapping[str, Any]) -> None:
        theirs, ours = state["shapes"], self._shapes()
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"{path} is of another model: {name} is of shape {_shape(theirs.get(name))}, "
                    f"must be {_shape(ours.get(name))}; or train in another directory"
                )

    def _resume(self, directory: Path) -> None:
        last = checkpoint.newest(directory)
        if last is None:
            return
        path, step, state = last
        theirs, ours = state["config"], self.config.to_dict()
        differ = [name for name in ours if theirs.get(name) != ours[name]]
        if differ:
            raise ValueError(
                f"{path} is of a run with "
                + ", ".join(f"{name} = {theirs.get(name)!r}" for name in differ)
                + ": must have "
                + ", ".join(f"{name} = {ours[name]!r}" for name in differ)
                + ", or train in another directory"
            )
        self._require_same_shapes(path, state)
        self.accelerator.load_state(str(path))
        self.step, self.waited = step, state["waited"]
        self.result = TrainingResult(**state["result"])
        self.result.history = {int(k): v for k, v in state["result"]["history"].items()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _size(dataset: Dataset[Any]) -> int:
    if not isinstance(dataset, Sized):
        raise ValueError(f"{type(dataset).__name__} has no length: a map-style dataset is needed")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    return len(dataset)


def _weight(batch: Any) -> int:
    """Count the labels of a batch, else its examples; 1 where neither can be counted."""
    if isinstance(batch, Mapping):
        labels, first = batch.get("labels"), next(iter(batch.values()), None)
    elif isinstance(batch, list | tuple):
        labels, first = batch[1] if len(batch) > 1 else None, batch[0]
    else:
        labels, first = None, batch
    if isinstance(labels, Tensor):
        return int((labels != IGNORED).sum())
    return len(first) if isinstance(first, list | tuple | Tensor) else 1


def _shape(sizes: list[int] | None) -> str:
    return "none (it is not there)" if sizes is None else str(tuple(sizes))
