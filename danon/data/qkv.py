"""Queries, keys and values from real text: Python's own standard library, read as bytes.

The bytes go through a small dense transformer with fixed random weights, in chunks of 512 tokens.
The projections of one more layer give q, k, v, with rotary positions over the whole sequence. So
neighbours resemble each other and repeated text matches itself, unlike in noise.

Shapes: q, k, v (B, H, N, D).
"""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["text_bytes", "text_qkv"]

CHUNK = 512
CHUNKS_TOGETHER = 64
"""Chunks of one call of the transformer: a million tokens at once would take gigabytes."""

LOGIT_STD = 2.0
"""Standard deviation of q.k / sqrt(D), about that of trained models."""
Triple = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def _corpus(length: int) -> bytes:
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= length:
            return bytes(text[:length])
    raise ValueError(f"length = {length}: the standard library has {len(text)} bytes of source")


def text_bytes(batch: int, length: int) -> Tensor:
    """Return consecutive text as bytes, (batch, length) int64."""
    flat = torch.frombuffer(bytearray(_corpus(batch * length)), dtype=torch.uint8)
    return flat.view(batch, length).long()


@lru_cache(maxsize=2)
def text_qkv(batch: int, heads: int, length: int, head_dim: int) -> Triple:
    """Return q, k, v of text, the same in every process.

    The last two shapes are cached, so callers must not write into them.

    Args:
        batch: sequences B.
        heads: heads H.
        length: tokens N.
        head_dim: width D of a head.

    Returns:
        q, k, v: (B, H, N, D) float32 on the CPU.
    """
    width = heads * head_dim
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        embed = nn.Embedding(256, width)
        layers = [
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True)
            for _ in range(2)
        ]
        weight = torch.randn(3, width, width) * width**-0.5
    weight[1] = (weight[0] + weight[1]) / 2**0.5  # keys share half of the queries' features
    future = nn.Transformer.generate_square_subsequent_mask(CHUNK)

    def encode(text: Tensor) -> Tensor:
        x = embed(text)
        for layer in layers:
            x = layer.train()(x, src_mask=future, is_causal=True)  # eval would take another path
        return F.layer_norm(x, (width,))

    with torch.no_grad():
        text = F.pad(text_bytes(batch, length), (0, -length % CHUNK)).view(-1, CHUNK)
        x = torch.cat([encode(chunks) for chunks in text.split(CHUNKS_TOGETHER)])
        x = x.view(batch, -1, width)[:, :length]

        def project(w: Tensor) -> Tensor:
            return F.linear(x, w).view(batch, length, heads, head_dim).transpose(1, 2)

        q, k = (_rotate(F.normalize(project(w), dim=-1)) for w in weight[:2])
        sample = torch.linspace(0, length - 1, min(length, 256), dtype=torch.float32).long()
        logits = q[:, :, sample] @ k[:, :, sample].transpose(-1, -2) * head_dim**-0.5
        gain = (LOGIT_STD / logits.std()).sqrt()
        return q.mul_(gain).contiguous(), k.mul_(gain).contiguous(), project(weight[2]).contiguous()


def _rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Apply rotary positions to pairs of columns."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
