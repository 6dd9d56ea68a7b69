"""Performer (FAVOR+) of the package performer-pytorch."""

from __future__ import annotations

import contextlib
import io
import math
from typing import ClassVar

import torch
from torch import Tensor

from baselines._adapter import Adapter
from baselines._bridging import expand_heads, seeded
from baselines._oracles import all_tokens, kernel_attention
from danon.attention.padding import rows_alone
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["Performer"]

FEATURE_EPS = 1e-4  # the package's, added to every exponential
SUM_EPS = 1e-6  # the package's, added to the summed keys when causal


@register("performer")
class Performer(Adapter):
    """``FastAttention`` with its default D ln D random features, drawn once from a fixed seed.

    Not strictly causal: the package scales keys by their maximum over the whole input before it
    adds a constant, so a later token shifts earlier outputs a little. In half precision its
    constants underflow and its running sums lose their digits: float32 only.
    """

    description = (
        "softmax approximated by D ln D random features; when causal, later tokens leak a little"
    )
    pools_tokens: ClassVar[bool] = True
    oracle_kind: ClassVar[str] = "definition"
    causal_capable: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = False
    package: ClassVar[str] = "performer-pytorch"
    module: ClassVar[str] = "performer_pytorch"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        performer = self.load()
        with seeded(), contextlib.redirect_stdout(io.StringIO()):  # it prints that CUDA is absent
            self.core = performer.FastAttention(dim_heads=shape.head_dim, causal=shape.is_causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.core(q, expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1]))
        return out

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        if not shape.is_causal:
            return 0
        # The package's running sum keeps a (features, D) product per token: of one of its 128
        # pieces in the forward pass, of all of them for the backward pass.
        kept = length if backward else -(-length // 128)
        features = int(shape.head_dim * math.log(shape.head_dim))
        return 3 * dtype.itemsize * shape.num_heads * kept * features * shape.head_dim

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        q, k, v = q.double(), k.double(), v.double()
        rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        omega = self.core.projection_matrix.double()
        causal = self.config.is_causal
        phi_q = _features(q[:, :, rows], omega, (-1,))
        phi_k = _features(k, omega, (-1, -2))
        eps = SUM_EPS if causal else 0.0
        return kernel_attention(phi_q, phi_k, v, all_tokens(causal), rows, eps)


def _features(x: Tensor, omega: Tensor, over: tuple[int, ...]) -> Tensor:
    """Return exp(omega x' - |x'|^2 / 2 - max) + eps, x' = x / D^(1/4); omega: (F, D)."""
    x = x * x.shape[-1] ** -0.25
    dots = x @ omega.T
    top = dots.amax(over, keepdim=True).detach()
    grown = torch.exp(dots - x.square().sum(-1, keepdim=True) / 2 - top) + FEATURE_EPS
    scaled: Tensor = grown * omega.shape[0] ** -0.5
    return scaled
