"""A block of the backbone: attention and a gated feed-forward network, with rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention.base import BaseAttention
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig

__all__ = ["Block", "rotary_angles", "rotate"]


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
        return self.mix(x, self.mixer(q, k, v, mask))

    def streaming(self) -> StreamingAttention:
        """The mixer, if it can stream."""
        if not isinstance(self.mixer, StreamingAttention):
            raise ValueError(f"{type(self.mixer).__name__} cannot be fed in chunks")
        return self.mixer

    def mix(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residual stream (B, N, width) and attention output (B, H, N, D) -> residual stream."""
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream (B, N, width) -> rotated q (B, H, N, D), rotated k and v (B, G, N, D)."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.D)).transpose(1, 2)
        q, k, v = heads.split((self.H, self.G, self.G), 1)
        return rotate(q, rotary), rotate(k, rotary), v


def rotary_angles(
    positions: Tensor, config: AttentionConfig, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary encoding: (n,) -> (n, D/2), (B, n) -> (B, 1, n, D/2)."""
    pair = torch.arange(config.head_dim // 2, device=like.device, dtype=torch.float64)
    half = config.rope_theta ** (-pair * 2 / config.head_dim)
    angle = positions.double()[..., None] * half
    angle = angle[:, None] if angle.dim() == 3 else angle
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (r.to(x.dtype) for r in rotary)  # under autocast x is narrower
    a, b, rest = x.split((cos.shape[-1], cos.shape[-1], x.shape[-1] % 2), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
