"""One optimizer step: what every trainer shares, and the methods that your own overrides."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.training.blocks import checkpoint_blocks
from danon.training.config import TrainingConfig
from danon.training.labels import IGNORED, labels_of
from danon.training.mixup import Partners
from danon.training.optimizers import centralize_gradients, make_optimizer
from danon.training.ranks import Ranks
from danon.training.strategies import strategy_registry
from danon.training.strategies.base import Strategy

__all__ = ["IGNORED", "BaseTrainer", "DivergenceError", "needed"]


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
    """Model, optimizer and strategy of a training; a subclass overrides single steps.

    ``setup_training`` makes the optimizer, ``train_step`` runs one batch, ``compute_loss`` returns
    its loss, ``backward_step`` computes gradients and moves the weights.

    Args:
        model: module that ``forward`` calls with the inputs of a batch.
        config: settings, or a dictionary of them, flat or in the specification's nested form.

    Attributes:
        model: module to call, as the strategy made it of the model.
        unwrapped: the model itself.
        ranks: processes of the training.
        batch: the batch of the current pass, on the device.
        label_share: labels of that batch over those of its optimizer step, times the number of
            processes. Gradients of its loss are weighted by it.
        example_share: the same of examples; gradients of the auxiliary loss are weighted by it.
        partners: partners of the batch's examples in mixup; None without it.
        auxiliary: auxiliary loss of the current step so far, over its examples, times the number of
            processes; None for a model without one.
        last_pass: True if the optimizer step ends with the current pass.
        step: number of optimizer steps done.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig | Mapping[str, Any]) -> None:
        if not isinstance(config, TrainingConfig):
            config = TrainingConfig.from_dict(config)
        self.model = self.unwrapped = model
        self.config = config
        self.batch: Any = None
        self.label_share = self.example_share = 1.0
        self.partners: Partners | None = None
        self.auxiliary: Tensor | float | None = None
        self.last_pass = True
        self.step = 0

    def setup_training(self) -> None:
        """Join the other processes, spread the model and make the optimizer; ``fit`` calls it.

        Raises:
            ValueError: the strategy is unknown or cannot train this model,
                ``gradient_checkpointing`` of a model that has no method for it, or ranks whose
                configurations differ.
            ImportError: a package of the strategy is not installed.
        """
        self.ranks = Ranks.join(self.config.rank_timeout_s)
        with self.ranks.together():
            self.strategy = self.make_strategy()
            if self.config.gradient_checkpointing:
                checkpoint_blocks(self.unwrapped)
        for name, value in self.shared_settings().items():
            self.ranks.require_equal(name, value)
        self.strategy.prepare(self.unwrapped, self.make_optimizer)
        self.model, self.optimizer = self.strategy.model, self.strategy.optimizer

    def make_strategy(self) -> Strategy:
        """Return the strategy of the configuration for ``self.ranks``.

        Raises:
            ValueError: an unknown strategy; lists those there are.
        """
        return strategy_registry.get(self.config.strategy)(self.ranks, self.config)

    def shared_settings(self) -> dict[str, Any]:
        """Return settings by name that must be equal on all ranks."""
        return self.config.to_dict()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the configuration over the parameters of ``self.unwrapped``."""
        return make_optimizer(self.unwrapped, self.config)

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context that computes in the precision of the configuration."""
        device, precision = self.ranks.device.type, self.config.mixed_precision
        if self.strategy.precision is not None:
            return self.strategy.precision.autocast(device)
        if precision == "no":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        return torch.autocast(device, dtype)

    def train_step(self, batch: Any) -> Tensor:
        """Run the model on a batch and add its gradient.

        Args:
            batch: as the loader yields it, on the device.

        Returns:
            The loss, a scalar without gradient.
        """
        with self.autocast():
            outputs = self.forward(batch)
            loss = self.compute_loss(outputs)
            if self.partners is not None:
                self.batch = self.partners.batch
                loss = self.partners.mean(loss, self.compute_loss(outputs))
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

        While training, labels are smoothed as configured. The auxiliary loss of the model's
        attentions is not in it: :meth:`backward_step` adds that.

        Args:
            outputs: logits (..., classes), or an object with ``logits``. Labels are (...) int64,
                ``-100`` where there is none.

        Returns:
            The mean over the labels, a scalar; zero without a label.
        """
        labels = labels_of(self.batch)
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.config.label_smoothing if self.unwrapped.training else 0.0,
        )
        loss: Tensor = total / (labels != IGNORED).sum().clamp(min=1)
        return loss

    def backward_step(self, loss: Tensor) -> None:
        """Add the gradient; after the last pass of a step clip it and move the weights.

        The auxiliary loss of the model's attentions is added, a mean over examples.

        Args:
            loss: mean over the labels of the batch, a scalar; weighted by ``label_share``.

        Raises:
            DivergenceError: the loss, or the gradient, is not finite. The weights are those of the
                step before.
        """
        c, alone = self.config, self.ranks.world_size == 1
        extra = self.strategy.auxiliary_loss() if self.unwrapped.training else None
        # Every process takes part in the mean of gradients, with zero if it has no label.
        parts = [loss * self.label_share] if self.label_share > 0 or not alone else []
        if extra is not None and extra.requires_grad:
            parts.append(extra * self.example_share)
            self.auxiliary = (self.auxiliary or 0.0) + extra.detach() * self.example_share
        if parts:
            total = torch.stack([part.to(loss) for part in parts]).sum()
            # One of several must not stop here alone: the others wait for its gradients.
            checked = alone or not self.strategy.measures_norm
            if checked and not math.isfinite(worst := self.ranks.totals(float(total.detach()))[0]):
                raise DivergenceError(f"the loss is {worst}")
            self.strategy.backward(total)
        if not self.last_pass:
            return
        if c.gradient_centralization:
            centralize_gradients(self.unwrapped)
        if c.gradient_clipping is not None or not alone:  # the norm says if another's loss is odd
            most = math.inf if c.gradient_clipping is None else c.gradient_clipping
            norm = self.strategy.clip(most)
            # The scaler of fp16 finds its scale by gradients that overflow; it skips those steps.
            if self.strategy.scaler is None and not torch.isfinite(norm):
                self.optimizer.zero_grad()
                raise DivergenceError(f"the norm of the gradient is {norm.item()}")
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * c.rate(self.step)
        self.strategy.step()
