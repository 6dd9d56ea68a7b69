"""Entries that each query sees: counts of the mechanisms, against their masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small_mechanisms import small_dala, small_msra, small_ucsa
from torch import Tensor

from danon.attention import MSRA, BaseAttention
from danon.attention.union import merge
from danon.attention.union.op import BranchCall
from danon.config import MSRAConfig
from danon.testing import make_inputs


def entries_seen(module: BaseAttention, length: int) -> Tensor:
    """Entries that the masks of the union's calls leave visible, by head and query."""
    seen = torch.zeros(4, length)
    real = merge._bias

    def count(
        call: BranchCall, key_bias: Tensor | None, q: Tensor, t0: int, t1: int
    ) -> Tensor | None:
        bias = real(call, key_bias, q, t0, t1)
        on = torch.ones(t1 - t0, 4, call.q.length, call.k.length)
        on = on if bias is None else on * (bias > -1e29)
        call.q.load(seen, t0, t1).add_((on.tril() if call.causal else on).sum(-1))
        return bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_bias", count)
        module(*make_inputs(module, length, batch=1))
    return seen


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("length", [20, 90, 150, 203])
def test_ucsa_visible_pairs_counts_what_the_masks_show(length: int, coarse: bool) -> None:
    module = small_ucsa(True, selected_blocks=1, coarse_nodes=coarse)
    seen = entries_seen(module, length)
    assert seen.eq(seen[0]).all()
    assert int(seen[0].sum()) == module.visible_pairs(length)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [3, 20, 103, 150])
def test_msra_visible_pairs_counts_what_is_computed(length: int, causal: bool) -> None:
    module = small_msra(causal)
    assert int(entries_seen(module, length)[0].sum()) == module.visible_pairs(length)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [3, 11, 19, 20, 103, 150])
def test_dala_counts_the_pairs_of_these_keys(length: int, causal: bool) -> None:
    module = small_dala(causal)
    k = make_inputs(module, length, batch=1)[1]
    seen = entries_seen(module, length)
    assert module.counted_pairs(k) == pytest.approx(seen.sum().item() / len(seen), rel=1e-12)
    assert module.counted_pairs(k) <= module.visible_pairs(length)
    full = small_dala(causal, importance_threshold=0.0)
    assert int(entries_seen(full, length)[0].sum()) == full.visible_pairs(length)


def test_msra_entries_grow_with_the_logarithm() -> None:
    module = MSRA(MSRAConfig(hidden_size=64, num_heads=1, causal=True))
    width, rate = module.cfg.level_width, module.cfg.level_rate
    per_query = [module.visible_pairs(n) / n for n in (2**18 * rate**i for i in range(3))]
    steps = [b - a for a, b in pairwise(per_query)]
    # Of each level a query sees between width (1 - 1/r) and width (2 - 2/r) nodes.
    assert max(steps) <= 1.1 * 1.5 * (1 - 1 / rate) * width and per_query[-1] < 3000
