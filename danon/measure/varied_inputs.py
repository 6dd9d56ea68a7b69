"""Inputs that differ from call to call, so that no attention can know an answer beforehand.

Each call gets the same text, written into the same memory. It is rotated to another first token,
with other signs of its columns and another size of q. Signs that q and k share leave every logit of
a pair unchanged, but for the size. Half of the calls differ from the one before in later tokens
alone: an attention that compares a part of the inputs takes them for known.

Shapes: q (B, H, N, D), k and v (B, G, N, D).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Triple", "Variation", "VariedInputs"]

SIZES = 1.2
"""Largest factor, and one over the smallest, between the sizes of queries and the text's."""
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Variation:
    """The random choices behind the inputs of one call: enough to write them again.

    Attributes:
        first: token of the text that comes first.
        signs: of the columns of q, k and v: (1, H, 1, D) once and (1, G, 1, D) twice.
        scale: factor of q.
        turn: token from which on values have other signs, and q another size.
        later_signs: of the values from there on, (1, G, 1, D).
        later_scale: another factor of q from there on.
        seed: of other random inputs of the call.
    """

    first: int
    signs: Triple
    scale: float
    turn: int
    later_signs: Tensor
    later_scale: float
    seed: int


class VariedInputs:
    """One set of tensors whose values change.

    Args:
        q: queries of the text (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).

    Attributes:
        q, k, v: the inputs of calls; :meth:`change` writes new values into their memory.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Allocate the inputs; :meth:`change` fills them."""
        self._source = (q.detach(), k.detach(), v.detach())
        self.q, self.k, self.v = (torch.empty_like(x) for x in self._source)
        # A generator of its own, seeded by the system: no attention can draw the same numbers.
        self._generator = torch.Generator().manual_seed(secrets.randbits(63))
        self._last: Variation | None = None

    @torch.no_grad()
    def change(self) -> Variation:
        """Write new values into q, k and v."""
        self._last = variation = self._draw()
        _write((self.q, self.k, self.v), self._source, variation)
        return variation

    @torch.no_grad()
    def of(self, variation: Variation) -> Triple:
        """Return the inputs of an earlier call, in memory of their own.

        Args:
            variation: of that call.
        """
        q, k, v = (torch.empty_like(x) for x in self._source)
        _write((q, k, v), self._source, variation)
        return q, k, v

    def unchanged(self, variation: Variation) -> bool:
        """Return whether q, k and v still have the values that :meth:`change` wrote.

        Args:
            variation: of the last change.
        """
        return all(
            torch.equal(x, written)
            for x, written in zip((self.q, self.k, self.v), self.of(variation), strict=True)
        )

    def _draw(self) -> Variation:
        q, k, _ = self._source
        groups, width, length = k.shape[1], k.shape[-1], q.shape[2]
        bits = torch.randint(2, (3, 1, groups, 1, width), generator=self._generator)
        keys, values, later = (2 * bits - 1).to(q)
        coin, first, turn, seed = torch.randint(2**31, (4,), generator=self._generator).tolist()
        scale, later_scale = (
            SIZES ** (2 * x - 1) for x in torch.rand(2, generator=self._generator).tolist()
        )
        if self._last is not None and coin % 2:
            return replace(
                self._last,
                turn=1 + turn % max(length - 1, 1),
                later_signs=later,
                later_scale=later_scale,
                seed=seed,
            )
        queries = keys.repeat_interleave(q.shape[1] // groups, 1)
        return Variation(first % length, (queries, keys, values), scale, length, values, 1.0, seed)


def _write(target: Triple, source: Triple, variation: Variation) -> None:
    for x, text, sign in zip(target, source, variation.signs, strict=True):
        rest = x.shape[2] - variation.first
        torch.mul(text[:, :, variation.first :], sign, out=x[:, :, :rest])
        torch.mul(text[:, :, : variation.first], sign, out=x[:, :, rest:])
    target[0].mul_(variation.scale)
    target[0][:, :, variation.turn :].mul_(variation.later_scale)
    target[2][:, :, variation.turn :] *= variation.later_signs
