"""One model trained by all processes that torchrun started, on the numbers of one process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from danon.config import ConfigError
from danon.training.batch_growth import wanted_size
from danon.training.config import TrainingConfig
from danon.training.ranks import Ranks
from danon.training.strategies import strategy_registry
from danon.training.trainer import Listener, Trainer, TrainingResult, require_examples

__all__ = ["DistributedTrainer", "Level"]

Level = Literal["O0", "O1", "O2", "O3"]

_log = logging.getLogger(__name__)


class DistributedTrainer:
    """Trainer of a model over the processes of torchrun; a plain process trains alone.

    ``torchrun --nproc-per-node 8 script.py`` runs a script with eight processes. Batches, draws and
    the order of the examples are those of one process, so the strategies differ in memory and
    speed, not in what they train (section "distributed training" of the specification).

    Example::

        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from danon import create_msra_model
        >>> from danon.distributed import DistributedTrainer
        >>> tokens = torch.arange(65).remainder(16).repeat(8, 1)
        >>> train_dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
        >>> model = create_msra_model(
        ...     hidden_size=16, num_heads=2, num_layers=1, vocab_size=16, task="lm"
        ... )
        >>> trainer = DistributedTrainer(model, strategy="ddp", progress=False)
        >>> trainer.fit(train_dataset, batch_size=4, num_epochs=2).step
        4

    Args:
        model: module that is called with the inputs of a batch; the same on every process.
        strategy: how the processes share it: ``ddp`` (each has all of it), ``fsdp`` (sharded) or
            ``deepspeed`` (ZeRO, see ``zero_stage`` of the configuration).
        optimization_level: precision: ``O0`` float32, ``O1`` autocast to bfloat16, ``O2`` weights
            in bfloat16 with float32 copies in the optimizer, ``O3`` bfloat16 alone
            (:mod:`danon.training.precision`).
        gradient_accumulation_steps: forward passes of one optimizer step.
        config: further settings, or a dictionary of them; :meth:`fit` sets steps and batch size.
        directory: folder of the checkpoints; a killed training goes on from there. None writes
            none.
        experiment: last part of the name of the MLflow experiment ``danon/<experiment>`` that the
            training is recorded in; None records nothing.
        progress: True shows a bar on stderr, False none; None shows it on a terminal.

    Raises:
        ValueError: an unknown strategy or level; lists those there are.
        ConfigError: a setting that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: str = "ddp",
        optimization_level: Level = "O0",
        gradient_accumulation_steps: int = 1,
        *,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        directory: Path | str | None = None,
        experiment: str | None = None,
        progress: bool | None = None,
    ) -> None:
        strategy_registry.get(strategy)  # an unknown one is an error here, not at the first step
        given = config.to_dict() if isinstance(config, TrainingConfig) else dict(config or {})
        self._settings = {
            **given,
            "strategy": strategy,
            "optimization_level": optimization_level,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }
        TrainingConfig.from_dict(self._settings)
        self.model = model
        self.directory, self.listeners = directory, list[Listener]()
        self.experiment, self.progress = experiment, progress

    def add_listener(self, listener: Listener) -> None:
        """Add a receiver of the metrics of each step, which the main process alone calls.

        Args:
            listener: called with the step and its metrics.
        """
        self.listeners.append(listener)

    def set_gradient_accumulation_steps(self, steps: int) -> None:
        """Set the forward passes of one optimizer step.

        Args:
            steps: at least 1; the batch of a step is so many times as large.
        """
        self._set(gradient_accumulation_steps=steps)

    def enable_advanced_training(
        self,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        gradient_centralization: bool = False,
    ) -> None:
        """Turn regularization on.

        Args:
            label_smoothing: share of a label's probability that all classes get, 0 to below 1.
            mixup_alpha: examples are mixed with shares from Beta(alpha, alpha); 0: not.
            gradient_centralization: subtract from gradients of matrices their means.
        """
        self._set(
            label_smoothing=label_smoothing,
            mixup_alpha=mixup_alpha,
            gradient_centralization=gradient_centralization,
        )

    def enable_progressive_training(
        self, start_size: float = 0.3, growth_rate: float = 1.2, max_size: float = 1.0
    ) -> None:
        """Train on short examples first: in pass e on ``start_size * growth_rate^e`` of each.

        Args:
            start_size: share of each example's tokens in the first pass over the data.
            growth_rate: factor of that share from one pass to the next, at least 1.
            max_size: largest share.
        """
        self._set(start_size=start_size, size_growth=growth_rate, max_size=max_size)

    def enable_dynamic_batching(self, initial_size: int, max_size: int) -> None:
        """Let the batch grow by half with each pass over the data.

        Args:
            initial_size: examples of the first batches, in place of ``batch_size`` of :meth:`fit`.
            max_size: largest batch.
        """
        self._set(batch_size=initial_size, max_batch_size=max_size)

    def fit(
        self,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        batch_size: int = 32,
        num_epochs: int = 1,
    ) -> TrainingResult:
        """Train for some passes over the data.

        Args:
            train_dataset: map-style dataset; example i is the same whenever it is read.
            eval_dataset: dataset of ``eval_loss``, evaluated after each pass if the configuration
                does not say otherwise; None evaluates nothing.
            batch_size: examples of a forward pass of all processes together.
            num_epochs: passes over the data, at least 1.

        Returns:
            Outcome, metrics by step, and the best evaluation.

        Raises:
            ValueError: see :meth:`danon.training.Trainer.fit`; the same on every process, before
                the first step.
        """
        if num_epochs < 1:
            raise ValueError(f"num_epochs = {num_epochs}: must be at least 1")
        self.prepare_processes()
        ranks = Ranks.join(TrainingConfig.from_dict(self._settings).rank_timeout_s)
        with ranks.together():
            self.check_processes(ranks.world_size)
            config = self._config(train_dataset, eval_dataset, batch_size, num_epochs)
        with contextlib.ExitStack() as held:
            listeners = tuple(self.listeners)
            if self.experiment is not None and ranks.is_main:
                from danon.training.training_recorder import record_training

                name = f"{type(self.model).__name__} {self.strategy_name} x {ranks.world_size}"
                recorder = record_training(
                    name,
                    config.to_dict(),
                    experiment=self.experiment,
                    directory=None if self.directory is None else Path(self.directory),
                )
                listeners = (*listeners, held.enter_context(recorder))
            self.trainer = self.make_trainer(config, ranks.world_size, listeners)
            return self.trainer.fit(train_dataset, eval_dataset)

    @property
    def strategy_name(self) -> str:
        """Name of the strategy, for records."""
        return str(self._settings["strategy"])

    def prepare_processes(self) -> None:
        """Do what has to be done before the processes join; here nothing."""

    def check_processes(self, processes: int) -> None:
        """Refuse a number of processes, and say how to start more of them.

        Args:
            processes: those that joined.

        Raises:
            ValueError: there must be another number.
        """
        if processes == 1:
            _log.info(
                "one process trains; `torchrun --nproc-per-node 8 SCRIPT` starts eight that share "
                "the work by strategy %s",
                self.strategy_name,
            )

    def make_trainer(
        self, config: TrainingConfig, processes: int, listeners: tuple[Listener, ...]
    ) -> Trainer:
        """Return the trainer of this process.

        Args:
            config: its settings.
            processes: number of processes.
            listeners: receivers of metrics.
        """
        return Trainer(
            self.model,
            config,
            directory=self.directory,
            listeners=listeners,
            progress=self.progress,
        )

    def load_best(self) -> None:
        """Load the weights of the best evaluation into the model; see :meth:`Trainer.load_best`.

        Raises:
            ValueError: there was no training with evaluations and a directory.
        """
        if not hasattr(self, "trainer"):
            raise ValueError("load_best before fit: there are no evaluations to choose from")
        self.trainer.load_best()

    def _config(
        self,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None,
        batch_size: int,
        num_epochs: int,
    ) -> TrainingConfig:
        """Return the settings of a training over so many passes."""
        examples = require_examples(train_dataset)
        settings = {"batch_size": batch_size, **self._settings}
        if settings.get("max_batch_size") is None:
            settings["batch_size"] = batch_size  # else enable_dynamic_batching has set it
        steps, per_epoch = _steps(TrainingConfig.from_dict(settings), examples, num_epochs)
        settings["steps"] = steps
        if eval_dataset is not None and settings.get("eval_every") is None:
            settings["eval_every"] = per_epoch
        if self.directory is not None and settings.get("checkpoint_every") is None:
            settings["checkpoint_every"] = per_epoch
        if settings.get("warmup_steps", 0) > steps:
            raise ConfigError(
                f"warmup_steps = {settings['warmup_steps']}: must be at most {steps}, the steps of "
                f"{num_epochs} passes over {examples} examples"
            )
        return TrainingConfig.from_dict(settings)

    def _set(self, **settings: Any) -> None:
        """Change settings; a value that is not allowed changes nothing."""
        changed = {**self._settings, **settings}
        TrainingConfig.from_dict(changed)
        self._settings = changed


def _steps(config: TrainingConfig, examples: int, epochs: int) -> tuple[int, int]:
    """Return the optimizer steps of so many passes over the data, and those of the first pass."""
    seen = steps = first = 0
    while seen < epochs * examples:
        for _ in range(config.gradient_accumulation_steps):
            seen += wanted_size(config, seen // examples)
        steps += 1
        first = first or (steps if seen >= examples else 0)
    return steps, first
