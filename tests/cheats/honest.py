"""The attention that the cheats pretend to be, and the way they notice a check."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from danon import BaseAttention
from danon.config import AttentionConfig


def in_check() -> bool:
    """Return whether a function of the correctness check is on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("check_case", "check_causal", "check_contract", "oracle"):
            return True
        frame = frame.f_back
    return False


class Honest(BaseAttention):
    """Dense attention, and its definition in float64."""

    description = "exact, by hand"

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(config)
        self.memory: dict[object, Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.is_causal)

    def oracle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        logits = self.compute_attention(q.double(), k.double())
        out: Tensor = logits.softmax(-1) @ v.double()
        return out if rows is None else out[:, :, rows]
