"""Learned pooling of keys and values into nodes, and positional encodings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ImportancePool", "by_pieces", "sinusoid", "sinusoid_pairs", "soft_cap"]

PIECE = 1 << 20
"""Numbers in a temporary of what is computed for all tokens of a long input, about."""


class ImportancePool(nn.Module):
    """One node out of ``rate`` children: a weighted mean, recursively (specification 1.1).

    The weight of a child is the softmax, over the children of a node, of log(mass) + beta with

        beta = v^T tanh(W_h h + W_x x + b)

    where h is the child's key and x its value. ``v`` starts at zero: a plain mean of the tokens.
    Scales have parameters of their own; levels beyond the last use the last.

    Args:
        head_dim: D.
        rate: children of a node.
        scales: sets of parameters.
        cap: soft cap of beta, see :func:`soft_cap`.
        hidden: width of the score network.
    """

    def __init__(
        self, head_dim: int, rate: int, scales: int, cap: float = 0.0, hidden: int = 16
    ) -> None:
        """Build the score network."""
        super().__init__()
        self.rate, self.cap = rate, cap
        bound = head_dim**-0.5
        self.w_h = nn.Parameter(torch.empty(scales, hidden, head_dim).uniform_(-bound, bound))
        self.w_x = nn.Parameter(torch.empty(scales, hidden, head_dim).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(scales, hidden))
        self.v = nn.Parameter(torch.zeros(scales, hidden))

    def score(self, k: Tensor, v: Tensor, scale: int) -> Tensor:
        """Return beta of each child: k, v (X, n, D) -> (X, n) float32 or wider."""
        s = min(scale, len(self.b) - 1)
        wide = torch.promote_types(k.dtype, torch.float32)
        w_h, w_x, b, out = (x[s].to(wide) for x in (self.w_h, self.w_x, self.b, self.v))

        def scores(a: int, z: int) -> Tensor:
            of_k, of_v = F.linear(k[:, a:z].to(wide), w_h, b), F.linear(v[:, a:z].to(wide), w_x)
            return soft_cap(torch.tanh(of_k + of_v) @ out, self.cap)

        return by_pieces(scores, k)

    def weights(
        self, k: Tensor, v: Tensor, scale: int, mass: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the share of each child in its node.

        Args:
            k: children's keys (X, n, D).
            v: children's values (X, n, D).
            scale: index of the level that is made, from 0.
            mass: unmasked tokens under each child (X, n), or None if all are whole; then a tail
                of fewer than ``rate`` children is dropped, since no node of it is complete.

        Returns:
            (X, m, rate) float32 or wider, and masses (X, m) or None; m is n / rate, rounded up
            with masses and down without.
        """
        shape = (k.shape[0], -1, self.rate)
        weight = self._whole(self.score(k, v, scale), mass is not None).reshape(shape)
        if mass is None:
            return weight.softmax(-1), None
        mass = self._whole(mass, True).view(shape)
        least = torch.finfo(weight.dtype).min / 2
        return (weight + mass.log().clamp_min(least)).softmax(-1), mass.sum(-1)

    def reduce(self, weight: Tensor, x: Tensor) -> Tensor:
        """Average children x (X, n, D) by weight: (X, m, D), in the wider of the dtypes."""
        _, m, r = weight.shape
        x = x[:, : m * r]
        if x.shape[1] < m * r:
            x = F.pad(x, (0, 0, 0, m * r - x.shape[1]))
        nodes = x.unflatten(1, (m, r))
        return by_pieces(lambda a, z: (nodes[:, a:z] * weight[:, a:z, :, None]).sum(2), nodes)

    def _whole(self, x: Tensor, pad: bool) -> Tensor:
        """Make n of x (X, n) a multiple of the rate: padded with zeros, or cut."""
        rest = x.shape[1] % self.rate
        return F.pad(x, (0, -x.shape[1] % self.rate)) if pad else x[:, : x.shape[1] - rest]


def by_pieces(compute: Callable[[int, int], Tensor], x: Tensor) -> Tensor:
    """Join ``compute(a, z)`` of x (X, n, ...) for all of [0, n) in dimension 1.

    On a CPU in pieces whose temporaries are of the size of a cache: one as long as the input is new
    memory each time, a page fault for every 4 KiB. Not for a gradient, which keeps them all anyway
    and fills one tensor as long as the input for each piece.
    """
    n = x.shape[1]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return compute(0, n)
    step = max(1, PIECE * n // max(1, x.numel()))
    if n <= step:
        return compute(0, n)
    return torch.cat([compute(a, min(a + step, n)) for a in range(0, n, step)], 1)


def soft_cap(beta: Tensor, s: float) -> Tensor:
    """Return tanh(s * beta) / s, which stays within 1/s; beta itself for s = 0."""
    return torch.tanh(beta * s) / s if s else beta


def sinusoid(position: Tensor, dim: int) -> Tensor:
    """Encode positions (n,) -> (n, dim) float64, sine and cosine in turn (specification 1.1)."""
    return sinusoid_pairs(position, dim).flatten(1)[:, :dim]


def sinusoid_pairs(position: Tensor, dim: int) -> Tensor:
    """Return (sine, cosine) of each frequency: positions (n,) -> (n, ceil(dim / 2), 2) float64."""
    half = torch.arange(0, dim, 2, device=position.device, dtype=torch.float64) / dim
    angle = position.double()[:, None] / 10000.0**half
    return torch.stack((angle.sin(), angle.cos()), -1)
