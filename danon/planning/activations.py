"""The bytes of activations in a step, found by running one block on fake tensors.

All blocks of a model are equal. So one block, with embedding and output matrix where a stage has
them, shows what a block keeps for its backward pass and what it needs on top while it runs; that
many blocks and micro-batches follow (:meth:`StageMemory.peaks`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention.base import BaseAttention
from danon.models.block import Block, rotary_angles
from danon.planning.buffers import Buffers
from danon.planning.live_bytes import LiveBytes, fake_devices
from danon.planning.model_shape import ModelShape
from danon.planning.sequence_rows import attend_rows

__all__ = ["PartialModel", "StageMemory", "run_stage"]


@dataclass(frozen=True, kw_only=True)
class PartialModel:
    """The part of a model that one rank runs in a micro-batch, with one block.

    Attributes:
        shape: of the model.
        tensor: ranks that share each block.
        tokens: tokens of each sequence on this rank: all of them, or the last ones.
        rows: sequences of a micro-batch.
        checkpointing: blocks are recomputed in the backward pass.
        dtype: of the computation.
        sharded: parameters are gathered in ``dtype`` for each block, and a block's gradients leave
            it when its backward pass ends. False: they are held in float32, gradients too, and
            other dtypes compute under autocast.
        first: it has the embedding.
        last: it has the output matrix and the loss.
    """

    shape: ModelShape
    tensor: int
    tokens: int
    rows: int
    checkpointing: bool
    dtype: torch.dtype
    sharded: bool
    first: bool
    last: bool


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a micro-batch through one block, beyond parameters, gradients and optimizer.

    Attributes:
        entry: the block's input, and the angles of its positions.
        held: kept by the block from its forward to its backward pass, with its output.
        forward: most at once in the block's forward pass, beyond ``entry``.
        head: most at once from there to the block's backward pass, beyond ``entry`` and ``held``.
        backward: most at once in the block's backward pass, likewise.
        after: what lives when it has ended, in all.
        tail: most at once after that, in all.
        used: names of the block's parameters that got a gradient.
    """

    entry: int
    held: int
    forward: int
    head: int
    backward: int
    after: int
    tail: int
    used: frozenset[str]

    def peaks(self, layers: int, in_flight: int, buffers: Buffers) -> tuple[int, int]:
        """Return the most bytes of activations, and of activations and buffers together.

        Args:
            layers: blocks of the stage.
            in_flight: micro-batches that it keeps the activations of.
            buffers: by phase.
        """
        whole = self.entry + layers * self.held
        waiting = (in_flight - 1) * whole
        others = whole - self.held
        phases = [
            (others + self.forward, buffers.forward),
            (whole + self.head, buffers.head),
            (whole + self.backward, buffers.first_backward),
            (others + self.after, buffers.reduce),
            (self.tail, buffers.tail),
        ]
        if layers > 1:
            phases.append((others + self.backward, buffers.backward))
        phases = [(waiting + activations, buffer) for activations, buffer in phases]
        phases.append((0, buffers.step))
        return max(x for x, _ in phases), max(x + buffer for x, buffer in phases)


@functools.lru_cache(maxsize=256)
def run_stage(part: PartialModel) -> StageMemory:
    """Run a micro-batch through one block on fake tensors, forward and backward.

    Args:
        part: what is run.
    """
    with fake_devices(), LiveBytes() as live:
        return _Run(part, live).measure()


class _Run:
    """One micro-batch, with the bytes that live at the borders of its phases."""

    def __init__(self, part: PartialModel, live: LiveBytes) -> None:
        self.part, self.live = part, live
        shape, dtype = part.shape, part.dtype if part.sharded else torch.float32
        with _default_dtype(dtype):
            self.block = shape.block(part.tensor)
        root = torch.zeros(shape.vocab if part.first or part.last else 1, shape.width, dtype=dtype)
        self.embedding, self.norm = nn.Parameter(root), nn.Parameter(root[0].clone())
        self.ids = torch.zeros(part.rows, part.tokens, dtype=torch.int64)
        self.used: set[str] = set()
        if not part.sharded:  # else they leave with each block
            for parameter in (*self.block.parameters(), self.embedding, self.norm):
                parameter.grad = torch.zeros_like(parameter)
        for name, parameter in self.block.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._note(name))
        live.restart()
        self.base = live.now
        self.backward_began = self.backward_ended = self.tail_began = 0

    def _note(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self.used.add(name)

    def measure(self) -> StageMemory:
        part, live, base = self.part, self.live, self.base
        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if not part.sharded and part.dtype != torch.float32:
            autocast = torch.autocast("cpu", part.dtype)
        with autocast:
            x = self._input()
            positions = torch.arange(part.tokens)
            rotary = rotary_angles(positions, part.shape.config(), x)
            live.restart()
            entry = live.now - base
            live.plans = "kept" if part.checkpointing else "saved"
            y = self._block(x, rotary)
            forward, held = live.restart() - base - entry, live.now - base - entry
            extra = self.block.mixer.auxiliary_loss()
            self._keep_auxiliary_loss()
            y.register_hook(self._begin_backward)
            x.register_hook(self._end_backward)
            if part.last:
                outputs = [self._loss(y) + extra]
                upstream = [torch.ones_like(outputs[0])]
                del y
            else:
                outputs, upstream = [y], [torch.zeros_like(y)]
                if extra.requires_grad:
                    outputs.append(extra)
                    upstream.append(torch.ones_like(extra))
            if part.first:
                del x
        torch.autograd.backward(outputs, upstream)
        tail = live.restart() - base
        whole = base + entry + held
        return StageMemory(
            entry,
            held,
            forward,
            self.backward_began - whole,
            self.backward_ended - whole,
            self.tail_began - base,
            tail,
            frozenset(self.used),
        )

    def _input(self) -> Tensor:
        part = self.part
        if part.first:
            return F.embedding(self.ids, self.embedding)
        size = (part.rows, part.tokens, part.shape.width)
        dtype = part.dtype if part.sharded else torch.float32  # autocast leaves the stream as it is
        return torch.zeros(size, dtype=dtype, requires_grad=True)

    def _block(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        whole = self.part.tokens == self.part.shape.length
        run = _whole_sequence if whole else self._shared_sequence
        if self.part.checkpointing:
            out: Tensor = checkpoint(run, self.block, x, rotary, use_reentrant=False)
            return out
        return run(self.block, x, rotary)

    def _shared_sequence(self, block: Block, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Run the last rank of a sequence: its own queries, keys and values of all."""
        q, k, v = block.project(x, rotary)
        length = self.part.shape.length
        k, v = (_Gathered.apply(y, length) for y in (k, v))  # type: ignore[no-untyped-call]
        mixed = attend_rows(block.mixer, q, k, v, length - self.part.tokens)
        return block.mix(x, mixed)

    def _loss(self, y: Tensor) -> Tensor:
        """Compute the loss of the trainer."""
        x = F.rms_norm(y, (y.shape[-1],), self.norm)
        logits = F.linear(x, self.embedding)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits.flatten(0, -2), self.ids.flatten(), reduction="sum")
        loss: Tensor = total / self.ids.numel()
        return loss

    def _keep_auxiliary_loss(self) -> None:
        """Let a recomputed block keep its auxiliary loss, as it does where nothing compiles."""
        for module in self.block.modules():
            if isinstance(module, BaseAttention):
                module.set_auxiliary_loss = _ignore  # type: ignore[assignment, method-assign]

    def _begin_backward(self, _: Tensor) -> None:
        self.backward_began = self.live.restart()
        self.live.plans = "dropped" if self.part.checkpointing else "saved"

    def _end_backward(self, _: Tensor) -> None:
        self.live.kept.clear()
        self.backward_ended, self.tail_began = self.live.restart(), self.live.now
        if self.part.sharded:
            for parameter in self.block.parameters():
                parameter.grad = None
            self.live.restart()


def _ignore(_: Tensor | None) -> None:
    """Do nothing with an auxiliary loss."""


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters in a dtype; the fake ones cannot change theirs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _whole_sequence(block: Block, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = block(x, rotary, None)
    return out


class _Gathered(torch.autograd.Function):
    """Keys or values of all ranks of a sequence; the backward pass gives each rank its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor, length: int) -> Tensor:
        ctx.own = x.shape  # type: ignore[attr-defined]
        return x.new_empty(*x.shape[:2], length, x.shape[3])

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_empty(ctx.own), None  # type: ignore[attr-defined]
