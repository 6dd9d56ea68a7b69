"""DALA's paths: sources, the calls over them, and the router's weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.dala.base import DALABase
from danon.attention.dala.modules import load_balance, period_means, select_memory
from danon.attention.dala.window import decay
from danon.attention.kernels.base import HIDDEN, hide
from danon.attention.stream_state import StateTensor, span_of, tensor_of
from danon.attention.union.op import BranchCall, Source
from danon.attention.union.tiles import NEAR, Rect, Rows, batch, near_rects

__all__ = ["Paths", "paths_for_chunk", "paths_for_sequence"]


@dataclass
class Paths:
    """The entries of queries [start, start + n): sources, router shifts, and the calls over them.

    Attributes:
        sources: tokens; memory; states of the past; then states of the future or the first tokens.
        sinks: which source holds the first tokens.
        row: the token in row 0 of source 0.
        index, kept: rows of source 1 that each period remembers (periods, X, size), and whether
            there is one; from the period of the first query on.
        states: (source, entry that the first query's period sees) of each source of states.
        shifts: of memory and state.
        content: mean key and value of the period before each (X, periods, 2 D), or half the sum of
            both neighbours'; zero where there is none.
    """

    m: DALABase
    q: Tensor
    start: int
    sources: list[Source]
    content: Tensor
    sinks: int = 0
    row: int = 0
    index: Tensor | None = None
    kept: Tensor | None = None
    states: tuple[tuple[int, int], ...] = ()
    shifts: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Split the queries into periods."""
        c, g, stop = self.m.cfg, self.m.cfg.global_tokens, self.start + self.q.shape[1]
        self.first = max(0, self.start - g) // c.period
        self.periods = []
        for p in range(self.first, math.ceil(max(0, stop - g) / c.period)):
            q0 = 0 if p == 0 and not c.is_causal else max(self.start, g + p * c.period)
            self.periods.append(Rect(q0, min(stop, g + (p + 1) * c.period), p, p + 1))

    def route(self, near: Tensor, memory: Source, state: Tensor) -> None:
        """Set the shifts (X, n) of memory and state.

        Args:
            near: mean key before each period (X, periods, D).
            memory: source of the remembered tokens.
            state: key of the state each period sees (X, periods, D).
        """
        c, g, (X, n, _) = self.m.cfg, self.m.cfg.global_tokens, self.q.shape
        paths = torch.stack((near, self._memory_means(memory.k, near.dtype), state), 2)
        paths = paths.repeat_interleave(X // paths.shape[0], 0)  # (X, periods, 3, D)
        sinks = max(0, min(n, g - self.start))
        tail, front = self.q[:, sinks:], 0
        if len(self.periods) > 1:  # whole periods
            front = max(0, self.start - g) % c.period
            tail = F.pad(tail, (0, 0, front, -(front + n - sinks) % c.period))
        tail = tail.unflatten(1, (len(self.periods), -1))
        log_p = self.m.router(tail, paths).flatten(1, 2)[:, front : front + n - sinks]
        if sinks:  # they see what the first period sees
            log_p = torch.cat((self.m.router(self.q[:, :sinks], paths[:, 0]), log_p), 1)
        # Only differences matter to the softmax: against the near path, as in MSRA.
        self.shifts = (log_p[..., 1:] - log_p[..., :1]).unbind(-1)

    def _memory_means(self, k: Tensor, dtype: torch.dtype, together: int = 32) -> Tensor:
        """Return mean key of each period's memory (X, periods, D), some periods at a time."""
        assert self.index is not None and self.kept is not None
        means = []
        for t in range(0, len(self.periods), together):
            end = min(t + together, len(self.periods))
            kept = self.kept[t:end].to(dtype)[:, :, None]
            chosen = Rows(self.index).load(k, t, end).to(dtype)
            means.append((kept @ chosen / kept.sum(3, keepdim=True).clamp_min(1)).squeeze(2))
        return torch.cat(means).transpose(0, 1)

    def imbalance(
        self, real: Tensor | None, total: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the load-balance loss over the queries with more than one path.

        Args:
            real: the tokens that are no padding, (batch * key/value heads, n), or None.
            total: as of :func:`~danon.attention.dala.modules.load_balance`. None of the queries
                here needs to have more than one path then.
        """
        c, (X, n, _) = self.m.cfg, self.q.shape
        if real is None:
            real = torch.ones(1, n, dtype=torch.bool, device=self.q.device)
        period_of = (
            (torch.arange(self.start, self.start + n, device=self.q.device) - c.global_tokens)
            // c.period
        ).clamp_min(0)
        counts = period_of >= 2
        if not c.is_causal:
            last = (real.sum(1, keepdim=True) - 1 - c.global_tokens) // c.period
            counts = counts | (period_of + 2 <= last)
        shifts = self.shifts or (torch.zeros(X, n, dtype=self.content.dtype).to(self.q.device),) * 2
        shares = F.pad(torch.stack(shifts, -1), (1, 0)).softmax(-1)  # (X, n, paths)
        counts = (counts & real).repeat_interleave(X // len(real), 0)
        examples = X // c.num_heads
        shares, counts = shares.view(examples, -1, shares.shape[-1]), counts.view(examples, -1)
        return load_balance(shares, counts, total)

    def inverse_squares(self) -> Tensor:
        """Return 1 / w^2 of each query (X, n), w the width of its head and period."""
        c, (X, n, _) = self.m.cfg, self.q.shape
        heads = torch.arange(X, device=self.q.device) % c.num_heads + self.m.first_head
        w = c.base_window * torch.exp2((heads % 4).to(self.content))[:, None]
        if not c.adaptive_window:
            return w.square().reciprocal().expand(X, n)
        factor = self.m.window(self.content).repeat_interleave(X // len(self.content), 0)
        by_period: Tensor = (w * factor).square().reciprocal()
        past_sinks = (
            torch.arange(self.start, self.start + n, device=self.q.device) - c.global_tokens
        )
        return by_period[:, (past_sinks // c.period).clamp_min(0) - self.first]

    def calls(self, decayed: bool) -> list[BranchCall]:
        """Return what is visible, with the decay of the near window or without."""
        c, stop = self.m.cfg, self.start + self.q.shape[1]
        memory, state = (0, 1) if self.shifts else (None, None)
        near = near_rects(stop, c.period, c.global_tokens, c.is_causal, self.start)
        calls = []
        for part, rects in enumerate(near):
            source, row = (0, self.row) if part else (self.sinks, 0)
            # The decay goes by the distance: only tiles of equal distance share a call.
            for away in sorted({r.q0 - r.k0 for r in rects}):
                alike = [r for r in rects if r.q0 - r.k0 == away]
                for qt, kt, causal in batch(alike, self.start, row):
                    call = BranchCall(source, qt, kt, causal, branch=NEAR[part])
                    if decayed and part:
                        apart = self.start + qt.start - (row + kt.start)
                        bias, profile = decay(
                            c.decay_rate,
                            len(self.shifts),
                            qt.length,
                            kt.length,
                            apart,
                            self.content,
                            causal,
                        )
                        call = replace(call, bias=bias, profile=profile)
                    calls.append(call)
        if self.index is None or self.kept is None:
            return calls
        periods = [r for r in self.periods if r.k0 >= 2 or not c.is_causal]
        for qt, kt, _ in batch(periods, self.start, self.first):
            chosen = slice(kt.start, kt.start + kt.count * kt.step, kt.step)
            hidden = hide(self.kept[chosen])[:, :, None]
            hidden = hidden.repeat_interleave(len(self.q) // hidden.shape[1], 1)
            rows = Rows(self.index[chosen])
            calls.append(BranchCall(1, qt, rows, bias=hidden, shift=memory, branch="memory"))
        for source, entry in self.states:
            most = self.sources[source].k.shape[1]
            there = [(r, r.k0 - self.first + entry) for r in periods]
            seen = [r._replace(k0=at, k1=at + 1) for r, at in there if 0 <= at < most]
            calls += [
                BranchCall(source, qt, kt, shift=state, branch="state")
                for qt, kt, _ in batch(seen, self.start)
            ]
        return calls


def paths_for_sequence(
    m: DALABase, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, start: int = 0
) -> Paths:
    """Return the paths of queries [start, n) of sequences of n tokens; 0 if not causal."""
    c, g = m.cfg, m.cfg.global_tokens
    tail = None if seen is None else seen[:, g:]
    means, count = _means(k[:, g:], v[:, g:], tail, c.period)
    around, n = F.pad(means, (0, 0, 1, 2)), max(1, means.shape[1])
    content = around[:, :n] if c.is_causal else (around[:, :n] + around[:, 2 : n + 2]) / 2
    tokens = Source(k, v, None if seen is None else hide(seen))
    first = max(0, start - g) // c.period
    paths = Paths(m, q, start, [tokens], content[:, first:])
    if math.ceil((k.shape[1] - g) / c.period) <= 2:  # nothing is outside the near window
        return paths
    score, index, kept = m.choose_memory(k, seen)
    paths.index, paths.kept = index[first:], kept[first:]
    memory = Source(k, v, F.logsigmoid(score))
    past = m.state.entries(*m.state(means, count))
    paths.sources += [memory, Source(past.k.to(k.dtype), past.v.to(k.dtype), past.bias)]
    paths.states = ((2, first - 2),)  # period p sees the state after p - 2
    state = F.pad(_met(past), (0, 0, 2, 0))[:, :-2]
    if not c.is_causal:
        future = m.state.entries(*m.state(means, count, reverse=True))
        paths.sources.append(Source(future.k.to(k.dtype), future.v.to(k.dtype), future.bias))
        paths.states = ((2, -2), (3, 2))
        state = (state + F.pad(_met(future), (0, 0, 0, 2))[:, 2:]) / 2
    if c.use_adaptive_router:
        before = F.pad(means, (0, 0, 1, 0))[:, :-1, : q.shape[-1]]
        paths.route(before[:, first:], memory, state[:, first:])
    return paths


def paths_for_chunk(m: DALABase, q: Tensor, start: int, parts: dict[str, StateTensor]) -> Paths:
    """Return the paths of the next tokens of a stream, which ``parts`` hold; update the rest."""
    c, g, stop = m.cfg, m.cfg.global_tokens, start + q.shape[1]
    k, v, score = (span_of(parts, name) for name in ("k", "v", "score"))
    old_k, old_v, old_score, state, content = (
        tensor_of(parts, x) for x in ("memory_k", "memory_v", "memory_score", "state", "mean")
    )
    sinks = Source(span_of(parts, "sink_k").rows, span_of(parts, "sink_v").rows)
    sources = [Source(k.rows, v.rows), sinks]
    paths = Paths(m, q, start, sources, content, sinks=1, row=g + k.start)
    if stop <= g:
        return paths
    # Rows hold tokens from one period before the first query's on (if there is one).
    first, base, following = paths.first, k.start // c.period, (stop - g) // c.period
    best, index = old_score[None], torch.arange(c.memory_size, device=q.device)
    index = index.expand(best.shape)
    memory = Source(old_k, old_v, F.logsigmoid(old_score.clamp_min(HIDDEN)))
    if following > first:  # periods end in this chunk: memory and state move on
        index, best = select_memory(
            m.keepable(score.rows),
            c.period,
            c.memory_size,
            range(first, following + 1),
            base,
            (old_score, index[0] + k.size),
        )
        memory = Source(
            torch.cat((k.rows, old_k), 1),
            torch.cat((v.rows, old_v), 1),
            F.logsigmoid(torch.cat((score.rows, old_score.clamp_min(HIDDEN)), 1)),
        )
        means, _ = _means(k.rows, v.rows, None, c.period)
        means = means[:, first - base : following - base]
        content = torch.cat((content, means), 1)
        new, _ = m.state(means, torch.ones_like(means[..., 0]), state[:, 1])
        state = torch.cat((state, new), 1)
        at = index[-1][..., None].expand_as(old_k)
        parts |= {
            "memory_k": memory.k.gather(1, at),
            "memory_v": memory.v.gather(1, at),
            "memory_score": best[-1],
            "state": state[:, -2:].clone(),
            "mean": content[:, -1:].clone(),
        }
    met = torch.arange(first - 2, following, device=q.device) >= 0
    past = m.state.entries(state, met.expand(state.shape[:2]))
    count = len(paths.periods)
    paths.content = content[:, :count]
    if paths.periods[-1].k0 >= 2:
        paths.index, paths.kept = index[:count], best[:count] > -torch.inf
        paths.sources.insert(1, memory)
        paths.sources.insert(2, Source(past.k.to(k.rows.dtype), past.v.to(k.rows.dtype), past.bias))
        paths.sinks, paths.states = 3, ((2, 0),)
        if c.use_adaptive_router:
            paths.route(paths.content[..., : q.shape[-1]], memory, past.k[:, :count])
    return paths


def _met(states: Source) -> Tensor:
    """Return keys of states, zero where no token had been met, as beyond the ends."""
    assert states.bias is not None
    return torch.where(states.bias[..., None] == 0, states.k, 0.0)


def _means(k: Tensor, v: Tensor, seen: Tensor | None, period: int) -> tuple[Tensor, Tensor]:
    """Return means of keys and values side by side (X, periods, 2 D), and the counts."""
    keys, count = period_means(k, seen, period)
    return torch.cat((keys, period_means(v, seen, period)[0]), -1), count
