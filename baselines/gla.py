"""Gated linear attention of flash-linear-attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from baselines._adapter import Adapter
from baselines._bridging import expand_heads, seeded
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["GatedLinear"]

GATE_NORMALIZER = 16.0  # the package's layer divides its log gates by this


@register("gla")
class GatedLinear(Adapter):
    """``chunk_gla`` with forget gates read from the keys: logsigmoid(W k + b) / 16, W per head.

    The package's layer reads its gates from hidden states, which an attention does not see, and
    normalises its output, which is left out here.
    """

    description = "gated linear recurrence, gates from the keys; not normalised"
    pools_tokens: ClassVar[bool] = True
    oracle_kind: ClassVar[str] = "definition"
    package: ClassVar[str] = "flash-linear-attention"
    module: ClassVar[str] = "fla.ops.gla"
    extra: ClassVar[str] = "cuda"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        self.chunk_gla = self.load().chunk_gla
        with seeded():
            self.gate = nn.Linear(shape.head_dim, shape.head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        gate = self._log_gate(k)
        H = q.shape[1]
        k, v, gate = expand_heads(k, H), expand_heads(v, H), expand_heads(gate, H)
        q, k, v, gate = (x.transpose(1, 2).contiguous() for x in self.once(q, k, v, gate))
        out: Tensor = self.chunk_gla(q, k, v, gate)[0]
        return out.transpose(1, 2).to(q.dtype)

    def _log_gate(self, k: Tensor) -> Tensor:
        """Return the log gates (B, G, N, D), at most 0, in float32 or float64.

        Gates multiply over thousands of tokens, which half precision does not resolve.
        """
        exact = torch.promote_types(k.dtype, torch.float32)
        weight, bias = self.gate.weight.to(exact), self.gate.bias.to(exact)
        return logsigmoid(k.to(exact) @ weight.T + bias) / GATE_NORMALIZER

    @classmethod
    def limit(
        cls,
        shape: AttentionConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        return None if shape.is_causal else "a recurrence: causal only"

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """Sum (q_i * exp(sum of log gates j+1 .. i)) . k_j v_j over j <= i, row by row."""
        q, k, v = q.double(), k.double(), v.double()
        H, N, D = q.shape[1:]
        total = self._log_gate(k).cumsum(2)
        k, v, total = expand_heads(k, H), expand_heads(v, H), expand_heads(total, H)
        outs = []
        for i in range(N) if rows is None else rows.tolist():
            decay = (total[:, :, i : i + 1] - total[:, :, : i + 1]).exp()
            weight = (decay * k[:, :, : i + 1]) @ q[:, :, i, :, None] * D**-0.5
            outs.append((weight * v[:, :, : i + 1]).sum(2))
        return torch.stack(outs, dim=2)
