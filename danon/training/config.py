"""Settings of a training run: steps, optimizer, schedule, precision, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from danon.config import Config, ConfigError, require

__all__ = ["TrainingConfig"]

NESTED_FIELDS = {
    ("optimizer", "type"): "optimizer",
    ("optimizer", "lr"): "learning_rate",
    ("optimizer", "weight_decay"): "weight_decay",
    ("scheduler", "type"): "schedule",
    ("scheduler", "warmup_steps"): "warmup_steps",
}
"""Keys of the specification's nested ``training_config``, and the field each one sets."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Settings of :class:`danon.training.Trainer`.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: examples of one forward pass of all processes together.
        gradient_accumulation_steps: forward passes of one optimizer step.
        strategy: how several processes share the model: a name of
            :func:`danon.training.strategies.names`. One process has all of it.
        zero_stage: of strategy ``deepspeed``: 1 splits the optimizer, 2 also the gradients, 3 also
            the parameters.
        optimizer: ``adamw``; or ``muon`` for the matrices of the blocks and AdamW for the rest.
        learning_rate: highest learning rate, eta_0.
        weight_decay: on matrices only; biases, gains and other vectors have none.
        warmup_steps: steps of linear growth from zero.
        schedule: learning rate after the warm-up. ``cosine`` falls to ``final_ratio`` of it,
            ``adaptive`` is eta_0 * min(1, sqrt(t_0 / t)) with t_0 the warm-up (section 6 of the
            specification), ``constant`` stays.
        final_ratio: last learning rate of the cosine over the highest.
        gradient_clipping: largest norm of the gradient; None: not clipped.
        mixed_precision: ``bf16`` and ``fp16`` compute in that type, weights stay as they are.
        label_smoothing: share of a label's probability that all classes get, 0 to below 1.
        mixup_alpha: of mixup's Beta(alpha, alpha) (:mod:`danon.training.mixup`); 0: no mixup.
        gradient_centralization: subtract from gradients of matrices their means
            (:func:`danon.training.optimizers.centralize_gradients`).
        start_size: share of each example's tokens that the first pass over the data reads.
        size_growth: factor by which that share grows with each pass over the data, >= 1.
        max_size: largest share.
        max_batch_size: largest batch; it grows by half with each pass over the data. None: the
            batch stays at ``batch_size``.
        optimization_level: precision of weights and computation together
            (:mod:`danon.training.precision`); with ``O0`` ``mixed_precision`` decides alone.
        gradient_checkpointing: recompute each block in the backward pass.
        seed: seed of the order of the examples and of the random numbers of training.
        eval_every: steps between evaluations; None: only after the last step.
        patience: evaluations without improvement before training stops; None: it does not.
        checkpoint_every: steps between checkpoints; None: only after the last step. An evaluation
            better than all before writes one too.
        keep_checkpoints: checkpoints that stay on disk, beside the one of the best evaluation.
        log_every: steps between logged metrics.
        rank_timeout_s: seconds after which a process that waits for another one gives up.
    """

    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    strategy: str = "ddp"
    zero_stage: Literal[1, 2, 3] = 2
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: Literal["cosine", "adaptive", "constant"] = "cosine"
    final_ratio: float = 0.1
    gradient_clipping: float | None = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    optimization_level: Literal["O0", "O1", "O2", "O3"] = "O0"
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    gradient_centralization: bool = False
    start_size: float = 1.0
    size_growth: float = 1.2
    max_size: float = 1.0
    max_batch_size: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 10
    rank_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        super().__post_init__()
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "keep_checkpoints",
            "log_every",
        ):
            require(getattr(self, name) >= 1, self, name, ">= 1")
        for name in ("eval_every", "patience", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, ">= 1 or None")
        require(self.learning_rate > 0, self, "learning_rate", "> 0")
        require(self.weight_decay >= 0, self, "weight_decay", ">= 0")
        require(
            0 <= self.warmup_steps <= self.steps,
            self,
            "warmup_steps",
            f"from 0 to steps = {self.steps}",
        )
        require(
            self.schedule != "adaptive" or self.warmup_steps >= 1,
            self,
            "warmup_steps",
            ">= 1 with schedule = 'adaptive': it is t_0",
        )
        require(0 <= self.final_ratio <= 1, self, "final_ratio", "in [0, 1]")
        require(0 <= self.label_smoothing < 1, self, "label_smoothing", "in [0, 1)")
        require(0 <= self.mixup_alpha < math.inf, self, "mixup_alpha", "a number >= 0")
        require(0 < self.max_size <= 1, self, "max_size", "in (0, 1]")
        require(
            0 < self.start_size <= self.max_size,
            self,
            "start_size",
            f"in (0, max_size = {self.max_size}]",
        )
        require(1 <= self.size_growth < math.inf, self, "size_growth", "a number >= 1")
        require(
            self.max_batch_size is None or self.max_batch_size >= self.batch_size,
            self,
            "max_batch_size",
            f">= batch_size = {self.batch_size}, or None",
        )
        require(self.rank_timeout_s > 0, self, "rank_timeout_s", "> 0")
        require(
            self.mixed_precision == "no" or self.optimization_level == "O0",
            self,
            "mixed_precision",
            f"'no' with optimization_level = {self.optimization_level!r}, which says the precision",
        )
        require(
            self.gradient_clipping is None or self.gradient_clipping > 0,
            self,
            "gradient_clipping",
            "> 0 or None",
        )
        require(
            self.patience is None or self.eval_every is not None,
            self,
            "patience",
            "None without eval_every",
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step over the highest one.

        Args:
            step: 0 for the first step.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "adaptive":
            return min(1.0, math.sqrt(self.warmup_steps / (step + 1)))
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * done)) / 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from fields, or from the nested ``training_config`` of the specification.

        Args:
            values: of fields, or ``optimizer`` and ``scheduler`` with dictionaries of their own.

        Raises:
            ConfigError: an unknown key or a value that is not allowed.
        """
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("optimizer", "scheduler"):
                flat |= _flat(name, value)
            elif name == "mixed_precision" and isinstance(value, bool):
                flat[name] = "bf16" if value else "no"
            else:
                flat[name] = value
        return super().from_dict(flat)


def _flat(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an inner dictionary of the specification's form."""
    fields = {key: field for (name, key), field in NESTED_FIELDS.items() if name == part}
    flat = {}
    for key, value in values.items():
        if key in fields:
            flat[fields[key]] = value
        else:
            allowed = sorted(fields)
            raise ConfigError(f"{part}.{key}: must be one of {', '.join(allowed)}")
    return flat
