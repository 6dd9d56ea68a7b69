"""One optimizer step: what every trainer shares, and the methods that your own overrides."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.training.config import TrainingConfig

__all__ = ["IGNORED", "BaseTrainer", "DivergenceError", "needed"]

IGNORED = -100
"""Label of a token without a target."""

CHECKPOINTING = (
    "enable_gradient_checkpointing",
    "activation_checkpointing_enable",  # Hugging Face, and its name before transformers 5
    "gradient_checkpointing_enable",
)
"""Methods of models that recompute their blocks in the backward pass."""


BACKENDS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
"""Variables that make accelerate replace the optimizer or shard the weights."""


class DivergenceError(ArithmeticError):
    """Loss or gradient is not finite; the weights have not moved."""


def needed(name: str) -> Any:
    """Import a module of the extra ``training``.

    Args:
        name: of the module.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"training needs the package {package}: pip install 'danon[training]'"
        ) from error


class BaseTrainer:
    """Model, optimizer and accelerator of a training; a subclass overrides single steps.

    ``setup_training`` makes the optimizer, ``train_step`` runs one batch, ``compute_loss`` returns
    its loss, ``backward_step`` computes gradients and moves the weights.

    Args:
        model: module that ``forward`` calls with the inputs of a batch.
        config: settings, or a dictionary of them, flat or in the specification's nested form.

    Attributes:
        model: the model as prepared by accelerate.
        batch: the batch of the current step, on the device.
        label_share: labels of that batch over the mean of its optimizer step's batches. Gradients
            are weighted by it.
        step: number of optimizer steps done.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig | Mapping[str, Any]) -> None:
        if not isinstance(config, TrainingConfig):
            config = TrainingConfig.from_dict(config)
        self.model, self.config = model, config
        self.batch: Any = None
        self.label_share = 1.0
        self.step = 0

    def setup_training(self) -> None:
        """Make accelerator and optimizer; ``fit`` calls it.

        Raises:
            ImportError: accelerate is not installed.
            ValueError: ``gradient_checkpointing`` of a model that has no method for it, or a
                variable ACCELERATE_* that contradicts the configuration.
        """
        accelerate, c = needed("accelerate"), self.config
        _refuse_environment(c)
        # accelerate keeps one precision for the whole process; a trainer has its own.
        accelerate.state.AcceleratorState._reset_state()
        self.accelerator = accelerate.Accelerator(
            mixed_precision=c.mixed_precision,
            # Given a mere number, accelerate would let the environment override it.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
                num_steps=c.gradient_accumulation_steps
            ),
        )
        if c.gradient_checkpointing:
            _checkpoint_blocks(self.model)
        self.optimizer = self.make_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with weight decay on matrices only."""
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate)

    def train_step(self, batch: Any) -> Tensor:
        """Run the model on a batch and add its gradient.

        Args:
            batch: as the loader yields it, on the device.

        Returns:
            The loss, a scalar without gradient.
        """
        with self.accelerator.autocast():
            loss = self.compute_loss(self.forward(batch))
        self.backward_step(loss)
        return loss.detach()

    def forward(self, batch: Any) -> Any:
        """Return the model's output for a batch.

        Args:
            batch: ``(input_ids, labels)``, or a mapping of the model's arguments and ``labels``.
        """
        if isinstance(batch, Mapping):
            return self.model(**{name: x for name, x in batch.items() if name != "labels"})
        return self.model(batch[0])

    def compute_loss(self, outputs: Any) -> Tensor:
        """Return the cross entropy of logits against the labels of ``self.batch``.

        While training, the ``auxiliary_loss`` of the model's attentions is added.

        Args:
            outputs: logits (..., classes), or an object with ``logits``. Labels are (...) int64,
                ``-100`` where there is none.

        Returns:
            The mean over the labels, a scalar; zero without a label.
        """
        labels = self.batch["labels"] if isinstance(self.batch, Mapping) else self.batch[1]
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss: Tensor = total / (labels != IGNORED).sum().clamp(min=1)
        extra = getattr(self.accelerator.unwrap_model(self.model), "auxiliary_loss", None)
        return loss + extra() if extra is not None and self.model.training else loss

    def backward_step(self, loss: Tensor) -> None:
        """Add the gradient; after the last batch of a step clip it and move the weights.

        Args:
            loss: mean over the labels of the batch, a scalar; weighted by ``label_share``.

        Raises:
            DivergenceError: the loss, or the gradient that is to be clipped, is not finite. The
                weights are those of the step before.
        """
        c, a = self.config, self.accelerator
        if self.label_share > 0 and not torch.isfinite(loss):
            raise DivergenceError(f"the loss is {loss.item()}")
        # Every process takes part in the sum of gradients, with zero if it has no label.
        if self.label_share > 0 or a.num_processes > 1:
            a.backward(loss * self.label_share)
        if not a.sync_gradients:
            return
        if c.gradient_clipping is not None:
            norm = a.clip_grad_norm_(self.model.parameters(), c.gradient_clipping)
            # The scaler of fp16 finds its scale by gradients that overflow; it skips those steps.
            if a.scaler is None and not torch.isfinite(norm):
                raise DivergenceError(f"the norm of the gradient is {norm.item()}")
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * c.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _refuse_environment(config: TrainingConfig) -> None:
    """Refuse environment variables that make accelerate contradict the configuration.

    Variables for the device (ACCELERATE_USE_CPU, ACCELERATE_TORCH_DEVICE) and for logging are
    allowed, and so are the values that ``accelerate launch`` sets by itself.

    Raises:
        ValueError: names the variable, its value and what is allowed.
    """
    allowed = {
        "ACCELERATE_MIXED_PRECISION": ("no", config.mixed_precision),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", str(config.gradient_accumulation_steps)),
        "ACCELERATE_DYNAMO_BACKEND": ("no",),
        **dict.fromkeys(BACKENDS, ("0", "false", "f", "n", "no", "off")),
    }
    for name, values in allowed.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in values:
            allowed_values = " or ".join(dict.fromkeys(map(repr, values[-2:])))
            raise ValueError(
                f"{name} = {value!r} in the environment: must not be set, or be {allowed_values}, "
                "as the configuration has it"
            )


def _checkpoint_blocks(model: nn.Module) -> None:
    for name in CHECKPOINTING:
        enable = getattr(model, name, None)
        if enable is not None:
            enable()
            return
    raise ValueError(
        f"gradient_checkpointing = True: {type(model).__name__} must have a method "
        f"{CHECKPOINTING[0]}, or Hugging Face's {CHECKPOINTING[-1]}"
    )
