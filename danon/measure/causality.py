"""The search for leaks: outputs of earlier tokens must not depend on later ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danon.measure.correctness import FORWARD_FP32, Attend

__all__ = ["check_causal"]

EARLY = 256
"""First tokens of which leaks are looked for in calls of their own."""


def check_causal(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *, seed: int = 0) -> str:
    """Change every token after a random one: no output up to it may move.

    An oracle that is the attention itself in float64 shares its leaks; this check finds them.

    Two places are drawn: one in the second half, and one before it. For the second place every
    power of two is as likely, because a leak among the first tokens shows only from a place
    between them. Short sequences may take another path, so the first ``EARLY`` tokens are checked
    alone too: from a uniform place, and from one drawn by powers of two.

    Args:
        attend: (q, k, v) -> (B, H, N, D).
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        seed: of the places.

    Returns:
        Why the attention is not causal, in one line; empty if it is.
    """
    length = q.shape[2]
    generator = torch.Generator().manual_seed(seed)
    high = max(length - 1, length // 2 + 1)
    late = int(torch.randint(length // 2, high, (), generator=generator))
    uniform, first, second = torch.rand(3, generator=generator).tolist()
    places = [late, _place_by_powers(length // 2, first)]
    if reason := _later_tokens_move(attend, (q, k, v), places):
        return reason
    if length <= EARLY:
        return ""
    places = [int(uniform * (EARLY - 1)), _place_by_powers(EARLY, second)]
    return _later_tokens_move(attend, (q[:, :, :EARLY], k[:, :, :EARLY], v[:, :, :EARLY]), places)


def _place_by_powers(length: int, drawn: float) -> int:
    """Return a place before the last of ``length`` tokens, every power of two as likely.

    Args:
        length: in tokens.
        drawn: a random number in [0, 1).
    """
    return max(min(int(length**drawn) - 1, length - 2), 0)


def _later_tokens_move(attend: Attend, inputs: Sequence[Tensor], places: Sequence[int]) -> str:
    """Return which place's later tokens move earlier outputs, in one line; empty if none."""
    q, k, v = inputs
    with torch.no_grad():
        before = attend(q, k, v)
    for last in dict.fromkeys(places):
        # another order, sign and size: sums, maxima and norms of the later tokens all move
        changed = [
            torch.cat((x[:, :, : last + 1], x[:, :, last + 1 :].flip(2) * -1.5), dim=2)
            for x in inputs
        ]
        with torch.no_grad():
            after = attend(*changed)
        # Row by row: a leak of one token may touch a single row. Sums in another order may round
        # differently, nothing more.
        was, now = (x[:, :, : last + 1].double() for x in (before, after))
        moved = (now - was).norm(dim=-1)
        error = float((moved / was.norm(dim=-1)).masked_fill(moved == 0, 0.0).max())
        allowed = FORWARD_FP32 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps
        if not error <= allowed:
            return f"not causal: tokens after {last} move earlier outputs by {error:.1e} (relative)"
    return ""
