"""MSRA, multi-scale recursive attention: recent past exact, older past in ever coarser nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import index
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention import msra_stream
from danon.attention.base import without_autocast
from danon.attention.kernels import HIDDEN, hide
from danon.attention.msra_plan import far_rects
from danon.attention.oracles.msra import entries, oracle
from danon.attention.padding import right_padded, rows_alone
from danon.attention.pooling import ImportancePool, by_pieces, sinusoid, soft_cap
from danon.attention.registry import register
from danon.attention.sight import Level, Sight, lost
from danon.attention.sizing import SINKS, largest
from danon.attention.stream import Part, StreamingAttention
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.attention.tiles import NEAR, batch, near_rects
from danon.attention.union import Call, Source, union
from danon.config import AttentionConfig, MSRAConfig
from danon.space import Float, OneOf, Space

__all__ = ["MSRA"]


@register("msra")
class MSRA(StreamingAttention):
    """Multi-scale recursive attention (seed section 1).

    A query sees, under one softmax: the first ``global_tokens`` tokens; its own block of ``window``
    tokens and the block before; and nodes of level l = 1, 2, ... that partition everything older,
    each the learned mean of ``rate`` nodes of the level below; of each level at most twice
    :attr:`~danon.config.MSRAConfig.level_width` (three times when bidirectional). A node's logit
    carries log(mass), so equal tokens under it make it exact. O(N log N) time.

    Learned: the pooling scores, the gain of the level's positional encoding on node keys (starts
    at zero), and per query and level the scale weight log w_l = log softmax_l(beta_l) with
    beta_l = v^T tanh(W_h q + W_x e_l + b), v starting at zero.
    """

    oracle_kind = "definition"

    def __init__(self, config: MSRAConfig) -> None:
        super().__init__()
        self.setup_attention(config)
        self.cfg = config
        self.rate, self.width = config.rate, config.level_width
        D, levels, hidden = config.head_dim, config.num_levels, 16
        self.semantics = (
            f"window {config.window} + pyramid of rate {self.rate} + {config.global_tokens} sinks"
        )
        self.pool = ImportancePool(D, self.rate, levels, config.stability_factor)
        self.pe_gain = nn.Parameter(torch.zeros(levels))
        if config.feature_fusion == "adaptive":
            bound = D**-0.5
            self.fuse_h = nn.Parameter(torch.empty(hidden, D).uniform_(-bound, bound))
            self.fuse_x = nn.Parameter(torch.empty(levels + 1, hidden).uniform_(-bound, bound))
            self.fuse_v = nn.Parameter(torch.zeros(hidden))

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Self:
        return cls(MSRAConfig(**shape.shared() | settings))

    @classmethod
    def search_space(cls) -> Space:
        """The rate itself: with alpha = 100 it is ``compression_factor`` at any length."""
        return Space(
            {
                "window": OneOf((128, 256, 512, 1024, 2048, 4096)),
                "compression_factor": OneOf((2, 4, 8, 16)),
                "num_levels": OneOf((1, 2, 3, 4)),
                "global_tokens": OneOf((0, 4, 16, 64, 256)),
                "feature_fusion": OneOf(("adaptive", "uniform")),
                "calibration_factor": Float(0.0, 1.0),
            },
            {
                "window": 1024, "compression_factor": 16, "num_levels": 3, "global_tokens": 64,
                "feature_fusion": "adaptive", "calibration_factor": 0.0,
            },
            lambda choice: {**choice, "compression_alpha": 100.0},
        )  # fmt: skip

    @classmethod
    def sized(cls, shape: AttentionConfig, entries: int) -> Self:
        def config(window: int) -> MSRAConfig:
            return MSRAConfig(
                **shape.shared(), window=window, compression_factor=8, compression_alpha=100.0,
                global_tokens=SINKS,
            )  # fmt: skip

        return largest(lambda w: cls(config(w)), shape.max_sequence_length, entries)

    @right_padded
    @without_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        c = self.cfg
        refuse_transforms()
        refuse_meta("q", q)
        B, H, N, D = q.shape
        N = index(N)  # a compiler, too, makes its plan for this length
        q_, k_, v_ = (x.reshape(-1, N, D).contiguous() for x in (q, k, v))
        # Causal queries do not see the padding, which is behind them.
        seen = None if mask is None or c.is_causal else mask.repeat_interleave(c.kv_heads, 0)
        bias = None if seen is None else hide(seen)
        levels = far_rects(N, c.window, self.width, self.rate, c.global_tokens, c.is_causal)
        sources = [Source(k_, v_, bias), *self._nodes(k_, v_, seen, len(levels))]
        out = self.attend(q_, 0, sources, 0, [0] * len(sources))
        return out.view(B, H, N, D)

    def attend(
        self, q: Tensor, start: int, sources: list[Source], sinks: int, first: list[int]
    ) -> Tensor:
        """The union for queries [start, start + n).

        Args:
            q: (X, n, D).
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
            Call(source, qt, kt, causal=causal, branch=branch)
            for source, branch, part in zip((sinks, 0, 0, 0), NEAR, near, strict=True)
            for qt, kt, causal in batch(part, start, first[source])
        ]
        for level, sides in enumerate(levels, 1):
            shift = min(level, c.num_levels) - 1 if shifts else None
            # Where every visible node is whole its log(mass) is one number for the whole level.
            offset = level * math.log(self.rate) if sources[level].bias is None else 0.0
            calls += [
                Call(level, qt, kt, offset=offset, shift=shift, branch=f"level {level}")
                for side in sides
                for qt, kt, _ in batch(side, start, first[level])
            ]
        out, _ = union(q, sources, calls, shifts, scale=c.head_dim**-0.5, kernel=c.kernel)
        return out

    def begin(self, empty: Tensor) -> Mapping[str, Part]:
        return msra_stream.begin(empty)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, Part]
    ) -> tuple[Tensor, Mapping[str, Part]]:
        return msra_stream.advance(self, q, k, v, start, parts)

    def scale_weights(self, q: Tensor) -> Tensor:
        """log w_l - log w_0 of each query for every scale: (scales, X, N).

        Only differences matter to the softmax. Taken against level 0 they need no gradient of its
        logits, which is a sum that nearly cancels.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        w_h, w_x, out = (x.to(wide) for x in (self.fuse_h, self.fuse_x, self.fuse_v))

        def some(a: int, z: int) -> Tensor:
            hidden = F.linear(q[:, a:z].to(wide), w_h)
            beta = torch.stack([torch.tanh(hidden + x) @ out for x in w_x], -1)
            return soft_cap(beta, self.cfg.stability_factor)

        beta = by_pieces(some, q)
        return (beta[..., 1:] - beta[..., :1]).movedim(-1, 0).contiguous()

    def _nodes(self, k: Tensor, v: Tensor, seen: Tensor | None, levels: int) -> list[Source]:
        if self.cfg.memory_efficient and torch.is_grad_enabled():
            flat = checkpoint(self._pyramid, k, v, seen, levels, use_reentrant=False)
        else:
            flat = self._pyramid(k, v, seen, levels)
        return [Source(*flat[i : i + 3]) for i in range(0, len(flat), 3)]

    def _pyramid(self, k: Tensor, v: Tensor, seen: Tensor | None, levels: int) -> list[Any]:
        """Key, value and log(mass) of the nodes of each level, one after the other.

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
        """Squared lengths (X, n, 1) of keys, where calibration needs them."""
        if not self.cfg.calibration_factor:
            return None
        return k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1, keepdim=True)

    def parents(
        self, k: Tensor, v: Tensor, square: Tensor | None, mass: Tensor | None, level: int,
        first: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        """Nodes of the next level: mean keys, values, squared lengths, masses, attended keys.

        Args:
            level: of the children; tokens are level 0.
            first: number of the first node.
        """
        c = self.cfg
        weight, mass = self.pool.weights(k, v, level, mass)
        k, v = self.pool.reduce(weight, k), self.pool.reduce(weight, v)
        node = k
        if square is not None:
            square = self.pool.reduce(weight, square)
            stretch = square / k.square().sum(-1, keepdim=True).clamp_min(1e-20)
            node = node * stretch.clamp_min(1.0) ** (c.calibration_factor / 2)
        place = torch.arange(first, first + k.shape[1], device=k.device)
        pe = sinusoid(place, k.shape[-1]).to(k.dtype)
        return k, v, square, mass, node + self.pe_gain[min(level, c.num_levels - 1)] * pe

    def visible_pairs(self, length: int) -> int:
        c = self.cfg
        near = near_rects(length, c.window, c.global_tokens, c.is_causal)
        far = far_rects(length, c.window, self.width, self.rate, c.global_tokens, c.is_causal)
        parts = [*near, *(side for sides in far for side in sides)]
        return sum(r.pairs for part in parts for r in part if r.k1 > r.k0)

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """The definition, dense and in float64."""
        with q.device:
            return oracle(self, q, k, v, rows)

    def sight(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Sight:
        """Near tokens are seen as themselves, older ones through nodes."""
        c = self.cfg
        with torch.no_grad(), q.device:
            keys, values, _, _, visible = entries(self, k, v, rows)
        nodes = zip(keys[1:], values[1:], visible[1:], strict=True)
        levels = [Level(x, y, self.rate**n, seen) for n, (x, y, seen) in enumerate(nodes, 1)]
        weights = super().sight(q, k, v, rows).weights
        return Sight(
            weights, visible[0].expand_as(weights),
            lost(k, v, levels, rows, c.global_tokens, c.is_causal),
        )  # fmt: skip
