"""DALA, dynamic adaptive long-range attention: a decayed window, a memory, a recurrent state."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.base import BaseAttention, check_inputs, without_autocast
from danon.attention.dala_parts import (
    GatedState,
    ImportanceNetwork,
    Router,
    period_means,
    remember,
)
from danon.attention.kernels import HIDDEN
from danon.attention.oracles.dala import oracle
from danon.attention.registry import register
from danon.attention.tiles import Rect, Rows, Tiles, batch, near_rects
from danon.attention.union import Call, Source, union
from danon.config import AttentionConfig, DALAConfig

__all__ = ["DALA"]


@register("dala")
class DALA(BaseAttention):
    """Dynamic adaptive long-range attention (seed section 2).

    Tokens after the first ``global_tokens`` fall into periods. A query sees, under one softmax:

    - near: the first tokens, its own period and the one before, the latter two with the bias
      -lambda |i-j| - |i-j|^2 / (2 w^2) (seed 2.2, 2.3);
    - memory: of the tokens older than that, the ``memory_size`` most important ones whose
      sigmoid(s) passes the threshold, s = MLP(key + PE); ties to the more recent. Their logits get
      log sigmoid(s), so the score learns;
    - state: one entry made of a gated state h that takes one step per period over the period's
      mean key and value (seed 2.2), up to the period before the near window.

    The router gives each query a distribution over the three paths, whose logarithm is the bias of
    the path. Bidirectional: the periods on both sides are near, the memory is chosen from both
    sides, and a second state runs backwards with the same weights. O(N) time.
    """

    oracle_kind = "definition"

    def __init__(self, config: DALAConfig) -> None:
        super().__init__()
        self.setup_attention(config)
        self.cfg = config
        D = config.head_dim
        self.semantics = (
            f"decayed window {config.period} + memory {config.memory_size} + state "
            f"+ {config.global_tokens} sinks"
        )
        self.importance = ImportanceNetwork(D)
        self.state = GatedState(D)
        if config.use_adaptive_router:
            self.router = Router(D, config.router_temperature, config.router_iterations)

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(DALAConfig(**shape.shared()))

    @without_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        c = self.cfg
        check_inputs(c, q, k, v, mask)
        B, H, N, D = q.shape
        if self.training and c.attention_dropout:
            keep = torch.rand(B, N, device=q.device) >= c.attention_dropout
            mask = keep if mask is None else keep & (mask != 0)
        q_, k_, v_ = (x.reshape(-1, N, D).contiguous() for x in (q, k, v))
        seen = None if mask is None else (mask != 0).repeat_interleave(c.kv_heads, 0)
        paths = _Paths(self, q_, k_, v_, seen)
        out, lse = union(
            q_, paths.sources, paths.calls(decayed=True), paths.shifts, scale=D**-0.5,
            kernel=c.kernel,
        )  # fmt: skip
        if c.decay == "literal":
            # softmax(e) * gamma = softmax(e + log gamma) * exp(lse with decay - lse without).
            _, plain = union(
                q_, paths.sources, paths.calls(decayed=False), paths.shifts, scale=D**-0.5,
                kernel=c.kernel,
            )  # fmt: skip
            out = out * (lse - plain).exp()[..., None].to(out.dtype)
        return out.view(B, H, N, D)

    def log_decay(self, distance: Tensor) -> Tensor:
        """log gamma of every query head at the distances |i - j| (n,): (H, n)."""
        c = self.cfg
        heads = torch.arange(c.num_heads, device=distance.device)
        w = (c.base_window * 2.0 ** (heads % 4))[:, None]
        return -c.decay_rate * distance - distance.square() / (2 * w.square())

    def choose_memory(self, k: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What each period remembers of keys (X, N, D), ``seen`` (X, N) of which count.

        Returns:
            Scores (X, N); the chosen tokens (periods, X, memory_size); bool, which are kept.
        """
        c, g = self.cfg, self.cfg.global_tokens
        score = self.importance(k)
        choice = score.detach()
        if c.importance_threshold:
            limit = math.log(c.importance_threshold / (1 - c.importance_threshold))
            choice = choice.masked_fill(choice <= limit, -torch.inf)
        if seen is not None:
            choice = choice.masked_fill(~seen, -torch.inf)
        index, kept = remember(choice[:, g:], c.period, c.memory_size, c.is_causal)
        return score, index + g, kept

    def visible_pairs(self, length: int) -> int:
        c, g = self.cfg, self.cfg.global_tokens
        starts = range(0, max(0, length - g), c.period)
        older = [max(0, start - c.period) for start in starts]
        later = [max(0, length - g - start - 2 * c.period) for start in starts]
        if c.is_causal:
            later = [0] * len(later)
        full = [min(c.memory_size, a + b) for a, b in zip(older, later, strict=True)]
        return int(self._pairs(length, full))

    @torch.no_grad()
    def counted_pairs(self, k: Tensor) -> float:
        N, D = k.shape[-2:]
        if N - self.cfg.global_tokens <= 2 * self.cfg.period:  # nothing is outside the near window
            return self.visible_pairs(N)
        kept = self.choose_memory(k.reshape(-1, N, D), None)[2].sum(-1).double().mean(-1)
        return self._pairs(N, kept.tolist())

    def _pairs(self, length: int, memory: list[int] | list[float]) -> float:
        """Pairs when each period remembers so many tokens."""
        c, g = self.cfg, self.cfg.global_tokens
        near = near_rects(length, c.period, g, c.is_causal)
        pairs: float = sum(r.pairs for part in near for r in part)
        for p, remembered in enumerate(memory):
            rows = min(c.period, length - g - p * c.period)
            rows += g if p == 0 else 0  # the first tokens see what the first period sees
            past, future = p > 1, not c.is_causal and p + 2 < len(memory)
            pairs += rows * (remembered + past + future)
        return pairs

    def oracle(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The definition, one period and head at a time, in float64.

        Which tokens are remembered is decided by the importance scores as the network gives them,
        in its own precision: a choice is either the same or another, never nearly the same.
        """
        with q.device:
            return oracle(self, q, k, v, mask, rows)


class _Paths:
    """The entries of one forward pass: sources, router shifts, and the calls over them."""

    def __init__(self, m: DALA, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> None:
        c, N = m.cfg, q.shape[1]
        self.m, self.q = m, q
        self.near = near_rects(N, c.period, c.global_tokens, c.is_causal)
        self.rows = [(r.q0, r.q1) for r in self.near[1]]  # the queries of each period
        self.sources = [Source(k, v, None if seen is None else torch.where(seen, 0.0, HIDDEN))]
        self.shifts: list[Tensor] = []
        # Only from the third period on is there anything outside the near window.
        self.far = len(self.rows) > 2
        if self.far:
            self._remember(k, v, seen)
            keys, states = self._states(k, v, seen)
            if c.use_adaptive_router:
                self._route(k, keys, states)

    def _remember(self, k: Tensor, v: Tensor, seen: Tensor | None) -> None:
        score, self.index, self.kept = self.m.choose_memory(k, seen)
        self.sources.append(Source(k, v, F.logsigmoid(score)))

    def _states(self, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds the state sources; returns mean keys and state keys by period, (X, periods, D)."""
        c, g = self.m.cfg, self.m.cfg.global_tokens
        tail = None if seen is None else seen[:, g:]
        keys, count = period_means(k[:, g:], tail, c.period)
        means = torch.cat((keys, period_means(v[:, g:], tail, c.period)[0]), -1)
        past = self.m.state(means, count, reverse=False)
        self.sources.append(Source(past.k.to(k.dtype), past.v.to(k.dtype), past.bias))
        state = F.pad(past.k, (0, 0, 2, 0))[:, :-2]  # period p sees the state after p - 2
        if not c.is_causal:
            future = self.m.state(means, count, reverse=True)
            self.sources.append(Source(future.k.to(k.dtype), future.v.to(k.dtype), future.bias))
            state = (state + F.pad(future.k, (0, 0, 0, 2))[:, 2:]) / 2
        return F.pad(keys, (0, 0, 1, 0))[:, :-1], state

    def _route(self, k: Tensor, near: Tensor, state: Tensor) -> None:
        """Shifts (X, N) of memory and state."""
        X, N, D = self.q.shape
        c, g = self.m.cfg, self.m.cfg.global_tokens
        memory = self._memory_means(k, near.dtype)
        paths = torch.stack((near, memory, state.to(near.dtype)), 2)  # (X, periods, 3, D)
        paths = paths.repeat_interleave(X // paths.shape[0], 0)
        tail = F.pad(self.q[:, g:], (0, 0, 0, -(N - g) % c.period)).unflatten(1, (-1, c.period))
        log_p = self.m.router(tail, paths).flatten(1, 2)[:, : N - g]
        sinks = self.m.router(self.q[:, :g], paths[:, 0])  # they see what the first period sees
        # Only differences matter to the softmax: against the near path, as in MSRA.
        log_p = torch.cat((sinks, log_p), 1)
        self.shifts = list((log_p[..., 1:] - log_p[..., :1]).unbind(-1))

    def _memory_means(self, k: Tensor, dtype: torch.dtype, together: int = 32) -> Tensor:
        """Mean key of each period's memory (X, periods, D), some periods at a time."""
        means = []
        for t in range(0, len(self.index), together):
            kept = self.kept[t : t + together].to(dtype)[..., None]
            chosen = Rows(self.index).load(k, t, min(t + together, len(self.index))).to(dtype)
            means.append((chosen * kept).sum(2) / kept.sum(2).clamp_min(1))
        return torch.cat(means).transpose(0, 1)

    def calls(self, decayed: bool) -> list[Call]:
        """What is visible, with the decay of the near window or without."""
        memory, state = (0, 1) if self.shifts else (None, None)
        calls = []
        for part, rects in enumerate(self.near):
            for qt, kt, causal in batch(rects):
                bias = self._decay(qt, kt) if decayed and part else None
                calls.append(Call(0, qt, kt, causal, bias))
        if not self.far:
            return calls
        periods = [Rect(*rows, p, p + 1) for p, rows in enumerate(self.rows)]
        if self.m.cfg.is_causal:
            periods = periods[2:]
        for qt, kt, _ in batch(periods):
            some = slice(kt.start, kt.start + kt.count * kt.step, kt.step)
            hidden = torch.where(self.kept[some], 0.0, HIDDEN)[:, :, None]
            hidden = hidden.repeat_interleave(len(self.q) // hidden.shape[1], 1)
            calls.append(Call(1, qt, Rows(self.index[some]), bias=hidden, shift=memory))
        for source, away in ((2, -2), (3, 2))[: len(self.sources) - 2]:
            rects = [Rect(*r[:2], r.k0 + away, r.k1 + away) for r in periods
                     if 0 <= r.k0 + away < len(self.rows)]  # fmt: skip
            calls += [Call(source, qt, kt, shift=state) for qt, kt, _ in batch(rects)]
        return calls

    def _decay(self, qt: Tiles, kt: Tiles) -> Tensor:
        """log gamma (1, X, C, L) of tiles whose queries and keys keep their distance."""
        C, L, away = qt.length, kt.length, qt.start - kt.start
        wide = torch.promote_types(self.q.dtype, torch.float32)
        # Row c is a window of one line of distances: |away + c - l| for l = 0 ... L-1.
        line = torch.arange(away + C - 1, away - L, -1, device=self.q.device, dtype=wide)
        bias = self.m.log_decay(line.abs()).unfold(-1, L, 1).flip(-2)
        return bias.repeat(len(self.q) // len(bias), 1, 1)[None]
