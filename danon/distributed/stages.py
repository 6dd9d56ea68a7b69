"""Stages of a pipeline: consecutive layers of a model, as a module of their own.

    first, second = make_stage(model, 0, 3), make_stage(model, 3, 6)   # of a model of six layers
    hidden, auxiliary = first(input_ids)                               # (B, N, width), (B,)
    logits, auxiliary = second(hidden, auxiliary)

Parameters keep the names that they have in the model, and are the model's own. Beside the hidden
states, one number an example travels: the auxiliary loss of the layers so far. A pipeline has a
loss in its last stage alone, and this is how the losses of earlier layers come to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention.base import BaseAttention
from danon.attention.keyed_draws import DrawKey, number_attentions
from danon.attention.padding import Compaction
from danon.models import Backbone
from danon.models.block import Block, rotary_angles

__all__ = ["Stage", "layers_of", "make_stage"]


class Stage(nn.Module):
    """Consecutive layers of a model; see :func:`make_stage`.

    Attributes:
        enters: True if it takes the inputs of the model, False if hidden states.
        leaves: True if it returns the outputs of the model.
        autocast: makes the context that the stage computes in.
    """

    def __init__(self, model: nn.Module, enters: bool, leaves: bool) -> None:
        """Begin a stage without layers.

        Args:
            model: whole model; its attentions are numbered, so that its stages draw what it draws.
            enters: as the attribute.
            leaves: as the attribute.
        """
        super().__init__()
        self.enters, self.leaves = enters, leaves
        self.autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        self._keys: dict[BaseAttention, DrawKey | None] = {}
        number_attentions(model)

    def forward(
        self,
        x: Tensor,
        auxiliary: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layers.

        Args:
            x: inputs of the model (B, N), or hidden states (B, N, width).
            auxiliary: auxiliary losses of earlier layers (B,); None in the first stage.
            attention_mask: padding of the inputs (B, N), as the model takes it.
            rows: places of the examples in the batch that draws are keyed for (B,); None: all of
                them in order. See :meth:`keep_draw_keys`.

        Returns:
            Hidden states, or the outputs of the model, and auxiliary losses (B,): for each example
            the sum of those of the layers, which are means over the examples.
        """
        with self.autocast():
            if auxiliary is None:
                auxiliary = self.no_loss(x)
            return self.run(x, auxiliary, attention_mask, rows)

    def run(
        self, x: Tensor, auxiliary: Tensor, attention_mask: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers; see :meth:`forward`."""
        raise NotImplementedError

    def no_loss(self, x: Tensor) -> Tensor:
        """Return auxiliary losses of zero (B,), which always have a gradient while training.

        The shapes and gradients that travel are fixed before the first pass.
        """
        like = next(self.parameters())
        grad = self.training and torch.is_grad_enabled()
        return torch.zeros(len(x), dtype=like.dtype, device=x.device, requires_grad=grad)

    def travelling(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], ...] | None:
        """Return what the stage takes and returns for a batch, without values.

        Args:
            inputs: a batch of the model's inputs, or tensors of its shapes.

        Returns:
            Tensors on the meta device that it is called with, and that it returns; None if the
            shapes are known only by running it.
        """
        return None

    def shared_weights(self) -> list[Tensor]:
        """Return the parameters that another stage has, too; their gradients are to be summed."""
        return []

    def keep_draw_keys(self) -> None:
        """Remember the keys of draws that are set; each pass takes its rows of them."""
        self._keys = {
            module: module.draw_key
            for module in self.modules()
            if isinstance(module, BaseAttention)
        }

    def restore_draw_keys(self) -> None:
        """Set the keys again that :meth:`keep_draw_keys` found."""
        for attention, key in self._keys.items():
            attention.draw_key = key

    def set_draw_rows(self, module: nn.Module, rows: Tensor | None) -> None:
        """Let a module draw for rows of the batch whose keys are kept.

        Args:
            module: a layer.
            rows: (b,); None changes nothing.
        """
        if rows is None:
            return
        for attention in module.modules():
            if not isinstance(attention, BaseAttention):
                continue
            key = self._keys.get(attention)
            if key is not None:
                places = rows if key.rows is None else key.rows[rows.to(key.rows.device)]
                attention.draw_key = dataclasses.replace(key, rows=places.to(key.step.device))


class BackboneStage(Stage):
    """Layers of a :class:`~danon.models.Backbone`.

    Args:
        model: whole model.
        first: number of its first layer.
        last: number after its last layer.
        enters: True: with the embedding before them.
        leaves: True: with norm and head behind them.
    """

    def __init__(self, model: Backbone, first: int, last: int, enters: bool, leaves: bool) -> None:
        super().__init__(model, enters, leaves)
        self.config, self.task = model.config, model.task
        self.gradient_checkpointing = model.gradient_checkpointing
        self.width = model.config.hidden_size
        if enters or (leaves and model.task == "lm"):
            self.embed = model.embed
        # Keyed by number: the names of parameters are those of the whole model.
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in range(first, last)})
        if leaves:
            self.norm = model.norm
        if leaves and model.task == "classifier":
            self.head = model.head

    def run(
        self, x: Tensor, auxiliary: Tensor, attention_mask: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers; see :meth:`Stage.forward`."""
        moved = None if attention_mask is None else Compaction.of(attention_mask)
        real = None if moved is None else moved.real
        if self.enters:
            x = self.embed(x)
            x = x if moved is None else moved.compact(x)
        rotary = rotary_angles(torch.arange(x.shape[1], device=x.device), self.config, x)
        training = self.training and torch.is_grad_enabled()
        for layer in self.layers.values():
            assert isinstance(layer, Block)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._one, layer, x, rotary, real, rows, use_reentrant=False)
            else:
                x = self._one(layer, x, rotary, real, rows)
            if training:
                auxiliary = auxiliary + layer.mixer.auxiliary_loss().to(auxiliary)
        if not self.leaves:
            return x, auxiliary
        x = self.norm(x)
        if self.task == "classifier":
            mean = x.mean(1) if real is None else x.sum(1) / real.sum(1, True).clamp_min(1)
            return self.head(mean), auxiliary
        x = x if moved is None else moved.expand(x)
        return (F.linear(x, self.embed.weight) if self.task == "lm" else x), auxiliary

    def travelling(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Return what the stage takes and returns for a batch; see :meth:`Stage.travelling`."""
        ids = inputs["input_ids"]
        B, N = ids.shape

        dtype = next(self.parameters()).dtype

        def like(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        between = like(B, N, self.width), like(B)
        taken = (ids.to("meta"),) if self.enters else between
        if not self.leaves or self.task == "encoder":
            return taken, between
        if self.task == "lm":
            return taken, (like(B, N, self.config.vocab_size), like(B))
        return taken, (like(B, self.head.out_features), like(B))

    def shared_weights(self) -> list[Tensor]:
        """Return the embedding of a language model, which is the head's matrix as well."""
        return [self.embed.weight] if self.task == "lm" and self.enters != self.leaves else []

    def _one(
        self,
        layer: Block,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        real: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        # Here, not outside: a pass that is computed again must draw what it drew before.
        self.set_draw_rows(layer, rows)
        out: Tensor = layer(x, rotary, real)
        return out


class SequentialStage(Stage):
    """Children of an ``nn.Sequential``, whose outputs are hidden states of any shape.

    Args:
        model: whole model.
        first: number of its first child.
        last: number after its last child.
        enters: True if there is none before them.
        leaves: True if there is none behind them.
    """

    def __init__(
        self, model: nn.Sequential, first: int, last: int, enters: bool, leaves: bool
    ) -> None:
        super().__init__(model, enters, leaves)
        self.names = [name for name, _ in model.named_children()][first:last]
        for name in self.names:
            self.add_module(name, model.get_submodule(name))

    def run(
        self, x: Tensor, auxiliary: Tensor, attention_mask: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the children; see :meth:`Stage.forward`."""
        for name in self.names:
            layer = self.get_submodule(name)
            self.set_draw_rows(layer, rows)
            x = layer(x)
        return x, auxiliary

    def no_loss(self, x: Tensor) -> Tensor:
        """Return auxiliary losses of zero (B,); see :meth:`Stage.no_loss`."""
        grad = self.training and torch.is_grad_enabled()
        return torch.zeros(len(x), device=x.device, requires_grad=grad)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that a model can be cut between.

    Args:
        model: a :class:`~danon.models.Backbone` or an ``nn.Sequential``.

    Raises:
        ValueError: any other model, whose ``forward`` cannot be known.
    """
    if isinstance(model, Backbone):
        return list(model.layers)
    if isinstance(model, nn.Sequential):
        return list(model)
    raise ValueError(
        f"{type(model).__name__} cannot be cut into stages: must be a danon.models.Backbone, as "
        "the create_ functions make it, or an nn.Sequential of its layers"
    )


def make_stage(
    model: nn.Module,
    first: int,
    last: int,
    *,
    enters: bool | None = None,
    leaves: bool | None = None,
) -> Stage:
    """Return layers of a model as a stage; its modules are the model's own.

    Args:
        model: as :func:`layers_of` takes it.
        first: number of the first layer.
        last: number after the last layer.
        enters: True: what comes before the layers belongs to it. None: if the first one does.
        leaves: True: what comes behind the layers belongs to it. None: if the last one does.

    Raises:
        ValueError: a model that cannot be cut.
    """
    count = len(layers_of(model))
    enters = first == 0 if enters is None else enters
    leaves = last == count if leaves is None else leaves
    if isinstance(model, Backbone):
        return BackboneStage(model, first, last, enters, leaves)
    assert isinstance(model, nn.Sequential)
    return SequentialStage(model, first, last, enters, leaves)
