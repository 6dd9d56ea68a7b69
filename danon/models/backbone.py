"""One transformer for every attention: the mixer is injected, nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention.base import BaseAttention
from danon.config import AttentionConfig, ConfigError

__all__ = ["Backbone", "Task"]

Task = Literal["encoder", "lm", "classifier"]


class Backbone(nn.Module):
    """Pre-norm transformer: RMS norm, rotary positions, the given attention, SwiGLU.

    Args:
        config: widths, depth, vocabulary.
        mixer: called once per layer; returns its attention.
        task: ``encoder`` returns hidden states, ``lm`` next-token logits with the embedding as
            output matrix, ``classifier`` logits from the mean over unmasked tokens.
        num_classes: outputs of the classifier.
    """

    def __init__(
        self, config: AttentionConfig, mixer: Callable[[], BaseAttention],
        task: Task = "encoder", num_classes: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        if task not in get_args(Task):
            raise ConfigError(f"task = {task!r}: must be one of {', '.join(get_args(Task))}")
        if task == "lm" and not config.is_causal:
            raise ConfigError("task = 'lm' predicts the next token: the config must be causal")
        if num_classes < 2:
            raise ConfigError(f"num_classes = {num_classes}: must be at least 2")
        self.config, self.task = config, task
        self.gradient_checkpointing = config.gradient_checkpointing
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer()) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        if task == "classifier":
            self.head = nn.Linear(config.hidden_size, num_classes)
        nn.init.normal_(self.embed.weight, std=0.02)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = enabled

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            input_ids: (B, N) integers below ``vocab_size``.
            attention_mask: (B, N), nonzero for real tokens; None if all are.

        Returns:
            encoder: (B, N, hidden_size); lm: (B, N, vocab_size); classifier: (B, num_classes).
        """
        self._check(input_ids, attention_mask)
        x = self.embed(input_ids)
        rotary = _rotary(input_ids.shape[1], self.config.head_dim, x)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, attention_mask, use_reentrant=False)
            else:
                x = layer(x, rotary, attention_mask)
        x = self.norm(x)
        if self.task == "lm":
            return F.linear(x, self.embed.weight)
        if self.task == "classifier":
            ones = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
            weight = ones.to(x.dtype)[..., None]
            x = (x * weight).sum(1) / weight.sum(1).clamp_min(1)
            return self.head(x)  # type: ignore[no-any-return]
        return x  # type: ignore[no-any-return]

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: must be (B, N), N >= 1"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids is {input_ids.dtype}: must be torch.int64 or torch.int32")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}: must be in "
                f"[0, vocab_size = {self.config.vocab_size})"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: must be that of "
                f"input_ids, {tuple(input_ids.shape)}"
            )


class Block(nn.Module):
    """Attention and a gated feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: AttentionConfig, mixer: BaseAttention) -> None:
        super().__init__()
        width, self.D = config.hidden_size, config.head_dim
        self.H, self.G = config.num_heads, config.kv_heads
        inner = 64 * round(width * 8 / 3 / 64) or 64
        self.mixer = mixer
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (self.H + 2 * self.G) * self.D, bias=False)
        self.out = nn.Linear(self.H * self.D, width, bias=False)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x, rotary)
        mixed = self.mixer(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream (B, N, width) -> rotated q (B, H, N, D), rotated k and v (B, G, N, D)."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.D)).transpose(1, 2)
        q, k, v = heads.split((self.H, self.G, self.G), 1)
        return _rotate(q, rotary), _rotate(k, rotary), v


def _rotary(n: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, D/2) of rotary position encoding."""
    half = 10000.0 ** (-torch.arange(dim // 2, device=like.device, dtype=torch.float64) * 2 / dim)
    angle = torch.arange(n, device=like.device, dtype=torch.float64)[:, None] * half
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (r.to(x.dtype) for r in rotary)  # under autocast x is narrower
    a, b, rest = x.split((cos.shape[-1], cos.shape[-1], x.shape[-1] % 2), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
