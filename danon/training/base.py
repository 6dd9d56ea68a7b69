"""One optimizer step after another: what every trainer shares, and what one's own replaces."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.training.config import TrainingConfig

__all__ = ["BaseTrainer"]

IGNORED = -100
"""Label of a place that has no target."""

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
    """A module of the extra ``training``.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"training needs the package {package}: pip install 'danon[training]'"
        ) from error


class BaseTrainer:
    """Holds model, optimizer and accelerator; a subclass replaces the steps it wants otherwise.

    ``setup_training`` builds, ``train_step`` runs one batch, ``compute_loss`` judges what the model
    said, ``backward_step`` learns from it.

    Attributes:
        model: as prepared by accelerate.
        batch: the batch of the current step, on the device.
        label_share: labels of that batch, as a multiple of the mean over the batches of its
            optimizer step. Gradients are weighted by it.
        step: optimizer steps done.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig | Mapping[str, Any]) -> None:
        """``config``: or a dictionary, of its fields or in the specification's nested form."""
        if not isinstance(config, TrainingConfig):
            config = TrainingConfig.from_dict(config)
        self.model, self.config = model, config
        self.batch: Any = None
        self.label_share = 1.0
        self.step = 0

    def setup_training(self) -> None:
        """Make accelerator and optimizer; called by ``fit`` where the subclass did not.

        Raises:
            ImportError: accelerate is not installed.
            ValueError: ``gradient_checkpointing`` of a model that has no method for it, or a
                variable ACCELERATE_* that asks for what the configuration does not.
        """
        accelerate, c = needed("accelerate"), self.config
        _refuse_environment(c)
        # accelerate has one precision for the whole process, and a trainer has its own.
        accelerate.state.AcceleratorState._reset_state()
        self.accelerator = accelerate.Accelerator(
            mixed_precision=c.mixed_precision,
            # Of a number of steps accelerate would let the environment decide.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
                num_steps=c.gradient_accumulation_steps
            ),
        )
        if c.gradient_checkpointing:
            _checkpoint_blocks(self.model)
        self.optimizer = self.make_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; decay for matrices only."""
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate)

    def train_step(self, batch: Any) -> Tensor:
        """Run the model on a batch and learn from it; the loss, detached."""
        with self.accelerator.autocast():
            loss = self.compute_loss(self.forward(batch))
        self.backward_step(loss)
        return loss.detach()

    def forward(self, batch: Any) -> Any:
        """The model's output for a batch: ``(input_ids, labels)``, or a mapping of arguments."""
        if isinstance(batch, Mapping):
            known = {name: x for name, x in batch.items() if name != "labels"}
            return self.model(**known)
        return self.model(batch[0])

    def compute_loss(self, outputs: Any) -> Tensor:
        """Cross entropy of logits (..., classes) against the labels of ``self.batch``.

        Labels (...) are of the same places as the logits, ``-100`` where there is none; the mean
        over no label is zero. Plus what the attentions ask for (``auxiliary_loss``) while training.
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
            loss: mean over the labels of the batch; it counts by ``label_share``.

        Raises:
            DivergenceError: the loss is not finite, or the gradient that is to be clipped; the
                weights are those of the step before.
        """
        c, a = self.config, self.accelerator
        if self.label_share > 0 and not torch.isfinite(loss):
            raise DivergenceError(f"the loss is {loss.item()}")
        # Of several processes each takes part in the sum of gradients, with a zero if it has none.
        if self.label_share > 0 or a.num_processes > 1:
            a.backward(loss * self.label_share)
        if not a.sync_gradients:
            return
        if c.gradient_clipping is not None:
            norm = a.clip_grad_norm_(self.model.parameters(), c.gradient_clipping)
            # The scaler of fp16 finds its scale by gradients that overflow, and skips those steps.
            if a.scaler is None and not torch.isfinite(norm):
                raise DivergenceError(f"the norm of the gradient is {norm.item()}")
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * c.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _refuse_environment(config: TrainingConfig) -> None:
    """Refuse variables by which accelerate would train otherwise than the configuration says.

    Those that say where to train (ACCELERATE_USE_CPU, ACCELERATE_TORCH_DEVICE), how to log, and
    the values that ``accelerate launch`` sets by itself, are no contradiction.

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
            known = " or ".join(dict.fromkeys(map(repr, values[-2:])))
            raise ValueError(
                f"{name} = {value!r} in the environment: must not be set, or be {known}, "
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
