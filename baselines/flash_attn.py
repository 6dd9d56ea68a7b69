"""Dense attention of flash-attn."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from baselines.sdpa import SDPA
from danon.attention.registry import register
from danon.config import AttentionConfig

__all__ = ["FlashAttention"]


@register("flash-attn")
class FlashAttention(SDPA):
    """``flash_attn_func``."""

    streams: ClassVar[bool] = False
    description = "exact (flash-attn flash_attn_func)"
    takes_mask: ClassVar[bool] = False
    package: ClassVar[str] = "flash-attn"
    module: ClassVar[str] = "flash_attn"
    extra: ClassVar[str] = "cuda"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        self.flash_attn_func = self.load().flash_attn_func

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.once(q, k, v))
        out: Tensor = self.flash_attn_func(q, k, v, causal=self.config.is_causal)
        return out.transpose(1, 2)

    @classmethod
    def limit(
        cls,
        shape: AttentionConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        if shape.head_dim > 256:
            return f"head_dim is at most 256, not {shape.head_dim}"
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"needs compute capability 8.0, not {capability}"
