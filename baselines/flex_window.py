"""The same window and sinks as :mod:`baselines.window`, by FlexAttention."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from baselines._bridging import expand_heads, quiet_import
from baselines._oracles import Band
from baselines.window import Window
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["FlexWindow"]

BLOCK = 128
NO_BACKWARD = "FlexAttention has no backward on CPU"
MASK_TOKENS = 4096
GRAPHS = 64  # dtypes, directions, padding and gradient modes that one process may need


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    with quiet_import():
        importlib.import_module("torch._inductor.compile_fx")
    # One graph for every length. fullgraph: an error, never the dense eager path.
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=True)

    def call(q: Tensor, k: Tensor, v: Tensor, plan: BlockMask) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            out: Tensor = compiled(q, k, v, block_mask=plan)
        return out

    return call


@register("flex-window")
class FlexWindow(Window):
    """``torch.compile(flex_attention)`` with a block mask made from the band, not from N x N.

    The first call in a process compiles (half a minute, seconds when torch's cache is warm), the
    first one with padding once more; other lengths reuse the graph.
    """

    streams: ClassVar[bool] = False
    description = "exact window 512 + 64 sinks (bidirectional: 512 on both sides), FlexAttention"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.device.type != "cpu":
            return self._attend(q, k, v, mask)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise NotImplementedError(NO_BACKWARD)
        with torch.no_grad():  # gradient mode would be compiled separately
            return self._attend(q, k, v, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        N = q.shape[2]
        # Whole blocks, and two at least: torch compiles a kernel of its own for a single one.
        tail = max(-N % BLOCK, 2 * BLOCK - N)
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        q, k, v = (pad(x, (0, 0, 0, tail)) for x in (q, k, v))
        if mask is None and tail and not self.config.is_causal:
            mask = q.new_ones(q.shape[0], N, dtype=torch.bool)  # hides the tail
        if mask is None:
            out = _compiled()(q, k, v, _unpadded(self.band, N + tail, q.device))
            return out[:, :, :N]
        real = pad(mask, (0, tail))
        out = _compiled()(q, k, v, _block_mask(self.band, N + tail, q.device, real))
        return out[:, :, :N].masked_fill(self.band.sees_only_padding(mask)[:, None, :, None], 0.0)

    @classmethod
    def limit(
        cls,
        shape: AttentionConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        if device.type == "cuda":
            triton = importlib.util.find_spec("triton")
            return None if triton else "triton is not installed: FlexAttention compiles to it"
        if backward:
            return NO_BACKWARD
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "no C++ compiler (g++ or $CXX): FlexAttention compiles to it on CPU"
        return None


@functools.lru_cache(maxsize=4)
def _unpadded(band: Band, length: int, device: torch.device) -> BlockMask:
    return _block_mask(band, length, device, None)


def _block_mask(band: Band, length: int, device: torch.device, real: Tensor | None) -> BlockMask:
    """Return the blocks of keys that a block of queries sees in part and in full.

    ``create_block_mask`` would evaluate the band at all N x N pairs first.
    """
    block = torch.arange(length // BLOCK, device=device)
    apart = (block[:, None] - block) * BLOCK  # query minus key position, first tokens
    low, high = apart - (BLOCK - 1), apart + (BLOCK - 1)
    partly = (low <= band.back) & (high >= -band.ahead) | (block * BLOCK < band.sinks)
    full = (high <= band.back) & (low >= -band.ahead) | ((block + 1) * BLOCK <= band.sinks)
    if band.causal:
        partly, full = partly & (high >= 0), full & (low >= 0)
    if real is None:

        def visible(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
            return band(row, col)
    else:
        full = torch.zeros_like(full)
        # Inductor's CPU template does not compile a captured tensor of symbolic size: the mask has
        # one of a few fixed sizes instead.
        size = MASK_TOKENS
        while size < length:
            size *= 4
        real = pad(real, (0, size - length))
        torch._dynamo.mark_static(real)

        def visible(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
            return band(row, col) & real[b, col]

    return BlockMask.from_kv_blocks(
        *_sorted_blocks(partly & ~full),
        *_sorted_blocks(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _sorted_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks in each row of (n, n), and their indices first.

    Returns:
        (1, 1, n) and (1, 1, n, n) int32.
    """
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
