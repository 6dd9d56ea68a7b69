"""The base of strategies, which place a model, synchronize gradients, save and load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from danon.training import state_files
from danon.training.config import TrainingConfig
from danon.training.precision import Precision, apply_level, narrow_dtype
from danon.training.ranks import Ranks

__all__ = ["REGISTERED", "Strategy", "register"]

REGISTERED: dict[str, type[Strategy]] = {}
"""Strategies by name."""
_Class = TypeVar("_Class", bound="type[Strategy]")


def register(strategy: _Class) -> _Class:
    """Register a strategy under its name; a decorator."""
    REGISTERED[strategy.name] = strategy
    return strategy


class Strategy:
    """A model in one process; subclasses spread it over the ranks.

    The trainer weights each loss so that the *mean* of the gradients over the ranks is the gradient
    of the whole step. A strategy takes that mean.

    Args:
        ranks: processes of the training.
        config: settings of the training.

    Attributes:
        name: name in the configuration.
        shards_weights: True if each of several ranks has a part of every weight.
        model: module to call; set by :meth:`prepare`.
        unwrapped: the model itself, with the names of its parameters.
        optimizer: optimizer over the parameters as they are placed.
        scaler: scales losses of fp16 so that gradients do not vanish; None in other precisions.
        precision: level of precision that was applied; None for O0.
        measures_norm: True if :meth:`clip` returns the norm of the gradient.
    """

    name: ClassVar[str]
    shards_weights: ClassVar[bool] = False
    precision: Precision | None = None
    measures_norm = True
    model: nn.Module
    unwrapped: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, ranks: Ranks, config: TrainingConfig) -> None:
        self.ranks, self.config = ranks, config
        fp16 = config.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(ranks.device.type) if fp16 else None

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> None:
        """Place the model on the ranks, and make its optimizer.

        Every rank begins with the weights of rank 0.

        Args:
            model: the same module on every rank; its parameters may be replaced.
            make_optimizer: returns an optimizer over the parameters the model has then.

        Raises:
            ValueError: the strategy cannot train this model.
            ImportError: its package is not installed; names the extra.
        """
        self.unwrapped = model.to(self.ranks.device)
        if self.ranks.world_size > 1:
            copy_from_main(model)
        level = self.config.optimization_level
        if level != "O0":
            sharded, several = self.shards_weights, self.ranks.world_size > 1
            self.precision = apply_level(
                model,
                level,
                dtype=narrow_dtype(self.ranks.device.type),
                wide_gradients=not several or sharded,  # DDP has gradients as wide as the weights
                sharded=sharded and several,
            )
            self.scaler = self.precision.scaler(self.ranks.device.type)
        self.model = self.place(model)
        self.optimizer = (
            make_optimizer() if self.precision is None else self.precision.optimizer(make_optimizer)
        )

    def place(self, model: nn.Module) -> nn.Module:
        """Return the module to call in place of the model; several ranks need more than itself.

        Args:
            model: on the device, with equal weights on every rank.
        """
        return model

    def synchronize(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for a forward and backward pass of an optimizer step.

        Args:
            last: True for the last pass of the step. Before it, gradients may stay on their rank.
        """
        return contextlib.nullcontext()

    def auxiliary_loss(self) -> Tensor | None:
        """Return the auxiliary loss of the last forward pass; None for a model without one."""
        extra = getattr(self.unwrapped, "auxiliary_loss", None)
        return None if extra is None else extra()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss.

        Args:
            loss: scalar.
        """
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, most: float) -> Tensor:
        """Clip the gradient and return its norm before, a scalar; the same on every rank.

        Args:
            most: largest norm; infinity only measures.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), most)
        return norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm

    def step(self) -> None:
        """Move the weights and clear the gradients."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write weights and optimizer; every rank calls it with the same folder.

        Args:
            folder: exists, and is visible to every rank.
        """
        state_files.save(folder, self.unwrapped, self.optimizer, self.ranks)
        if self.scaler is not None and self.ranks.is_main:
            torch.save(self.scaler.state_dict(), folder / "scaler.pt")

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, by whatever number of ranks.

        Args:
            folder: of the checkpoint.
        """
        state_files.load(folder, self.unwrapped, self.optimizer, self.ranks)
        if self.scaler is not None:
            self.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))

    def load_weights(self, folder: Path) -> None:
        """Read the weights alone.

        Args:
            folder: of the checkpoint.
        """
        state_files.load(folder, self.unwrapped, None, self.ranks)


def copy_from_main(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in state_of(model):
        dist.broadcast(tensor, 0)


def state_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield the data of all parameters and buffers."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.detach()
