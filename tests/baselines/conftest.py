"""Baselines run on one thread, and without compiling FlexAttention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from baselines import flex_window


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: the tensors here are too small for two to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention compiles for half a minute: only the tests marked slow let it."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(flex_window, "_compiled", lambda: uncompiled)


def uncompiled(q: Tensor, k: Tensor, v: Tensor, plan: BlockMask) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out: Tensor = flex_attention(q, k, v, block_mask=plan)
    return out
