"""A model whose heads and inner widths are spread over processes, block by block.

    parallel = TensorParallel(model)        # under torchrun, the same on every rank
    logits = parallel(input_ids)            # all logits, on every rank
    (loss(logits, labels) + parallel.auxiliary_loss()).backward()
    parallel.sum_gradients()
    optimizer.step()

A block is narrower: 1 / ranks of its heads and of the width between ``up`` and ``down``. Two sums
over the processes make each block whole, and two more in the backward pass (Shoeybi et al. 2019,
arXiv 1909.08053, section 3). All processes have the same input and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from danon.attention.base import BaseAttention
from danon.attention.head_share import HeadShare
from danon.attention.keyed_draws import DrawKey
from danon.distributed.process_group import Group, sum_gradients
from danon.models.backbone import Backbone
from danon.models.block import Block
from danon.models.state import ModelState

__all__ = ["TensorParallel"]


class TensorParallel(nn.Module):
    """A model of which each process computes some heads and a part of each feed-forward network.

    Parameters outside of these (embedding, norms, and what an attention learns for all heads) are
    whole on every process. Their gradients are whole after :meth:`sum_gradients`; so the processes'
    optimizers move them alike.

    Args:
        module: the model, equal on every process. Its blocks are made narrower in place.
        group: the processes; None: all of them. A plain process is alone.

    Example::

        >>> import torch
        >>> from danon import create_msra_model
        >>> from danon.distributed.tensor_parallel import TensorParallel
        >>> model = create_msra_model(hidden_size=64, num_layers=1, vocab_size=50, task="lm")
        >>> TensorParallel(model)(torch.randint(50, (1, 100))).shape
        torch.Size([1, 100, 50])

    Raises:
        ValueError: heads, key/value heads or an inner width that the processes do not divide, or an
            attention that cannot do with a part of its heads.

    Attributes:
        module: the model.
    """

    def __init__(self, module: Backbone, group: dist.ProcessGroup | None = None) -> None:
        """Make the blocks narrower."""
        super().__init__()
        self.module, self._group = module, Group.of(group)
        self._keys: list[DrawKey] = []
        if self._group.size == 1:
            return
        for block in self._blocks():
            _check(block, self._group.size)
        share = HeadShare(self._group.rank, self._group.size, self._group.total)
        for block in self._blocks():
            block.mixer.take_heads(share)
            _narrow(block, self._group)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model, as :meth:`danon.models.Backbone.forward` does.

        Args:
            input_ids: (B, N), the same on every process.
            attention_mask: (B, N) likewise, or None.
        """
        if self.training:
            self._share_draws()
        out: Tensor = self.module(input_ids, attention_mask)
        return out

    def auxiliary_loss(self) -> Tensor:
        """Return the auxiliary loss of the last forward pass, the same number on each process."""
        return self.module.auxiliary_loss()

    def sum_gradients(self) -> None:
        """Replace gradients of what attentions learn for all heads by sums over the processes."""
        parameters = [p for block in self._blocks() for p in block.mixer.parameters()]
        sum_gradients(parameters, self._group)

    def init_state(self, batch: int = 1) -> ModelState:
        """Return the state of this process's heads; see ``Backbone.init_state``."""
        return self.module.init_state(batch)

    def step(self, *arguments: Any, **settings: Any) -> tuple[Tensor, ModelState]:
        """Run the next tokens on every process; see ``Backbone.step``."""
        return self.module.step(*arguments, **settings)

    def generate(self, *arguments: Any, **settings: Any) -> tuple[Tensor, ModelState]:
        """Continue sequences on every process; see ``Backbone.generate``.

        Where tokens are drawn, the generators of all processes must be in the same state.
        """
        return self.module.generate(*arguments, **settings)

    def clip_gradients(self, most: float) -> Tensor:
        """Scale the gradients so that the norm of the whole model's is at most so large.

        Call it after :meth:`sum_gradients`. A process sees a part of the gradient only.

        Args:
            most: largest norm; infinity only measures.

        Returns:
            The norm before, a scalar, the same on every process.
        """
        narrow = {id(weight) for block in self._blocks() for weight in _weights(block).values()}
        squares = torch.zeros(2, device=self.module.embed.weight.device)
        grads = []
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                grads.append(parameter.grad)
                squares[int(id(parameter) in narrow)] += parameter.grad.square().sum()
        apart = self._group.size > 1
        norm = (squares[0] + (self._group.total(squares[1]) if apart else squares[1])).sqrt()
        factor = (most / (norm + 1e-6)).clamp_max(1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
        return norm

    def whole_state_dict(self) -> dict[str, Tensor]:
        """Return the state of the whole model on every process, to save it or load it elsewhere."""
        state: dict[str, Tensor] = self.module.state_dict()
        if self._group.size == 1:
            return state
        for number, block in enumerate(self._blocks()):
            for name, weight in _weights(block).items():
                parts = [torch.empty_like(weight) for _ in range(self._group.size)]
                dist.all_gather(parts, weight.detach().contiguous(), group=self._group.handle)
                state[f"layers.{number}.{name}.weight"] = _joined(parts, *_sections(block)[name])
        return state

    def _blocks(self) -> Iterator[Block]:
        for block in self.module.layers:
            assert isinstance(block, Block)
            yield block

    def _share_draws(self) -> None:
        """Give attentions without a key of their draws one that all processes have."""
        attentions = [x for x in self.module.modules() if isinstance(x, BaseAttention)]
        ours = {id(key) for key in self._keys}
        unkeyed = [x for x in attentions if x.draw_key is None or id(x.draw_key) in ours]
        device = self.module.embed.weight.device
        words = torch.randint(1 << 62, (len(unkeyed),)).tolist()
        words = self._group.gather(words, device)[0]
        self._keys = [DrawKey(torch.tensor(word, device=device), None) for word in words]
        for attention, key in zip(unkeyed, self._keys, strict=True):
            attention.draw_key = key


def _check(block: Block, ranks: int) -> None:
    """Refuse widths that so many processes do not divide."""
    for name, count in (
        ("num_heads", block.H),
        ("num_kv_heads", block.G),
        ("the inner width", block.down.in_features),
    ):
        if count % ranks:
            raise ValueError(f"{name} = {count}: must be a multiple of the {ranks} ranks")


def _weights(block: Block) -> dict[str, Tensor]:
    """Return the weights that are spread, by the name of their module."""
    return {name: getattr(block, name).weight for name in ("qkv", "out", "up", "down")}


def _sections(block: Block) -> dict[str, tuple[int, list[int]]]:
    """Return for each of them the dimension that is spread, and the sections of it.

    Each section is spread by itself: queries, keys and values; gate and values.
    """
    H, G, D, inner = block.H, block.G, block.D, block.down.in_features
    return {
        "qkv": (0, [H * D, G * D, G * D]),
        "out": (1, [H * D]),
        "up": (0, [inner, inner]),
        "down": (1, [inner]),
    }


def _narrow(block: Block, group: Group) -> None:
    """Keep this process's part of a block, and make its two halves sums over the processes."""
    sections = _sections(block)
    for name, weight in _weights(block).items():
        dim, sizes = sections[name]
        parts = weight.detach().split(sizes, dim)
        mine = torch.cat([x.chunk(group.size, dim)[group.rank] for x in parts], dim)
        linear = nn.Linear(mine.shape[1], mine.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(mine, weight.requires_grad)
        setattr(block, name, linear)
    block.H, block.G = block.H // group.size, block.G // group.size
    for norm in (block.norm1, block.norm2):  # every process needs the gradient of all
        norm.register_forward_hook(lambda _module, _inputs, out: group.copied(out))
    for last in (block.out, block.down):
        last.register_forward_hook(lambda _module, _inputs, out: group.total(out))


def _joined(parts: list[Tensor], dim: int, sizes: list[int]) -> Tensor:
    """Return the whole weight of all processes' parts, each of sections of these sizes."""
    sections = zip(*(part.split(sizes, dim) for part in parts), strict=True)
    return torch.cat([torch.cat(section, dim) for section in sections], dim)
