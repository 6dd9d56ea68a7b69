"""BigBird's block-sparse attention, from transformers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from baselines._adapter import Adapter
from baselines._bridging import expand_heads, seeded
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["BigBird"]


@register("bigbird")
class BigBird(Adapter):
    """The block-sparse core of ``BigBirdBlockSparseAttention`` on given q, k, v.

    Blocks of 64: the block and its neighbours, the first and the last block, 3 random blocks.
    Short inputs are padded to the 12 blocks that the package's plan of random blocks needs. The
    core runs in training mode, because in evaluation mode the package replaces every random block
    by the first block; it has no dropout.
    """

    description = (
        "bidirectional block sparse, blocks of 64: 3 near, 2 global, 3 random; also when causal"
    )
    causal_capable: ClassVar[bool] = False
    package: ClassVar[str] = "transformers"
    module: ClassVar[str] = "transformers.models.big_bird.modeling_big_bird"

    def __init__(self, shape: AttentionConfig, block: int = 64, random_blocks: int = 3) -> None:
        super().__init__(shape)
        self.block, self.random_blocks = block, random_blocks
        modeling = self.load()
        with seeded():
            self.core = modeling.BigBirdBlockSparseAttention(
                modeling.BigBirdConfig(
                    hidden_size=shape.hidden_size,
                    num_attention_heads=shape.num_heads,
                    block_size=block,
                    num_random_blocks=random_blocks,
                    max_position_embeddings=4096,
                ),
                seed=0,
            )
        del self.core.query, self.core.key, self.core.value  # q, k, v are given

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, H, N, D = q.shape
        if mask is not None:  # which blocks are global or random goes by the length of the sequence
            rows = []
            for b, n in enumerate(mask.sum(1).tolist()):
                q_, k_, v_ = (x[b : b + 1, :, :n] for x in (q, k, v))
                rows.append(self.attend(q_, k_, v_, None) if n else q_)
            return torch.cat([pad(out, (0, 0, 0, N - out.shape[2])) for out in rows])
        size, r = self.block, self.random_blocks
        length = max(-(-N // size), 2 * r + 6) * size
        k, v = expand_heads(k, H), expand_heads(v, H)
        q, k, v = (pad(x, (0, 0, 0, length - N)).contiguous() for x in (q, k, v))
        real = pad(q.new_ones(B, N), (0, length - N))
        blocks = real.view(B, -1, size)
        every = torch.ones_like(blocks)  # padded queries attend like any other
        near = torch.cat([blocks[:, 1:-3], blocks[:, 2:-2], blocks[:, 3:-1]], dim=2)
        # The package reseeds the global generator.
        state = np.random.get_state()  # noqa: NPY002
        self.core.train()
        try:
            out, _ = self.core.bigbird_block_sparse_attention(
                q,
                k,
                v,
                (every[:, 2:-2, :, None] * near[:, :, None])[:, None],
                real.new_ones(B, 1, length, 1),
                real[:, None, None],
                every,
                blocks,
                H,
                r,
                D,
                size,
                size,
                B,
                length,
                length,
                seed=self.core.seed,
                plan_from_length=None,
                plan_num_rand_blocks=None,
            )
        finally:
            np.random.set_state(state)  # noqa: NPY002
        attended: Tensor = out.transpose(1, 2)
        return attended[:, :, :N]

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        return 2 * dtype.itemsize * shape.num_heads * length**2  # the weights, returned as N x N
