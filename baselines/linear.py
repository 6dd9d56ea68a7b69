"""Linear attention with the feature map elu + 1: sums over the past instead of a softmax."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from baselines._adapter import Adapter
from baselines._masked import everything, kernel_attention
from baselines._parts import expand_heads
from danon.attention.registry import register

__all__ = ["Linear"]

CHUNK = 128


def features(x: Tensor) -> Tensor:
    return elu(x) + 1


@register("linear")
class Linear(Adapter):
    """Causal sums in chunks of 128: quadratic inside a chunk, a running (D, D + 1) state between.

    bfloat16 and float16 are summed in float32: sums over all tokens need its digits.
    """

    semantics = "linear attention, features elu + 1 (half precision sums in float32)"
    oracle_kind: ClassVar[str] = "definition"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dtype, (_, H, N, _) = q.dtype, q.shape
        if dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()
        phi_q, phi_k = features(q), features(k)
        if mask is not None:
            phi_k = phi_k * mask[:, None, :, None]
        phi_k, v = expand_heads(phi_k, H), expand_heads(v, H)
        v = pad(v, (0, 1), value=1.0)  # the last column sums the weights
        if not self.config.is_causal:
            both = phi_q @ (phi_k.transpose(-1, -2) @ v)
        else:
            # (B, H, chunks, CHUNK, .)
            phi_q, phi_k, v = (
                pad(x, (0, 0, 0, -N % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (phi_q, phi_k, v)
            )
            states = phi_k.transpose(-1, -2) @ v
            before = pad(states.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
            both = phi_q @ before + (phi_q @ phi_k.transpose(-1, -2)).tril() @ v
            both = both.flatten(2, 3)[:, :, :N]
        total = both[..., -1:]
        return (both[..., :-1] / torch.where(total == 0, 1.0, total)).to(dtype)

    def oracle(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = q.double(), k.double(), v.double()
        rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        visible = everything(self.config.is_causal)
        return kernel_attention(features(q[:, :, rows]), features(k), v, visible, mask, rows)
