"""The learned parts of DALA: importance network, gated state, router; and the memory's choice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention.kernels.base import hide
from danon.attention.pooling import by_pieces, sinusoid_pairs
from danon.attention.union.op import Source

__all__ = [
    "GatedState",
    "ImportanceNetwork",
    "Router",
    "load_balance",
    "period_means",
    "remember_both_sides",
    "select_memory",
]


class ImportanceNetwork(nn.Module):
    """s = MLP(h + PE) of specification 2.1, with h the key and PE of its position."""

    def __init__(self, head_dim: int, hidden: int = 16) -> None:
        """Build the network.

        Args:
            head_dim: D.
            hidden: width of the hidden layer.
        """
        super().__init__()
        self.inner = nn.Linear(head_dim, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, k: Tensor, start: int = 0) -> Tensor:
        """Score keys (X, N, D) -> (X, N), float32 or wider whatever the dtype of the keys.

        ``start`` is the place of the first key in its sequence.
        """
        wide = torch.promote_types(k.dtype, torch.float32)
        w, b, w_out, b_out = (
            x.to(wide)
            for x in (self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias)
        )

        def scores(a: int, z: int) -> Tensor:
            encoded = F.linear(_positions(start + a, z - a, k.shape[2], wide, k.device), w, b)
            hidden = torch.tanh(F.linear(k[:, a:z].to(wide), w) + encoded)
            return F.linear(hidden, w_out, b_out).squeeze(-1)

        if not k.shape[1]:  # eight-bit weights cannot be multiplied with nothing
            return k.new_empty(k.shape[:2], dtype=wide)
        return by_pieces(scores, k)


def _positions(
    start: int, n: int, dim: int, dtype: torch.dtype, device: torch.device, step: int = 512
) -> Tensor:
    """Return sinusoid(start ...) by the angle sum of coarse and fine positions: sines cost time."""
    coarse = sinusoid_pairs(torch.arange(start, start + n, step, device=device), dim)
    fine = sinusoid_pairs(torch.arange(min(n, step), device=device), dim)
    (s, c), (t, d) = (x.to(dtype).unbind(-1) for x in (coarse, fine))
    s, c = s[:, None], c[:, None]
    pe = torch.stack((s * d + c * t, c * d - s * t), -1)
    return pe.flatten(2).flatten(0, 1)[:n, :dim]


class GatedState(nn.Module):
    """The gated update of specification 2.2, one step per period; its state is one entry.

        z = sigma(W_z [h, x] + b_z)   r = sigma(W_r [h, x] + b_r)
        h~ = tanh(W_h [r * h, x] + b_h)   h <- (1 - z) * h + z * h~

    x is the period's mean key and mean value; the entry is a linear map of h to a key and a value.
    """

    def __init__(self, head_dim: int) -> None:
        """Build gates and output maps.

        Args:
            head_dim: D.
        """
        super().__init__()
        S = 2 * head_dim
        self.z, self.r, self.h = (nn.Linear(2 * S, S) for _ in range(3))
        self.key, self.value = nn.Linear(S, head_dim), nn.Linear(S, head_dim)

    def forward(
        self, means: Tensor, count: Tensor, past: Tensor | None = None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run over the periods, forwards or backwards.

        Args:
            means: mean keys and values (X, periods, 2 D).
            count: unmasked tokens of each period (X, periods); a period without any is no step.
            past: the state (X, 2 D) to go on from, after some token; None for the beginning.
            reverse: run from the last period to the first.

        Returns:
            The state after each period (X, periods, 2 D) in the dtype of the means, and bool
            (X, periods): whether any token has been met.
        """
        S = means.shape[-1]
        order = range(means.shape[1])
        h = means.new_zeros(means.shape[0], S) if past is None else past
        met = torch.full_like(means[:, 0, 0], 0.0 if past is None else 1.0)
        states, met_after = [h] * len(order), [met] * len(order)
        parts = [(m.weight.to(h.dtype), m.bias.to(h.dtype)) for m in (self.z, self.r, self.h)]
        # The input's share of all gates, for all periods at once.
        gx = [F.linear(means, w[:, S:], b) for w, b in parts]
        wz, wr, wh = (w[:, :S] for w, _ in parts)
        for p in reversed(order) if reverse else order:
            z = torch.sigmoid(gx[0][:, p] + F.linear(h, wz))
            r = torch.sigmoid(gx[1][:, p] + F.linear(h, wr))
            new = (1 - z) * h + z * torch.tanh(gx[2][:, p] + F.linear(r * h, wh))
            h = torch.where(count[:, p, None] > 0, new, h)
            met = met + count[:, p]
            states[p], met_after[p] = h, met
        return torch.stack(states, 1), torch.stack(met_after, 1) > 0

    def entries(self, states: Tensor, met: Tensor) -> Source:
        """Return one entry for each state (X, n, 2 D); hidden where no token had been met."""
        key, value = (
            F.linear(states, m.weight.to(states.dtype), m.bias.to(states.dtype))
            for m in (self.key, self.value)
        )
        return Source(key, value, hide(met))


class Router(nn.Module):
    """Each query's distribution over paths (specification 2.1).

    p_ij = softmax_j(s_i.k_j / tau + b_ij), s_i = squash(W q_i / sqrt(d)) and k_j the squashed mean
    key of the path before the query's period. b_ij starts at zero and is updated by agreement:
    b_ij += y_ij.a_i with the path's prediction y_ij = p_ij k_j and the activation a_i = s_i. W
    starts at zero: no preference.

    squash(x) = x / sqrt(1 + |x|^2), so that no vector is longer than 1 and no preference larger
    than 1/tau + iterations: unbounded, one step of an optimizer could close a path for good
    (docs/log.md). Sabour et al. 2017 squash what they route for the same reason.
    """

    def __init__(self, head_dim: int, temperature: float, iterations: int) -> None:
        """Build the router.

        Args:
            head_dim: D.
            temperature: tau, > 0.
            iterations: agreement updates, >= 0.
        """
        super().__init__()
        self.temperature, self.iterations = temperature, iterations
        self.weight = nn.Parameter(torch.zeros(head_dim, head_dim))

    def forward(self, q: Tensor, paths: Tensor) -> Tensor:
        """Return log p of queries (..., n, D) and path keys (..., J, D): (..., n, J)."""
        wide = torch.promote_types(q.dtype, torch.float32)  # tau magnifies rounding
        asked = _squash(q.to(wide) @ (self.weight.to(wide).T * q.shape[-1] ** -0.5))
        match = asked @ _squash(paths.to(wide)).transpose(-1, -2)
        b = torch.zeros_like(match)
        for _ in range(self.iterations):
            b = b + (match / self.temperature + b).softmax(-1) * match
        return (match / self.temperature + b).log_softmax(-1)


def _squash(x: Tensor) -> Tensor:
    """Return the same direction, shorter than 1; short vectors stay about as they are."""
    return x * (1 + x.square().sum(-1, keepdim=True)).rsqrt()


def load_balance(
    p: Tensor, counts: Tensor, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the mean over examples of J sum_j (P_j - 1/J)^2, P the mean of an example's p.

    Zero where all paths get the same share, J - 1 where one gets everything. It is the importance
    loss of Shazeer et al. 2017 (arXiv 1701.06538, section 4), and up to a constant that of the
    Switch Transformer (arXiv 2101.03961, J sum_j f_j P_j) for a router that drops nothing: f = P.
    By example, so that the loss of a batch is the mean of its examples' losses, wherever they are
    computed; a square of a mean over the batch is not.

    Args:
        p: distributions of the queries of B examples over J paths (B, n, J).
        counts: (B, n) bool, the queries that count; an example without any has a loss of zero.
        total: sums a tensor over the processes that have other queries of the examples; None: these
            are all.
    """
    weight = counts.to(p)[..., None]
    sums = torch.cat(((p * weight).sum(1), weight.sum(1)), -1)
    sums = sums if total is None else total(sums)
    mean = sums[:, :-1] / sums[:, -1:].clamp_min(1)
    return p.shape[-1] * (mean - mean.mean(-1, keepdim=True)).square().sum(-1).mean()


def period_means(x: Tensor, seen: Tensor | None, period: int) -> tuple[Tensor, Tensor]:
    """Return means over the unmasked tokens of each period, zero if there are none.

    Args:
        x: (X, n, D).
        seen: (X, n) bool or None.
        period: tokens of a period.

    Returns:
        (X, periods, D) float32 or wider, and the number of tokens (X, periods) float.
    """
    X, n, _ = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    one = torch.ones(X, n, device=x.device, dtype=wide) if seen is None else seen.to(wide)
    if seen is not None:
        x = x.to(wide) * one[..., None]
    count = F.pad(one, (0, -n % period)).unflatten(1, (-1, period)).sum(2)
    whole = n // period * period
    total = x[:, :whole].unflatten(1, (n // period, period)).sum(2, dtype=wide)
    if whole < n:
        total = torch.cat((total, x[:, whole:].sum(1, keepdim=True, dtype=wide)), 1)
    return total / count.clamp_min(1)[..., None], count


def select_memory(
    score: Tensor,
    period: int,
    size: int,
    periods: range,
    first: int = 0,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose each period's memory from the past: the highest scores before its near window.

    Args:
        score: (X, n), from period ``first`` on; -inf marks a token that may not be kept. Equal
            scores: the more recent first.
        period: tokens of a period.
        size: tokens remembered, at most.
        periods: whose memory is wanted.
        first: number of the period that the first score is in.
        past: scores (X, size) and numbers (X, size) of what the first of them remembers; None if
            there is nothing yet. Tokens are numbered from 0 at the first score.

    Returns:
        Numbers (periods, X, size), and scores of the same shape, -inf where nothing is kept.
    """
    X, n = score.shape
    position = torch.arange(n, device=score.device).expand(X, n)
    if past is None:
        past = score.new_full((X, size), -torch.inf), position.new_zeros(X, size)
    best, where = past
    bests, wheres = [best], [where]
    for p in periods[1:]:
        if p >= 2:
            old = slice((p - 2 - first) * period, (p - 1 - first) * period)
            # A stable sort keeps the order of equals: new tokens first, latest foremost.
            best = torch.cat((score[:, old].flip(-1), best), 1)
            where = torch.cat((position[:, old].flip(-1), where), 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, where = best[:, :size], where.gather(1, order[:, :size])
        bests.append(best)
        wheres.append(where)
    return torch.stack(wheres), torch.stack(bests)


def remember_both_sides(score: Tensor, period: int, size: int) -> tuple[Tensor, Tensor]:
    """Choose the memory of all periods from both sides of their near windows.

    Returns:
        Token numbers (periods, X, size), and which of them are really kept, bool.
    """
    X, n = score.shape
    periods = -(-n // period)
    position = torch.arange(n, device=score.device).expand(X, n)
    order = score.flip(-1).sort(dim=1, descending=True, stable=True)
    # A near window of three periods can take no more than that from the front of the list.
    best = order.values[:, : size + 3 * period]
    where = position.flip(-1).gather(1, order.indices)[:, : size + 3 * period]
    p = torch.arange(periods, device=score.device)[:, None, None]
    period_of = where // period
    far = ((period_of < p - 1) | (period_of > p + 1)) & (best > -torch.inf)
    first = (~far).int().sort(dim=-1, stable=True).indices[..., :size]
    kept = far.gather(-1, first)
    where = where.expand(periods, -1, -1).gather(-1, first)
    short = size - where.shape[-1]
    return F.pad(where, (0, short)), F.pad(kept, (0, short))
