"""The parameters of MSRA, and what its whole and its streamed form share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention.head_share import HeadShare, narrowed
from danon.attention.kernels.base import HIDDEN
from danon.attention.msra.levels import far_rects
from danon.attention.pooling import ImportancePool, by_pieces, sinusoid, soft_cap
from danon.attention.streaming import StreamingAttention
from danon.attention.union.op import BranchCall, Source, union
from danon.attention.union.tiles import NEAR, batch, near_rects
from danon.config import MSRAConfig

__all__ = ["MSRABase"]


class MSRABase(StreamingAttention):
    """Parameters, pooled nodes, and the union over them."""

    cfg: MSRAConfig

    def __init__(self, config: MSRAConfig) -> None:
        """Build the learned parts.

        Args:
            config: the configuration.
        """
        super().__init__()
        self.setup_attention(config)
        self.cfg = config
        self.rate, self.width = config.level_rate, config.level_width
        D, levels, hidden = config.head_dim, config.num_levels, 16
        self.description = (
            f"window {config.window} + pyramid of rate {self.rate} + {config.global_tokens} sinks"
        )
        self.pool = ImportancePool(D, self.rate, levels, config.stability_factor)
        self.pe_gain = nn.Parameter(torch.zeros(levels))
        if config.feature_fusion == "adaptive":
            bound = D**-0.5
            self.fuse_h = nn.Parameter(torch.empty(hidden, D).uniform_(-bound, bound))
            self.fuse_x = nn.Parameter(torch.empty(levels + 1, hidden).uniform_(-bound, bound))
            self.fuse_v = nn.Parameter(torch.zeros(hidden))

    def take_heads(self, share: HeadShare) -> None:
        """Compute only some of the heads; see :meth:`BaseAttention.take_heads`."""
        self.config = self.cfg = narrowed(self.cfg, share.parts)
        self.head_share = share

    def attend(
        self, q: Tensor, start: int, sources: list[Source], sinks: int, first: list[int]
    ) -> Tensor:
        """Compute the union for queries [start, start + n).

        Args:
            q: (X, n, D).
            start: place of the first query.
            sources: tokens, then the nodes of each level.
            sinks: which source holds the first tokens.
            first: the token or node that row 0 of each source is.
        """
        c, stop = self.cfg, start + q.shape[1]
        levels = far_rects(
            stop, c.window, self.width, self.rate, c.global_tokens, c.is_causal, start
        )
        weighed = bool(levels) and c.feature_fusion == "adaptive"
        shifts = list(self.scale_weights(q)) if weighed else []
        near = near_rects(stop, c.window, c.global_tokens, c.is_causal, start)
        calls = [
            BranchCall(source, qt, kt, causal=causal, branch=branch)
            for source, branch, part in zip((sinks, 0, 0, 0), NEAR, near, strict=True)
            for qt, kt, causal in batch(part, start, first[source])
        ]
        for level, sides in enumerate(levels, 1):
            shift = min(level, c.num_levels) - 1 if shifts else None
            # Where every visible node is whole its log(mass) is one number for the whole level.
            offset = level * math.log(self.rate) if sources[level].bias is None else 0.0
            calls += [
                BranchCall(level, qt, kt, offset=offset, shift=shift, branch=f"level {level}")
                for side in sides
                for qt, kt, _ in batch(side, start, first[level])
            ]
        out, _ = union(q, sources, calls, shifts, scale=c.head_dim**-0.5, kernel=c.kernel)
        return out

    def scale_weights(self, q: Tensor) -> Tensor:
        """Return log w_l - log w_0 of each query for every scale: (scales, X, N).

        Only differences matter to the softmax. Taken against level 0 they need no gradient of its
        logits, which is a sum that nearly cancels.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        w_h, w_x, out = (x.to(wide) for x in (self.fuse_h, self.fuse_x, self.fuse_v))

        def scores(a: int, z: int) -> Tensor:
            hidden = F.linear(q[:, a:z].to(wide), w_h)
            beta = torch.stack([torch.tanh(hidden + x) @ out for x in w_x], -1)
            return soft_cap(beta, self.cfg.stability_factor)

        beta = by_pieces(scores, q)
        return (beta[..., 1:] - beta[..., :1]).movedim(-1, 0).contiguous()

    def _nodes(self, k: Tensor, v: Tensor, seen: Tensor | None, levels: int) -> list[Source]:
        if self.cfg.memory_efficient and torch.is_grad_enabled():
            flat = checkpoint(self._pyramid, k, v, seen, levels, use_reentrant=False)
        else:
            flat = self._pyramid(k, v, seen, levels)
        return [Source(*flat[i : i + 3]) for i in range(0, len(flat), 3)]

    def _pyramid(self, k: Tensor, v: Tensor, seen: Tensor | None, levels: int) -> list[Any]:
        """Return key, value and log(mass) of the nodes of each level, one after the other.

        log(mass) is None if all visible nodes are whole, as in the causal case.
        """
        c, dtype = self.cfg, k.dtype
        wide = torch.promote_types(dtype, torch.float32)
        k, v = k[:, c.global_tokens :], v[:, c.global_tokens :]
        mass = None
        if seen is not None:
            mass = seen[:, c.global_tokens :].to(wide)
        elif not c.is_causal:
            mass = torch.ones(k.shape[:2], dtype=wide, device=k.device)
        square = self.square(k)
        flat: list[Any] = []
        for level in range(levels):
            k, v, square, mass, node = self.parents(k, v, square, mass, level)
            log_mass = None
            if mass is not None:
                log_mass = torch.where(mass > 0, mass.clamp_min(1).log(), HIDDEN)
            flat += [node.to(dtype), v.to(dtype), log_mass]
        return flat

    def square(self, k: Tensor) -> Tensor | None:
        """Return squared lengths (X, n, 1) of keys, where calibration needs them."""
        if not self.cfg.calibration_factor:
            return None
        return k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1, keepdim=True)

    def parents(
        self,
        k: Tensor,
        v: Tensor,
        square: Tensor | None,
        mass: Tensor | None,
        level: int,
        first: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Pool the next level: mean keys, values, squared lengths, masses, attended keys.

        Args:
            k: children's mean keys (X, n, D).
            v: children's mean values (X, n, D).
            square: children's mean squared lengths (X, n, 1), or None.
            mass: real tokens under each child (X, n); None if all are whole.
            level: of the children; tokens are level 0.
            first: number of the first node.
        """
        weight, mass = self.pool.weights(k, v, level, mass)
        k, v = self.pool.reduce(weight, k), self.pool.reduce(weight, v)
        square = None if square is None else self.pool.reduce(weight, square)
        return k, v, square, mass, self.attended(k, square, level, first)

    def attended(self, k: Tensor, square: Tensor | None, level: int, first: int = 0) -> Tensor:
        """Return the keys that queries see of nodes (X, n, D).

        Args:
            k: mean keys (X, n, D).
            square: mean squared lengths (X, n, 1), or None.
            level: of the nodes' children.
            first: number of the first node.
        """
        c, node = self.cfg, k
        if square is not None:
            stretch = square / k.square().sum(-1, keepdim=True).clamp_min(1e-20)
            node = node * stretch.clamp_min(1.0) ** (c.calibration_factor / 2)
        position = torch.arange(first, first + k.shape[1], device=k.device)
        pe = sinusoid(position, k.shape[-1]).to(k.dtype)
        return node + self.pe_gain[min(level, c.num_levels - 1)] * pe
