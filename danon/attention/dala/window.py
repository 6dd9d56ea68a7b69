"""DALA's near window: how far a query looks, by head and by content, and the decay that says so.

The decay is the logit bias -lambda d - d^2 / (2 w^2) with d = |i - j| (specification 2.2, 2.3).
w is one number per head and period, so the bias is that of one tile, -lambda d, plus the query's
1 / w^2 times a second one, -d^2 / 2: a :class:`~danon.attention.union.plan.ScaledBias`. Columns of
q and k would spare even those two matrices, since d^2 = i^2 - 2 i j + j^2, but its terms are up to
(period / w)^2 times larger than what is left of them: too coarse below float32, in the logits at
least. Where it is only about the gradient, hat functions instead of powers of j avoid the
cancellation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention.union.plan import ScaledBias

__all__ = ["WindowNetwork", "decay"]

ANCHORS = 5


class WindowNetwork(nn.Module):
    """The factor by which content widens or narrows the window (specification 2.3).

    2^(3 tanh f), so from 1/8 to 8, with f = W_2 tanh(W_1 x + b_1) and x the mean key and mean value
    of the period before the query's, or half the sum of both neighbours' when bidirectional; zero
    where there is none. W_2 starts at zero: the factor at 1. It is that of a key/value head: its
    query heads share it, as they share what they look at.
    """

    OCTAVES = 3.0

    def __init__(self, head_dim: int, hidden: int = 16) -> None:
        """Build the network.

        Args:
            head_dim: D.
            hidden: width of the hidden layer.
        """
        super().__init__()
        self.inner = nn.Linear(2 * head_dim, hidden)
        self.outer = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, content: Tensor) -> Tensor:
        """Return factors (X, periods) of content (X, periods, 2 D), float32 or wider."""
        wide = torch.promote_types(content.dtype, torch.float32)
        w, b = self.inner.weight.to(wide), self.inner.bias.to(wide)
        f = F.linear(torch.tanh(F.linear(content.to(wide), w, b)), self.outer.weight.to(wide))
        return torch.exp2(self.OCTAVES * f.squeeze(-1).tanh())


def decay(
    rate: float, scale: int, C: int, L: int, away: int, like: Tensor, causal: bool
) -> tuple[Tensor, ScaledBias]:
    """Return the two matrices of tiles whose first query is ``away`` tokens after the first key.

    The second one's factors: between anchors a and b the chord of (i - j)^2 over j is too high by
    (j - a)(b - j) whatever i is: (i - j)^2 = sum_m (i - a_m)^2 hat_m(j) - (j - a)(b - j) exactly.

    Args:
        rate: lambda.
        scale: which shift holds 1 / w^2.
        C: queries of a tile.
        L: keys of a tile.
        away: in tokens.
        like: of the dtype and on the device wanted.
        causal: as of the call.

    Returns:
        -lambda |i - j| (1, 1, C, L), and the profile -(i - j)^2 / 2.
    """

    def factors() -> tuple[Tensor, Tensor]:
        apart = max(1, -(-(L - 1) // (ANCHORS - 1)))
        at = torch.arange(ANCHORS, device=like.device) * apart
        hats = (1 - (keys[:, None] - at).abs().to(like) / apart).clamp_min(0)
        inside = (keys % apart) * (apart - keys % apart)
        sag = apart * apart / 4  # brings the last column to at most 1
        chords = (queries[:, None] - at).to(like).square() / -2
        r = torch.cat((chords, torch.full_like(chords[:, :1], sag / 2)), 1)
        return r, torch.cat((hats, inside.to(like)[:, None] / sag), 1)

    queries = torch.arange(away, away + C, device=like.device)
    keys = torch.arange(L, device=like.device)
    line = torch.arange(away - L + 1, away + C, device=like.device).to(like)
    lines = None if causal else torch.stack((-rate * line.abs(), line.square() / -2))
    d = (queries[:, None] - keys).to(like)
    return -rate * d.abs()[None, None], ScaledBias(scale, d.square() / -2, factors, lines)
