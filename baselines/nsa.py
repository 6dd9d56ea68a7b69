"""Native sparse attention of the package native-sparse-attention-pytorch."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from baselines._adapter import Adapter
from baselines._bridging import TensorInjector, in_dtype, merge_heads, seeded, split_heads
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["NativeSparse"]

SELECTED, BLOCK = 4, 64


@register("nsa")
class NativeSparse(Adapter):
    """``SparseAttention``, which takes hidden states, on given q, k, v.

    Its projection hands over q, k and v; norm and output projection are the identity; the gates
    of the three branches read the queries of all heads (as initialised they are constant: 0.12
    compressed, 0.12 selected, 0.88 window). The package rotates q and k by position itself, in the
    window and the selection.
    """

    description = (
        "gated sum of window 512, 4 selected blocks of 64, compressed blocks of 32 (rotary inside)"
    )
    pools_tokens: ClassVar[bool] = True
    takes_mask: ClassVar[bool] = False
    package: ClassVar[str] = "native-sparse-attention-pytorch"
    module: ClassVar[str] = "native_sparse_attention_pytorch"
    # It selects blocks by scores in the dtype of its inputs: in bfloat16 rounding changes the
    # selection (error 1.6e-2 against itself in float64, N = 1024, real text).
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        package = self.load()
        with seeded():
            self.core = package.SparseAttention(
                dim=shape.hidden_size,
                dim_head=shape.head_dim,
                heads=shape.num_heads,
                kv_heads=shape.kv_heads,
                causal=shape.is_causal,
                norm=False,
                sliding_window_size=512,
                compress_block_size=32,
                compress_block_sliding_stride=16,
                selection_block_size=BLOCK,
                num_selected_blocks=SELECTED,
            )
        self.core.to_qkv = TensorInjector()
        self.core.combine_heads = nn.Identity()

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        raise NotImplementedError("its window of 512 and blocks of 64 have one size")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        hidden = merge_heads(q)
        self.core.to_qkv.tensor = torch.cat([hidden, merge_heads(k), merge_heads(v)], dim=-1)
        return split_heads(in_dtype(self.core, q.dtype, hidden), q.shape[1])

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        row = shape.kv_heads * shape.head_dim * dtype.itemsize
        # Forward: each query's own copy of its selected keys and values. Backward: the gradient
        # of the gather that made them has the shape of all keys and values for every query.
        forward = 5 * row * length * (SELECTED + 1) * BLOCK // 2
        return forward + 2 * row * length**2 if backward else forward
