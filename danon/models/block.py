"""A block of the backbone: attention and a gated feed-forward network, with rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention.base import BaseAttention
from danon.attention.sequence_shard import SequenceShard
from danon.attention.stream_state import StreamState
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig

__all__ = ["Block", "rotary_angles", "rotate"]


class Block(nn.Module):
    """Attention and a gated feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: AttentionConfig, mixer: BaseAttention) -> None:
        """Build norms and projections around an attention.

        Args:
            config: widths.
            mixer: the attention.
        """
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

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        shard: SequenceShard | None = None,
    ) -> Tensor:
        """Run attention and feed-forward.

        Args:
            x: residual stream (B, N, width).
            rotary: cosines and sines of :func:`rotary_angles`.
            mask: padding (B, N) or None.
            shard: which tokens of their sequences these are, with the mask in it; None: all.

        Returns:
            Residual stream (B, N, width).
        """
        q, k, v = self.project(x, rotary)
        if shard is not None:
            return self.mix(x, self.mixer.attend_shard(q, k, v, shard))
        return self.mix(x, self.mixer(q, k, v, mask))

    def step(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], state: StreamState, mask: Tensor | None
    ) -> tuple[Tensor, StreamState]:
        """Run attention and feed-forward on the next tokens.

        Args:
            x: residual stream (B, n, width).
            rotary: cosines and sines of :func:`rotary_angles`.
            state: of the attention.
            mask: real tokens (B, n), or None.

        Returns:
            Residual stream (B, n, width), and the new state.
        """
        # Under autocast they are narrower than the state, which goes on outside of it as well.
        q, k, v = (y.to(state.dtype) for y in self.project(x, rotary))
        mixed, new = self.streaming().step(q, k, v, state, mask)
        return self.mix(x, mixed), new

    def streaming(self) -> StreamingAttention:
        """Return the mixer, if it can stream.

        Raises:
            ValueError: it cannot.
        """
        if not isinstance(self.mixer, StreamingAttention):
            raise ValueError(f"{type(self.mixer).__name__} cannot be fed in chunks")
        return self.mixer

    def mix(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add attention and feed-forward to the residual stream.

        Args:
            x: residual stream (B, N, width).
            mixed: attention output (B, H, N, D).
        """
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Project the residual stream to rotated q (B, H, N, D), rotated k and v (B, G, N, D).

        Args:
            x: residual stream (B, N, width).
            rotary: cosines and sines of :func:`rotary_angles`.
        """
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.D)).transpose(1, 2)
        q, k, v = heads.split((self.H, self.G, self.G), 1)
        return rotate(q, rotary), rotate(k, rotary), v


def rotary_angles(
    positions: Tensor, config: AttentionConfig, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary encoding.

    Args:
        positions: (n,) or (B, n).
        config: head width and ``rope_theta``.
        like: of the dtype and on the device wanted.

    Returns:
        Two tensors, (n, D/2) or (B, 1, n, D/2).
    """
    pair = torch.arange(config.head_dim // 2, device=like.device, dtype=torch.float64)
    half = config.rope_theta ** (-pair * 2 / config.head_dim)
    angle = positions.double()[..., None] * half
    angle = angle[:, None] if angle.dim() == 3 else angle
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads by their positions.

    Args:
        x: (B, H, N, D).
        rotary: cosines and sines of :func:`rotary_angles`.
    """
    cos, sin = (r.to(x.dtype) for r in rotary)  # under autocast x is narrower
    a, b, rest = x.split((cos.shape[-1], cos.shape[-1], x.shape[-1] % 2), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
