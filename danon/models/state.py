"""The state of a model after the tokens it has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from danon.attention.stream_state import StreamState

__all__ = ["ModelState"]


@dataclass(frozen=True, eq=False)
class ModelState:
    """State of :meth:`Backbone.step` after the tokens read so far, layer by layer."""

    layers: tuple[StreamState, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens read, by sequence."""
        return self.layers[0].lengths

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds on to."""
        return sum(state.nbytes for state in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain tensors, numbers and text, for ``torch.save`` and ``torch.load``."""
        return {"layers": [state.to_dict() for state in self.layers]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """Rebuild the state that :meth:`to_dict` described.

        Raises:
            ValueError: something is missing; says what.
        """
        if "layers" not in saved:
            raise ValueError("not a saved model state: it has no 'layers'")
        return cls(tuple(StreamState.from_dict(one, device) for one in saved["layers"]))
