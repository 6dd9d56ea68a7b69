"""Attention in float64 over a rule of visible keys: the oracles of the baselines.

Only the rows asked for are computed, so that long sequences can be checked at a few positions.
R rows asked for; other suffixes as in :mod:`danon.attention.base`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Band", "Visible", "all_tokens", "kernel_attention", "masked_attention", "only_padding"]

Visible = Callable[[Tensor, Tensor], Tensor]
"""Function of query positions (R, 1) and key positions (1, N) to visible keys (R, N) boolean."""


def all_tokens(causal: bool) -> Visible:
    """Return a rule that shows all tokens, or all up to the query."""
    return lambda rows, cols: (cols <= rows) if causal else torch.ones_like(cols <= rows)


@dataclass(frozen=True)
class Band:
    """Rule by which query i sees tokens ``i - back .. i + ahead`` and the first ``sinks`` tokens.

    Attributes:
        back: tokens before the query.
        ahead: tokens after the query.
        sinks: first tokens of the sequence.
        causal: True hides all tokens after the query.
    """

    back: int
    ahead: int
    sinks: int = 0
    causal: bool = False

    def __call__(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the visible keys, as :data:`Visible`."""
        seen = (cols >= rows - self.back) & (cols <= rows + self.ahead) | (cols < self.sinks)
        return seen & (cols <= rows) if self.causal else seen

    def sees_only_padding(self, mask: Tensor) -> Tensor:
        """Return (B, N) boolean, True where a query sees padding only; mask: (B, N) boolean."""
        row = torch.arange(mask.shape[1], device=mask.device)
        end = row + 1 if self.causal else row + self.ahead + 1
        sinks = end.clamp_max(self.sinks) if self.causal else torch.full_like(row, self.sinks)
        return only_padding(mask, row - self.back, end) & only_padding(mask, 0 * row, sinks)

    def pairs(self, length: int) -> int:
        """Return the number of (query, key) pairs in a sequence of ``length`` tokens."""
        row = torch.arange(length)
        first = (row - self.back).clamp_min(0)
        last = row if self.causal else (row + self.ahead).clamp_max(length - 1)
        sinks = min(self.sinks, length)
        before = first.clamp_max(sinks)
        after = 0 if self.causal else (sinks - 1 - last).clamp_min(0).sum()
        return int((last - first + 1 + before).sum() + after)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, rows: Tensor | None
) -> Tensor:
    """Compute softmax attention over the visible tokens.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D).
        v: (B, G, N, D).
        visible: rule of visible keys.
        rows: query positions (R,); None for all.

    Returns:
        (B, H, R, D) float64; zeros where nothing is visible.
    """
    q, k, v = q.double(), k.double(), v.double()
    rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    seen = _seen(visible, rows, k.shape[2])
    logits = _group(q[:, :, rows], k.shape[1]) @ k[:, :, None].transpose(-1, -2)
    logits = (logits * q.shape[-1] ** -0.5).masked_fill(~seen, -1e300)
    weights = logits.softmax(-1) * seen  # a row that sees nothing is uniform before, zero after
    out: Tensor = (weights @ v[:, :, None]).flatten(1, 2)
    return out


def kernel_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, visible: Visible, rows: Tensor, eps: float = 0.0
) -> Tensor:
    """Compute attention whose weights are inner products of features instead of a softmax.

    Args:
        phi_q: features of the rows asked for, (B, H, R, F) float64.
        phi_k: features of all keys, (B, G, N, F) float64.
        v: (B, G, N, D) float64.
        visible: rule of visible keys.
        rows: query positions (R,).
        eps: added to each summed key feature in the denominator.

    Returns:
        (B, H, R, D) float64; zeros where nothing is visible.
    """
    seen = _seen(visible, rows, phi_k.shape[2])
    phi_q = _group(phi_q, phi_k.shape[1])
    weights = (phi_q @ phi_k[:, :, None].transpose(-1, -2)) * seen
    total = weights.sum(-1, keepdim=True) + eps * phi_q.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    out: Tensor = (weights @ v[:, :, None] / total).flatten(1, 2)
    return out


def only_padding(mask: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Return (B, N) boolean, True where tokens ``first[i] .. end[i] - 1`` are all padding."""
    N = mask.shape[1]
    count = torch.nn.functional.pad(mask.cumsum(1), (1, 0))
    same: Tensor = count[:, end.clamp(0, N)] == count[:, first.clamp(0, N)]
    return same


def _seen(visible: Visible, rows: Tensor, length: int) -> Tensor:
    return visible(rows[:, None], torch.arange(length, device=rows.device)[None])


def _group(x: Tensor, groups: int) -> Tensor:
    out: Tensor = x.unflatten(1, (groups, -1))
    return out
