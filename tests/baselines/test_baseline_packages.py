"""Calls of packages that may be missing here.

A stand-in of the documented signature shows that the adapter hands over the right tensors in the
right layout.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from baseline_cases import agree, check_padding, config, inputs, reason
from torch import Tensor

from baselines.flash_attn import FlashAttention
from baselines.gla import GatedLinear
from baselines.xformers import XFormers
from danon.measure.causality import check_causal


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **members: object) -> None:
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        fake = ModuleType(name)
        fake.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, name, fake)
    vars(sys.modules[module]).update(members)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, N, H, D) in and out, as these packages have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_called_as_documented(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn", flash_attn_func=dense)
    assert agree(FlashAttention(config(causal)), 33) <= 1e-5
    assert reason("flash-attn") == "runs on cuda only, not on cpu"
    assert FlashAttention.limit(
        config(True, width=264), 33, torch.bfloat16, torch.device("cuda"), False
    ) == ("head_dim is at most 256, not 264")


@pytest.mark.parametrize("causal", [True, False])
def test_xformers_is_called_as_documented(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(
        q: Tensor, k: Tensor, v: Tensor, attn_bias: LowerTriangularMask | None = None
    ) -> Tensor:
        assert k.shape == q.shape  # it has no grouped heads
        return dense(q, k, v, attn_bias is not None)

    def no_operator(*_: Tensor, **__: object) -> Tensor:
        raise NotImplementedError(
            "No operator found for\n  query : shape=(1, 16)\n  p : 0.0\n`x`:\n  device=cpu"
        )

    known = {"LowerTriangularMask": LowerTriangularMask}
    stand_in(
        monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention, **known
    )
    assert reason("xformers", causal) is None
    assert agree(XFormers(config(causal)), 33) <= 1e-5
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=no_operator, **known)
    assert reason("xformers", causal) == "no operator: `x`: device=cpu"


def test_gla_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, None]:
        """Compute the recurrence S = exp(g) S + k v^T, o = q S / sqrt(D), on (B, N, H, D)."""
        state, outs = 0.0, []
        for i in range(q.shape[1]):
            state = g[:, i].exp()[..., None] * state + k[:, i, :, :, None] * v[:, i, :, None]
            outs.append((q[:, i, :, None] @ state)[:, :, 0] * q.shape[-1] ** -0.5)
        return torch.stack(outs, dim=1), None

    stand_in(monkeypatch, "fla.ops.gla", chunk_gla=chunk_gla)
    attention = GatedLinear(config(True))
    assert agree(attention, 33) <= 1e-5
    mask = torch.rand(2, 33) < 0.6
    mask[0, :4], mask[1] = False, False
    check_padding(attention, *inputs(33), mask)
    assert check_causal(attention, *inputs(40)) == ""
    assert reason("gla") == "runs on cuda only, not on cpu"
    cuda = torch.device("cuda")
    assert GatedLinear.limit(config(False), 1, torch.float32, cuda, False) is not None
    assert GatedLinear.limit(config(True), 1, torch.float32, cuda, False) is None
