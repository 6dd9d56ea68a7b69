"""One transformer for every attention: the mixer is injected, nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention.base import BaseAttention, check_mask
from danon.attention.padding import Compaction
from danon.attention.sequence_shard import SequenceShard
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.config import AttentionConfig, ConfigError
from danon.models.block import Block, rotary_angles
from danon.models.performance_monitor import (
    PerformanceStats,
    get_performance_stats,
    performance_monitor,
)
from danon.models.state import ModelState

__all__ = ["Backbone", "Task"]

Task = Literal["encoder", "lm", "classifier"]
PREFILL = 4096
"""Tokens of a prompt that generate() reads at once; bounds its memory."""


class Backbone(nn.Module):
    """Pre-norm transformer: RMS norm, rotary positions, the given attention, SwiGLU.

    Args:
        config: widths, depth, vocabulary.
        mixer: called once per layer; returns its attention.
        task: ``encoder`` returns hidden states, ``lm`` next-token logits with the embedding as
            output matrix, ``classifier`` logits from the mean over unmasked tokens.
        num_classes: outputs of the classifier.

    Example::

        >>> import torch
        >>> from danon import DALA
        >>> from danon.config import DALAConfig
        >>> from danon.models import Backbone
        >>> config = DALAConfig(hidden_size=64, num_layers=2, vocab_size=100, causal=True)
        >>> model = Backbone(config, lambda: DALA(config), task="lm")
        >>> model(torch.randint(100, (1, 50))).shape
        torch.Size([1, 50, 100])

    Raises:
        ConfigError: an unknown task, a language model that is not causal, or too few classes.
    """

    def __init__(
        self,
        config: AttentionConfig,
        mixer: Callable[[], BaseAttention],
        task: Task = "encoder",
        num_classes: int = 2,
    ) -> None:
        """Build embedding, blocks and head."""
        super().__init__()
        if task not in get_args(Task):
            raise ConfigError(f"task = {task!r}: must be one of {', '.join(get_args(Task))}")
        if task == "lm" and not config.is_causal:
            raise ConfigError("task = 'lm' predicts the next token: the config must be causal")
        if num_classes < 2:
            raise ConfigError(f"num_classes = {num_classes}: must be at least 2")
        self.config, self.task = config, task
        self.gradient_checkpointing = config.gradient_checkpointing
        self.performance: PerformanceStats | None = None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer()) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        if task == "classifier":
            self.head = nn.Linear(config.hidden_size, num_classes)
        nn.init.normal_(self.embed.weight, std=0.02)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Args:
            enabled: False: keep the activations again.
        """
        self.gradient_checkpointing = enabled

    def performance_monitor(self) -> AbstractContextManager[None]:
        """Measure what runs inside the ``with``; see :func:`danon.models.performance_monitor`."""
        return performance_monitor(self)

    def get_performance_stats(self) -> PerformanceStats:
        """Return the figures of the last :meth:`performance_monitor`.

        Raises:
            ValueError: there was none, or the model did not run inside it.
        """
        return get_performance_stats(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shard: SequenceShard | None = None,
    ) -> Tensor:
        """Run the model.

        Args:
            input_ids: (B, N) integers below ``vocab_size``.
            attention_mask: (B, N), 1 or True for real tokens, 0 or False for padding, which may
                stand anywhere and is no part of its sequence; None if all are real.
            shard: which tokens of their sequences these are, with padding at the end of the
                sequences only; None: all. See :mod:`danon.distributed.sequence_parallel`.

        Returns:
            encoder: (B, N, hidden_size); lm: (B, N, vocab_size); classifier: (B, num_classes).
            Hidden states and logits of padding are zeros.
        """
        self.check_inputs(input_ids, attention_mask)
        x, real = self.embed(input_ids), None
        moved = None if attention_mask is None else Compaction.of(attention_mask)
        if moved is not None:  # once here rather than in every layer
            x, real = moved.compact(x), moved.real
        first = 0 if shard is None else shard.start
        positions = torch.arange(first, first + input_ids.shape[1], device=x.device)
        rotary = rotary_angles(positions, self.config, x)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, real, shard, use_reentrant=False)
            else:
                x = layer(x, rotary, real, shard)
        x = self.norm(x)
        if self.task == "classifier":
            if real is None:
                return self.head(x.mean(1))  # type: ignore[no-any-return]
            x = x.sum(1) / real.sum(1, keepdim=True).clamp_min(1)  # padding is zeros
            return self.head(x)  # type: ignore[no-any-return]
        x = x if moved is None else moved.expand(x)
        return F.linear(x, self.embed.weight) if self.task == "lm" else x

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the layers' auxiliary losses of the last forward pass.

        Read it before the backward pass, and add it to the loss.

        Returns:
            A scalar, the sum of :meth:`BaseAttention.auxiliary_loss`, weighted as configured; zero
            where there is none.
        """
        weight = self.embed.weight  # sharded, its new_zeros would make a sharded scalar
        total = torch.zeros((), dtype=weight.dtype, device=weight.device)
        for layer in self._blocks():
            total = total + layer.mixer.auxiliary_loss().to(total)
        return total

    def init_state(self, batch: int = 1) -> ModelState:
        """Return the state before the first token.

        Args:
            batch: sequences, of whatever lengths.

        Raises:
            ValueError: a mixer that cannot stream or is not causal, or a batch below 1.
        """
        _require(_is_integer(batch, 1), "batch", batch, "an integer >= 1")
        return ModelState(
            tuple(
                layer.streaming().init_state(
                    batch, dtype=self.embed.weight.dtype, device=self.embed.weight.device
                )
                for layer in self._blocks()
            )
        )

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, state: ModelState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Run the model on the next tokens of each sequence, for inference.

        Args:
            input_ids: (B, n), n >= 1.
            state: from :meth:`init_state` or a step before; it is left as it is.
            attention_mask: (B, n), as in ``forward``: 1 or True for tokens that there are.

        Returns:
            What ``forward`` gives for these tokens (``encoder`` and ``lm``), and the new state.

        Raises:
            ValueError: wrong input, or a state of another model or batch.
        """
        x, state = self._step(input_ids, state, attention_mask)
        return (F.linear(x, self.embed.weight) if self.task == "lm" else x), state

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Continue sequences, one token at a time.

        Args:
            input_ids: (B, n) what comes before the new tokens, and after the state.
            max_new_tokens: at least 1.
            state: what has been read before; None for nothing.
            attention_mask: (B, n), nonzero for tokens that there are; padding on either side.
            temperature: 0 takes the likeliest token, otherwise tokens are drawn.
            top_k: draw from the k likeliest only, at least 1.
            eos_token_id: a token, or several, each of which ends its sequence; this is then filled
                up with it.
            generator: of the draws; on the device of the model.

        Returns:
            New tokens (B, up to max_new_tokens), and the state before the last of them.

        Raises:
            ValueError: a model that is no language model, or an argument of the wrong type or out
                of range; names it, its value and what is allowed.
        """
        if self.task != "lm":
            raise ValueError(f"task = {self.task!r}: only an 'lm' generates")
        ends, device = self._ends(eos_token_id), self.embed.weight.device.type
        drawn = generator is None or _is_generator(generator, device)
        for ok, name, value, allowed in (
            (_is_integer(max_new_tokens, 1), "max_new_tokens", max_new_tokens, "an integer >= 1"),
            (_is_finite(temperature, 0), "temperature", temperature, "a finite number >= 0"),
            (top_k is None or _is_integer(top_k, 1), "top_k", top_k, "an integer >= 1 or None"),
            (drawn, "generator", generator, f"a torch.Generator on {device} or None"),
        ):
            _require(ok, name, value, allowed)
        self.check_inputs(input_ids, attention_mask)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
        if not bool(real.any(1).all()):
            raise ValueError("attention_mask has a row without a token: nothing to go on from")
        state = self.init_state(len(input_ids)) if state is None else state
        last = input_ids.new_zeros(len(input_ids), self.config.hidden_size, dtype=torch.float32)
        for ids, here in zip(
            input_ids.split(PREFILL, 1), (real != 0).split(PREFILL, 1), strict=True
        ):
            x, state = self._step(ids, state, None if attention_mask is None else here)
            end = here.long().cumsum(1).argmax(1)  # of the real tokens in this piece
            newest = x[torch.arange(len(x), device=x.device), end].to(last.dtype)
            last = torch.where(here.any(1, keepdim=True), newest, last)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens: list[Tensor] = []
        while True:
            logits = F.linear(last.to(self.embed.weight.dtype), self.embed.weight)
            token = _draw(logits, temperature, top_k, generator)
            if ends is not None:
                token = torch.where(ended, tokens[-1], token) if tokens else token
                ended = ended | torch.isin(token, ends)
            tokens.append(token)
            if len(tokens) == max_new_tokens or bool(ended.all()):
                return torch.stack(tokens, 1), state
            here = None if ends is None else ~ended[:, None]
            x, state = self._step(token[:, None], state, here)
            last = x[:, 0]

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> Tensor | None:
        """Return the tokens that end a sequence (n,) int64, or None for none."""
        if eos_token_id is None:
            return None
        given = eos_token_id if isinstance(eos_token_id, Sequence) else (eos_token_id,)
        size = self.config.vocab_size
        allowed = f"an integer in [0, vocab_size = {size}), a sequence of them, or None"
        valid = [_is_integer(token, 0) and token < size for token in given]
        _require(bool(valid) and all(valid), "eos_token_id", eos_token_id, allowed)
        return torch.tensor(given, dtype=torch.int64, device=self.embed.weight.device)

    def _step(
        self, input_ids: Tensor, state: ModelState, attention_mask: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Return normalised hidden states (B, n, width) of the next tokens."""
        if self.task == "classifier":
            raise ValueError("task = 'classifier': it reads whole sequences, call the model")
        self.check_inputs(input_ids, attention_mask)
        if not isinstance(state, ModelState):
            raise ValueError(f"state is a {type(state).__name__}: must be what init_state returns")
        if len(state.layers) != len(self.layers):
            raise ValueError(
                f"state has {len(state.layers)} layers: must have {len(self.layers)} like the model"
            )
        if len(state.lengths) != len(input_ids):
            raise ValueError(
                f"input_ids has batch {len(input_ids)}: must be {len(state.lengths)} like the state"
            )
        x = self.embed(input_ids)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            attention_mask = real = attention_mask != 0
            x = torch.where(real[..., None], x, 0.0)
        seen = torch.tensor(state.lengths, device=x.device)[:, None]
        rotary = rotary_angles(seen + real.cumsum(1) - 1, self.config, x)
        states = []
        for layer, old in zip(self._blocks(), state.layers, strict=True):
            x, new = layer.step(x, rotary, old, attention_mask)
            states.append(new)
        return self.norm(x), ModelState(tuple(states))

    def _blocks(self) -> Iterator[Block]:
        """Yield the blocks in order."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            yield layer

    def check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Refuse wrong inputs.

        Args:
            input_ids: as in :meth:`forward`.
            attention_mask: as in :meth:`forward`.

        Raises:
            ValueError: names the tensor, what it is and what is allowed.
        """
        if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(input_ids):
            refuse_transforms()  # its values cannot be checked
        refuse_meta("input_ids", input_ids)
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: must be (B, N), B and N >= 1"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids is {input_ids.dtype}: must be torch.int64 or torch.int32")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: must be that of "
                f"input_ids, {tuple(input_ids.shape)}"
            )
        if attention_mask is not None:
            if attention_mask.device != input_ids.device:
                raise ValueError(
                    f"attention_mask is on {attention_mask.device}: must be on {input_ids.device} "
                    "like input_ids"
                )
            check_mask("attention_mask", attention_mask)
        if torch.compiler.is_compiling():  # values are not known yet; the embedding checks them
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}: must be in "
                f"[0, vocab_size = {self.config.vocab_size})"
            )


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row of logits (B, vocabulary)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # float64, from the largest down: a tiny temperature makes -inf of the others, never NaN.
    wide = logits.double()
    chance = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    return torch.multinomial(chance.float(), 1, generator=generator)[:, 0]


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise a ValueError that names an argument, its value and what is allowed, unless ok."""
    if not ok:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def _is_integer(value: object, least: int) -> bool:
    """Return True for an integer >= least, also NumPy's; True and False are none."""
    whole = not isinstance(value, bool) and isinstance(value, Integral)
    return whole and int(value) >= least  # type: ignore[call-overload]


def _is_finite(value: object, least: float) -> bool:
    """Return True for a finite number >= least."""
    number = not isinstance(value, bool) and isinstance(value, Real)
    return number and least <= float(value) < math.inf  # type: ignore[arg-type]


def _is_generator(value: object, device: str) -> bool:
    """Return True for a generator on that type of device."""
    return isinstance(value, torch.Generator) and value.device.type == device
