"""A whole training run: batches, evaluations, checkpoints, early stop, and its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from danon.attention.keyed_draws import clear_draw_key, set_draw_key
from danon.attention.ucsa.layer import anneal
from danon.training import checkpoint
from danon.training.base import BaseTrainer, DivergenceError, needed
from danon.training.batch_examples import count_examples, move_batch
from danon.training.batch_growth import BatchGrowth
from danon.training.batch_order import BatchOrder
from danon.training.config import TrainingConfig
from danon.training.labels import IGNORED, count_labels
from danon.training.mixup import PairedExamples, Partners, mix_embeddings, mix_inputs, mixing_share
from danon.training.progressive import crop, size_in_epoch
from danon.training.random_state import random_state, set_random_state

__all__ = ["Listener", "Trainer", "TrainingResult", "require_examples"]

Outcome = Literal["finished", "stopped early", "diverged"]
RANK_SEEDS = 1_000_003
"""Distance of the random seeds of two processes, which must not drop the same activations."""
FREE = frozenset({"strategy", "rank_timeout_s"})
"""Settings that a resumed run may have otherwise."""

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
            ``learning_rate`` beside it, and ``auxiliary_loss`` of attentions that have one, a mean
            over the examples. An evaluation adds ``eval_loss`` and the other metrics that
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

    Under torchrun it trains with all processes, as the configuration's strategy says, on the
    numbers of one: every process gets its share of each batch, and what a model draws is keyed by
    step and position (:mod:`danon.attention.keyed_draws`).

    Batches of one optimizer step count by their labels other than ``-100``, so accumulated
    gradients equal those of one large batch. A step without any label leaves the weights as they
    are. UCSA layers that anneal their sparsity are told the step.

    Example::

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
        listeners: called with the metrics of a step as they come, by the main process alone.
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
        self.examples_seen = 0  # of all processes, over all passes
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
            ImportError: a package is not installed; names the extra.
            ValueError: an empty dataset, one without a label, or one with fewer examples than
                processes; processes whose configurations or datasets differ; a directory in use,
                only damaged checkpoints in it, or one of another configuration or model.
        """
        self.setup_training()
        ranks = self.ranks
        torch.manual_seed(self.config.seed + RANK_SEEDS * ranks.rank)
        with contextlib.ExitStack() as held:
            with ranks.together():
                self._num_examples = require_examples(train_dataset)
                if self._num_examples < ranks.world_size:
                    raise ValueError(
                        f"the dataset has {self._num_examples} examples: must have at least one "
                        f"for each of {ranks.world_size} processes"
                    )
                if eval_dataset is not None:
                    require_examples(eval_dataset)
                self._require_own_steps()
                if self.directory is not None and ranks.is_main:
                    held.enter_context(checkpoint.alone(self.directory))
            ranks.require_equal("the number of examples", self._num_examples)
            self._growth = BatchGrowth(self.config, ranks)
            if self.directory is not None:
                self._resume(self.directory)
            with ranks.together():
                batches = self._batches(train_dataset)
            bar = held.enter_context(self._bar())
            held.callback(clear_draw_key, self.unwrapped)
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
        """Return the mean loss over a dataset, of which each process takes its share.

        A batch counts by its labels other than ``-100``, or by its examples if it has no labels.
        The random numbers of training stay the same.

        Args:
            dataset: dataset as in :meth:`fit`.

        Returns:
            ``eval_loss`` in nats a label; a subclass may add metrics.

        Raises:
            ValueError: an empty dataset, or one whose labels are all ``-100``.
        """
        self._set_up_once()
        total = seen = 0.0
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            for batch, counts in self._evaluation_batches(dataset):
                weight = count_labels(batch) if counts else 0
                if weight == 0 and self.ranks.world_size == 1:
                    continue  # the mean over nothing is not a number
                self.batch = self._to_device(batch)
                with self.autocast():
                    loss = self.compute_loss(self.forward(self.batch))
                if weight > 0:
                    total, seen = total + weight * float(loss), seen + weight
        self.model.train()
        # Sums in the order of the ranks, which are the same on all of them.
        parts = self.ranks.gather((total, seen))
        total, seen = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if seen == 0:
            raise ValueError(f"every label of the dataset is {IGNORED}: at least one must not be")
        return {"eval_loss": total / seen}

    def _evaluation_batches(self, dataset: Dataset[Any]) -> Iterator[tuple[Any, bool]]:
        """Yield this process's batches, and False for one that only keeps the others company."""
        ranks, size = self.ranks, require_examples(dataset)
        share = max(1, self.config.batch_size // ranks.world_size)
        places = list(range(ranks.rank, size, ranks.world_size))
        batches = [places[i : i + share] for i in range(0, len(places), share)]
        most = math.ceil(math.ceil(size / ranks.world_size) / share)
        padded = [*batches, *([[0]] * (most - len(batches)))]
        for number, batch in enumerate(DataLoader(dataset, batch_sampler=padded)):
            yield batch, number < len(batches)

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
        self._set_up_once()
        self.strategy.load_weights(path)

    def _set_up_once(self) -> None:
        """Set up what a training would have set up, if there was none."""
        if not hasattr(self, "strategy"):
            self.setup_training()

    def _require_own_steps(self) -> None:
        """Refuse settings that a step of one's own would leave without effect."""
        if self.config.mixup_alpha > 0 and type(self).train_step is not BaseTrainer.train_step:
            raise ValueError(
                f"mixup_alpha = {self.config.mixup_alpha}: must be 0 with a train_step of one's "
                f"own, as {type(self).__name__} has it, which does not mix losses"
            )

    def _bar(self) -> Any:
        hidden = None if self.progress is None else not self.progress  # None: tqdm asks the stream
        if not self.ranks.is_main:
            hidden = True
        return needed("tqdm").tqdm(
            total=self.config.steps, initial=self.step, unit="step", disable=hidden
        )

    def _one_step(self, batches: Iterator[Any]) -> float | None:
        """Take one optimizer step and return the mean loss over its labels, None without one."""
        c, ranks = self.config, self.ranks
        size = size_in_epoch(c, self.examples_seen // self._num_examples)
        passes = [next(batches) for _ in range(c.gradient_accumulation_steps)]
        if c.mixup_alpha:
            passes = [[crop(part, size) for part in pair] for pair in passes]
        else:
            passes = [crop(batch, size) for batch in passes]
        share = mixing_share(c.mixup_alpha, c.seed, self.step) if c.mixup_alpha else None
        labels = [_labels(batch, share) for batch in passes]
        examples = [count_examples(batch[0] if share is not None else batch) for batch in passes]
        in_all, *sizes = ranks.totals(sum(labels), *examples)
        starts = list(itertools.accumulate(map(round, sizes), initial=0))
        self.examples_seen += round(sum(sizes))
        if in_all == 0:
            self._pass_over()
            mean = None
        else:
            self._unlabelled, self._saw_label = 0, True
            loss: Tensor | float = 0.0
            self.auxiliary = None
            for number, (batch, count) in enumerate(zip(passes, labels, strict=True)):
                self.label_share = count * ranks.world_size / in_all
                self.example_share = examples[number] * ranks.world_size / sum(sizes)
                self.last_pass = number + 1 == len(passes)
                rows = range(starts[number], starts[number + 1])[ranks.rank :: ranks.world_size]
                set_draw_key(self.unwrapped, c.seed, self.step, rows)
                measured = self._growth.measure(round(sizes[number]))
                with self.strategy.synchronize(self.last_pass), measured:
                    batch_loss = self._one_pass(batch, share)
                if count > 0:  # the mean over nothing need not be a number
                    loss = loss + batch_loss * self.label_share
            mean = ranks.totals(float(loss))[0] / ranks.world_size
            if not math.isfinite(mean):
                raise DivergenceError(
                    f"the loss is {mean}"
                )  # an overridden train_step need not notice
        self.step += 1
        self.result.step = self.step
        anneal(self.unwrapped, self.step)
        return mean

    def _one_pass(self, batch: Any, share: float | None) -> Tensor:
        """Run one batch forward and backward, mixed with its partners if there is a share."""
        if share is None:
            self.batch = self._to_device(batch)
            return self.train_step(self.batch)
        first, second = (self._to_device(part) for part in batch)
        self.batch, tokens = mix_inputs(first, second, share)
        self.partners = Partners(second, share, *(count_labels(part) for part in batch))
        try:
            with contextlib.ExitStack() as held:
                if tokens is not None:
                    held.enter_context(mix_embeddings(self.unwrapped, tokens, share))
                return self.train_step(self.batch)
        finally:
            self.partners = None

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

    def _after_step(self, loss: float | None, eval_dataset: Dataset[Any] | None) -> None:
        """Log, evaluate and save what is due; save last, so that the checkpoint has the rest."""
        c = self.config
        last = self.step == c.steps
        if self.step % c.log_every == 0 or last:
            rate = c.learning_rate * c.rate(self.step - 1)
            losses = {} if loss is None else {"loss": loss}
            if self.auxiliary is not None:
                world = self.ranks.world_size
                losses["auxiliary_loss"] = self.ranks.totals(float(self.auxiliary))[0] / world
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
        c, ranks = self.config, self.ranks
        self._saw_label = self.step > 0
        order = BatchOrder(
            self._num_examples,
            self._growth.size,
            c.seed,
            self.examples_seen,
            ranks.rank,
            ranks.world_size,
            pairs=c.mixup_alpha > 0,
        )
        # A loader draws a number as it begins. From a generator of its own, so resuming is exact.
        source = PairedExamples(dataset) if c.mixup_alpha > 0 else dataset
        return iter(DataLoader(source, batch_sampler=order, generator=torch.Generator()))

    def _to_device(self, batch: Any) -> Any:
        return move_batch(batch, self.ranks.device)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        self.result.history.setdefault(self.step, {}).update(metrics)
        for listener in self.listeners if self.ranks.is_main else ():
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
        """Write one checkpoint, to which every process adds its part and its random state."""
        everyone = self.ranks.everyone

        def write(folder: Path | None) -> None:
            shared = everyone.gather(folder)[0]
            self.strategy.save(shared)
            torch.save(random_state(), shared / f"random-{everyone.rank}.pt")
            everyone.barrier()

        state = {
            "config": self.config.to_dict(),
            "waited": self.waited,
            "examples_seen": self.examples_seen,
            "allowed_batch": self._growth.allowed,
            "result": dataclasses.asdict(self.result),
            "shapes": self._shapes(),
        }
        if everyone.is_main:
            keep, best = self.config.keep_checkpoints, self.result.best_step
            checkpoint.save(directory, self.step, write, state, keep, best)
        else:
            write(None)
        everyone.barrier()

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.unwrapped.named_parameters()}

    def _require_same_shapes(self, path: Path, state: Mapping[str, Any]) -> None:
        theirs, ours = state["shapes"], self._shapes()
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"{path} is of another model: {name} is of shape {_shape(theirs.get(name))}, "
                    f"must be {_shape(ours.get(name))}; or train in another directory"
                )

    def _resume(self, directory: Path) -> None:
        with self.ranks.together():
            last = checkpoint.newest(directory)
            if last is not None:
                self._require_same_run(*last)
        if last is None:
            return
        path, step, state = last
        self.strategy.load(path)
        drawn = path / f"random-{self.ranks.everyone.rank}.pt"
        if drawn.exists():  # of more processes than wrote it, the last have none
            set_random_state(torch.load(drawn, weights_only=True))
        self.step, self.waited = step, state["waited"]
        self.examples_seen = state["examples_seen"]
        self._growth.allowed = state["allowed_batch"]
        self.result = TrainingResult(**state["result"])
        self.result.history = {int(k): v for k, v in state["result"]["history"].items()}

    def _require_same_run(self, path: Path, step: int, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another configuration or model."""
        theirs, ours = state["config"], self.config.to_dict()
        differ = [name for name in ours if theirs.get(name) != ours[name] and name not in FREE]
        if differ:
            raise ValueError(
                f"{path} is of a run with "
                + ", ".join(f"{name} = {theirs.get(name)!r}" for name in differ)
                + ": must have "
                + ", ".join(f"{name} = {ours[name]!r}" for name in differ)
                + ", or train in another directory"
            )
        self._require_same_shapes(path, state)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def require_examples(dataset: Dataset[Any]) -> int:
    """Return the number of examples of a dataset.

    Args:
        dataset: map-style dataset.

    Raises:
        ValueError: it has no length, or no example.
    """
    if not isinstance(dataset, Sized):
        raise ValueError(f"{type(dataset).__name__} has no length: a map-style dataset is needed")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    return len(dataset)


def _labels(batch: Any, share: float | None) -> float:
    """Count the labels of a batch; of a mixed one, those of both examples by their shares."""
    if share is None:
        return count_labels(batch)
    return share * count_labels(batch[0]) + (1 - share) * count_labels(batch[1])


def _shape(sizes: list[int] | None) -> str:
    return "none (it is not there)" if sizes is None else str(tuple(sizes))
