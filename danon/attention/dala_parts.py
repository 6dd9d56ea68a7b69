"""The learned parts of DALA: importance network, gated state, router; and the memory's choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention.kernels import HIDDEN
from danon.attention.pooling import sinusoid_pairs
from danon.attention.union import Source

__all__ = ["GatedState", "ImportanceNetwork", "Router", "period_means", "remember"]


class ImportanceNetwork(nn.Module):
    """s = MLP(h + PE) of seed section 2.1, with h the key and PE of its position."""

    def __init__(self, head_dim: int, hidden: int = 16) -> None:
        super().__init__()
        self.inner = nn.Linear(head_dim, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, k: Tensor) -> Tensor:
        """Keys (X, N, D) -> scores (X, N), float32 or wider whatever the dtype of the keys."""
        wide = torch.promote_types(k.dtype, self.inner.weight.dtype)
        w, b = self.inner.weight.to(wide), self.inner.bias.to(wide)
        place = F.linear(_positions(k.shape[1], k.shape[2], wide, k.device), w, b)
        hidden = torch.tanh(F.linear(k.to(wide), w) + place)
        return F.linear(hidden, self.outer.weight.to(wide), self.outer.bias.to(wide)).squeeze(-1)


def _positions(
    n: int, dim: int, dtype: torch.dtype, device: torch.device, step: int = 512
) -> Tensor:
    """sinusoid(0 ... n-1) by the angle sum of coarse and fine positions: sines cost time."""
    coarse = sinusoid_pairs(torch.arange(0, n, step, device=device), dim)
    fine = sinusoid_pairs(torch.arange(min(n, step), device=device), dim)
    (s, c), (t, d) = (x.to(dtype).unbind(-1) for x in (coarse, fine))
    s, c = s[:, None], c[:, None]
    pe = torch.stack((s * d + c * t, c * d - s * t), -1)
    return pe.flatten(2).flatten(0, 1)[:n, :dim]


class GatedState(nn.Module):
    """The gated update of seed section 2.2, one step per period; its state is one entry.

        z = sigma(W_z [h, x] + b_z)   r = sigma(W_r [h, x] + b_r)
        h~ = tanh(W_h [r * h, x] + b_h)   h <- (1 - z) * h + z * h~

    x is the period's mean key and mean value; the entry is a linear map of h to a key and a value.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        S = 2 * head_dim
        self.z, self.r, self.h = (nn.Linear(2 * S, S) for _ in range(3))
        self.key, self.value = nn.Linear(S, head_dim), nn.Linear(S, head_dim)

    def forward(self, means: Tensor, count: Tensor, *, reverse: bool) -> Source:
        """Run over the periods, forwards or backwards.

        Args:
            means: mean keys and values (X, periods, 2 D).
            count: unmasked tokens of each period (X, periods); a period without any is no step.

        Returns:
            Entry p is the state after period p, in the dtype of the means; hidden while no token
            has been met.
        """
        S = means.shape[-1]
        order = range(means.shape[1])
        h = means.new_zeros(means.shape[0], S)
        met = torch.zeros_like(count[:, 0])
        states, known = [h] * len(order), [met] * len(order)
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
            states[p], known[p] = h, met
        every = torch.stack(states, 1)
        key, value = (
            F.linear(every, m.weight.to(h.dtype), m.bias.to(h.dtype))
            for m in (self.key, self.value)
        )
        bias = torch.where(torch.stack(known, 1) > 0, 0.0, HIDDEN)
        return Source(key, value, bias)


class Router(nn.Module):
    """Each query's distribution over paths (seed section 2.1).

    p_ij = softmax_j(s_i.k_j / tau + b_ij), s_i = W q_i and k_j the path's mean key before the
    query's period. b_ij starts at zero and is updated by agreement: b_ij += y_ij.a_i with the
    path's prediction y_ij = p_ij k_j and the activation a_i = s_i. W starts at zero: no preference.
    """

    def __init__(self, head_dim: int, temperature: float, iterations: int) -> None:
        super().__init__()
        self.temperature, self.iterations = temperature, iterations
        self.weight = nn.Parameter(torch.zeros(head_dim, head_dim))

    def forward(self, q: Tensor, paths: Tensor) -> Tensor:
        """log p: queries (..., n, D) and path keys (..., J, D) -> (..., n, J)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        s = F.linear(q.to(wide), self.weight.to(wide))  # tau magnifies rounding
        match = s @ paths.to(wide).transpose(-1, -2)
        b = torch.zeros_like(match)
        for _ in range(self.iterations):
            b = b + (match / self.temperature + b).softmax(-1) * match
        return (match / self.temperature + b).log_softmax(-1)


def period_means(x: Tensor, seen: Tensor | None, period: int) -> tuple[Tensor, Tensor]:
    """Means over the unmasked tokens of each period, zero if there are none.

    Args:
        x: (X, n, D).
        seen: (X, n) bool or None.

    Returns:
        (X, periods, D) float32 or wider, and the number of tokens (X, periods) float.
    """
    X, n, D = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    one = torch.ones(X, n, device=x.device, dtype=wide) if seen is None else seen.to(wide)
    x = x.to(wide) if seen is None else x.to(wide) * one[..., None]
    pad = -n % period
    total = F.pad(x, (0, 0, 0, pad)).view(X, -1, period, D).sum(2)
    count = F.pad(one, (0, pad)).view(X, -1, period).sum(2)
    return total / count.clamp_min(1)[..., None], count


def remember(score: Tensor, period: int, size: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Choose each period's memory: the highest scores outside its near window.

    Args:
        score: (X, n); -inf marks a token that may not be kept. Equal scores: the more recent first.

    Returns:
        Token numbers (periods, X, size), and which of them are really kept, bool.
    """
    X, n = score.shape
    periods = -(-n // period)
    place = torch.arange(n, device=score.device).expand(X, n)
    if not causal:
        return _remember_both_sides(score, place, period, periods, size)
    best = score.new_full((X, size), -torch.inf)
    where = torch.zeros(X, size, dtype=torch.int64, device=score.device)
    bests, wheres = [best, best][:periods], [where, where][:periods]
    for p in range(2, periods):
        old = slice((p - 2) * period, (p - 1) * period)
        # A stable sort keeps the order of equals: new tokens first, latest foremost.
        best = torch.cat((score[:, old].flip(-1), best), 1)
        where = torch.cat((place[:, old].flip(-1), where), 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, where = best[:, :size], where.gather(1, order[:, :size])
        bests.append(best)
        wheres.append(where)
    return torch.stack(wheres), torch.stack(bests) > -torch.inf


def _remember_both_sides(
    score: Tensor, place: Tensor, period: int, periods: int, size: int
) -> tuple[Tensor, Tensor]:
    order = score.flip(-1).sort(dim=1, descending=True, stable=True)
    # A near window of three periods can take no more than that from the front of the list.
    best = order.values[:, : size + 3 * period]
    where = place.flip(-1).gather(1, order.indices)[:, : size + 3 * period]
    p = torch.arange(periods, device=score.device)[:, None, None]
    own = where // period
    far = ((own < p - 1) | (own > p + 1)) & (best > -torch.inf)
    first = (~far).int().sort(dim=-1, stable=True).indices[..., :size]
    kept = far.gather(-1, first)
    where = where.expand(periods, -1, -1).gather(-1, first)
    short = size - where.shape[-1]
    return F.pad(where, (0, short)), F.pad(kept, (0, short))
