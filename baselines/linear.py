"""Linear attention with the feature map elu + 1: sums over the past instead of a softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from baselines._adapter import Adapter
from baselines._bridging import expand_heads
from baselines._oracles import all_tokens, kernel_attention
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.attention.stream_state import StateTensor, tensor_of
from danon.attention.streaming import StreamingAttention

__all__ = ["Linear"]

CHUNK = 128


def _causal(phi_q: Tensor, phi_k: Tensor, v: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums of each query (B, H, N, D + 1), and after the last token (B, H, D, D + 1).

    Args:
        phi_q: features of the queries (B, H, N, D).
        phi_k: features of the keys (B, H, N, D).
        v: values with a column of ones (B, H, N, D + 1).
        past: sums before the first token (B, H, D, D + 1), or None.
    """
    N = phi_q.shape[2]
    phi_q, phi_k, v = (  # (B, H, chunks, CHUNK, .)
        pad(x, (0, 0, 0, -N % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (phi_q, phi_k, v)
    )
    states = phi_k.transpose(-1, -2) @ v
    before = pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))
    if past is not None:
        before = before + past[:, :, None]
    both = phi_q @ before[:, :, :-1] + (phi_q @ phi_k.transpose(-1, -2)).tril() @ v
    return both.flatten(2, 3)[:, :, :N], before[:, :, -1]


def _normalised(both: Tensor) -> Tensor:
    total = both[..., -1:]
    return both[..., :-1] / torch.where(total == 0, 1.0, total)


def features(x: Tensor) -> Tensor:
    return elu(x) + 1


@register("linear")
class Linear(Adapter, StreamingAttention):
    """Causal sums in chunks of 128: quadratic inside a chunk, a running (D, D + 1) state between.

    bfloat16 and float16 are summed in float32: sums over all tokens need its digits.
    """

    description = "linear attention, features elu + 1 (half precision sums in float32)"
    pools_tokens: ClassVar[bool] = True
    oracle_kind: ClassVar[str] = "definition"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dtype, H = q.dtype, q.shape[1]
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
            both, _ = _causal(phi_q, phi_k, v, None)
        return _normalised(both).to(dtype)

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        X, _, D = empty.shape
        wide = torch.promote_types(empty.dtype, torch.float32)
        return {"sums": torch.zeros(X, D, D + 1, dtype=wide, device=empty.device)}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        dtype, sums = q.dtype, tensor_of(parts, "sums")
        q, k, v = (x.to(sums.dtype) for x in (q, k, v))
        phi_q = features(q).unflatten(0, (len(k), -1))  # the heads of a group share their sums
        phi_k, v = features(k)[:, None], pad(v, (0, 1), value=1.0)[:, None]
        both, sums = _causal(phi_q, phi_k, v, sums[:, None])
        return _normalised(both).flatten(0, 1).to(dtype), {"sums": sums[:, 0]}

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        q, k, v = q.double(), k.double(), v.double()
        rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        visible = all_tokens(self.config.is_causal)
        return kernel_attention(features(q[:, :, rows]), features(k), v, visible, rows)
