"""Training from a loader in a level of precision, in one process.

    trainer = MixedPrecisionTrainer(model, opt_level="O2", keep_batchnorm_fp32=True)
    result = trainer.train(train_loader, epochs=10, accumulation_steps=4)
    result.losses  # of each optimizer step

What O0 to O3 mean is in :mod:`danon.training.precision`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from danon.attention.ucsa.layer import anneal
from danon.training.base import BaseTrainer
from danon.training.batch_examples import count_examples, move_batch
from danon.training.config import TrainingConfig
from danon.training.labels import count_labels, labels_of
from danon.training.precision import Level, apply_level

__all__ = ["MixedPrecisionResult", "MixedPrecisionTrainer"]


@dataclass
class MixedPrecisionResult:
    """Result of a training.

    Attributes:
        losses: loss of each optimizer step, a mean over its labels; steps without one are left out.
        epoch_losses: mean of the losses of each pass over the loader.
        skipped_steps: steps that moved nothing, because a float16 gradient overflowed while the
            scale of the loss was found.
        dtype: the narrow type of the level.
    """

    losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    dtype: torch.dtype = torch.bfloat16


class MixedPrecisionTrainer(BaseTrainer):
    """Trainer of a model in a level of precision, on the accelerator if there is one.

    Batches are ``(inputs, labels)``, a mapping of the model's arguments with ``labels``, or inputs
    alone for a model that returns its loss. The loss is the model's own where it returns one (a
    scalar, or an output with ``loss`` as Hugging Face's), else the cross entropy of
    :meth:`danon.training.BaseTrainer.compute_loss`. Batches of one optimizer step count by their
    labels other than ``-100``, without labels by their examples.

    Example::

        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from danon.optimization import MixedPrecisionTrainer
        >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 2))
        >>> trainer = MixedPrecisionTrainer(model, opt_level="O2")
        >>> result = trainer.train(DataLoader(data, batch_size=2), epochs=20, accumulation_steps=2)
        >>> len(result.losses), result.losses[-1] < result.losses[0]
        (40, True)

    Args:
        model: float32; its weights become those of the level with the first :meth:`train`.
        opt_level: O0 to O3.
        keep_batchnorm_fp32: layers of normalization stay in float32; None: as the level says.
        config: settings of the optimizer, the learning rate and its schedule, clipping, label
            smoothing, gradient centralization and checkpointing; the loader and the level decide
            the rest. None: AdamW with a constant rate of 1e-3.
        dtype: bfloat16 or float16; None: bfloat16, or float16 on a GPU without it.

    Raises:
        ValueError: an unknown level, or ``mixed_precision`` in the configuration, which the level
            says.
    """

    def __init__(
        self,
        model: nn.Module,
        opt_level: Level = "O1",
        keep_batchnorm_fp32: bool | None = None,
        *,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if opt_level not in get_args(Level):
            raise ValueError(
                f"opt_level = {opt_level!r}: must be one of {', '.join(get_args(Level))}"
            )
        super().__init__(model, TrainingConfig(schedule="constant") if config is None else config)
        if self.config.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision = {self.config.mixed_precision!r}: must be 'no', opt_level = "
                f"{opt_level!r} says the precision"
            )
        self.opt_level, self.keep_batchnorm_fp32, self.dtype = opt_level, keep_batchnorm_fp32, dtype

    def setup_training(self) -> None:
        """Apply the level and make the optimizer; the first :meth:`train` calls it.

        Raises:
            ValueError: more than one process, or see :func:`danon.training.precision.apply_level`
                and :meth:`danon.training.BaseTrainer.setup_training`.
        """
        self.precision = apply_level(
            self.unwrapped, self.opt_level, self.keep_batchnorm_fp32, dtype=self.dtype
        )
        scaled = self.precision.dtype == torch.float16 and self.opt_level in ("O1", "O2")
        if scaled:
            self.config = dataclasses.replace(self.config, mixed_precision="fp16")
        super().setup_training()
        if self.ranks.world_size > 1:
            raise ValueError(
                f"MixedPrecisionTrainer in {self.ranks.world_size} processes: must be one; "
                f"DistributedTrainer(model, optimization_level={self.opt_level!r}) has more"
            )

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the configuration, over float32 copies in O2."""
        return self.precision.optimizer(super().make_optimizer)

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context that computes in the precision of the level."""
        return self.precision.autocast(self.ranks.device.type)

    def forward(self, batch: Any) -> Any:
        """Return the model's output for a batch; a model that takes labels gets them.

        Args:
            batch: see the class.
        """
        if isinstance(batch, Mapping) and self._takes_labels():
            return self.model(**batch)
        if isinstance(batch, Tensor):
            return self.model(batch)
        return super().forward(batch)

    def compute_loss(self, outputs: Any) -> Tensor:
        """Return the model's own loss, else the cross entropy against the labels of the batch.

        Args:
            outputs: a scalar, an object or mapping with ``loss``, or logits (..., classes).

        Returns:
            The loss, a scalar of at least float32.

        Raises:
            ValueError: neither the model nor the batch says what the loss is.
        """
        own = outputs.get("loss") if isinstance(outputs, Mapping) else None
        own = getattr(outputs, "loss", None) if own is None else own
        if own is None and isinstance(outputs, Tensor) and outputs.dim() == 0:
            own = outputs
        if isinstance(own, Tensor):
            return own.to(torch.promote_types(own.dtype, torch.float32))
        if labels_of(self.batch) is None:
            raise ValueError(
                f"the batch is a {type(self.batch).__name__} without labels: must be (inputs, "
                "labels) or have 'labels', or the model must return its loss"
            )
        return super().compute_loss(outputs)

    def train(
        self, train_loader: Iterable[Any], epochs: int = 1, accumulation_steps: int = 1
    ) -> MixedPrecisionResult:
        """Train for some passes over a loader; a second call goes on.

        Args:
            train_loader: yields batches, see the class.
            epochs: passes over it.
            accumulation_steps: batches of an optimizer step; the last one of a pass may have fewer.

        Returns:
            The losses.

        Raises:
            ValueError: a number below 1, or a loader without a batch.
            DivergenceError: loss or gradient is not finite; the weights have not moved.
        """
        for name, value in (("epochs", epochs), ("accumulation_steps", accumulation_steps)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r}: must be an integer >= 1")
        if not hasattr(self, "strategy"):
            self.setup_training()
        result = MixedPrecisionResult(dtype=self.precision.dtype)
        self.model.train()
        for _ in range(epochs):
            steps = [self._one_step(p, result) for p in _grouped(train_loader, accumulation_steps)]
            if not steps:
                raise ValueError("train_loader has no batch: must have at least one")
            losses = [loss for loss in steps if loss is not None]
            result.losses += losses
            result.epoch_losses += [sum(losses) / len(losses)] if losses else []
        return result

    def _one_step(self, passes: list[Any], result: MixedPrecisionResult) -> float | None:
        """Take one optimizer step; return the mean loss over its labels, None without one."""
        weights = [count_labels(batch) for batch in passes]
        examples = [count_examples(batch) for batch in passes]
        if sum(weights) == 0:
            return None
        scaler = self.strategy.scaler
        scale = None if scaler is None else scaler.get_scale()
        mean = torch.zeros((), device=self.ranks.device)
        for number, (batch, weight) in enumerate(zip(passes, weights, strict=True)):
            self.label_share = weight / sum(weights)
            self.example_share = examples[number] / sum(examples)
            self.last_pass = number + 1 == len(passes)
            self.batch = move_batch(batch, self.ranks.device)
            loss = self.train_step(self.batch)
            if weight > 0:  # the mean over nothing is not a number
                mean += loss * self.label_share
        if scaler is not None and scale is not None and scaler.get_scale() < scale:
            result.skipped_steps += 1
        self.step += 1
        anneal(self.unwrapped, self.step)
        return float(mean)

    def _takes_labels(self) -> bool:
        return "labels" in inspect.signature(self.unwrapped.forward).parameters


def _grouped(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield so many batches at a time, and those that are left."""
    group: list[Any] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
