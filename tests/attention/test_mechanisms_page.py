"""docs/mechanisms.md suffices: each mechanism written again from it agrees with its oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from page_implementations import dala, msra, ucsa
from torch import Tensor

from danon.attention import DALA, MSRA, UCSA, BaseAttention
from danon.attention.ucsa.layer import anneal
from danon.config import DALAConfig, MSRAConfig, UCSAConfig

TOLERANCE = 1e-12
"""Relative, of the whole output."""

SHAPE = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def compare(
    module: BaseAttention,
    written: Callable[..., Tensor],
    length: int,
    *,
    like: str = "noise",
    mask: Tensor | None = None,
    **more: Any,
) -> None:
    """Hold a function from the page to the module's oracle, with all parameters off zero.

    Args:
        module: mechanism whose oracle is the reference.
        written: the function from the page.
        length: of the sequence, in tokens.
        like: ``equal leaves`` makes a stretch of keys equal (lossless nodes); ``ties`` repeats four
            keys of small integers, with plain means, so that scores are equal to the last bit.
        mask: of real tokens (length,); padding is no part of the sequence.
        **more: further arguments of ``written``.
    """
    c = module.config
    g = torch.Generator().manual_seed(5)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4)
    if like == "ties":
        for p in module.parameters():
            p.detach().zero_()

    def draw(heads: int) -> Tensor:
        x = torch.randn(1, heads, length, c.head_dim, generator=g, dtype=torch.float64) * 1.5
        return x.round() if like == "ties" else x

    q, k, v = draw(c.num_heads), draw(c.kv_heads), draw(c.kv_heads)
    first = c.global_tokens
    if like == "equal leaves":
        some = slice(first + length // 4, first + length // 2)
        k[:, :, some] = k[:, :, some.start, None]
    if like == "ties":
        k[:, :, first:] = k[:, :, first : first + 4].repeat(1, 1, length, 1)[:, :, : length - first]
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad():
        if mask is None:
            want, got = module.oracle(q, k, v), written(c, parameters, q, k, v, **more)
        else:
            want, got = module.oracle(q, k, v, mask[None]), torch.zeros_like(q)
            alone = (x[:, :, mask] for x in (q, k, v))
            got[:, :, mask] = written(c, parameters, *alone, **more)
    assert got.isfinite().all()
    error = (got - want).norm() / want.norm()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (
            110,
            {
                "window": 8,
                "global_tokens": 3,
                "compression_factor": 2,
                "num_levels": 2,
                "calibration_factor": 0.4,
            },
        ),
        (
            110,
            {
                "window": 16,
                "global_tokens": 0,
                "compression_factor": 4,
                "num_levels": 1,
                "feature_fusion": "uniform",
                "stability_factor": 0.0,
            },
        ),
        # Levels a quarter of the window wide.
        (
            190,
            {
                "window": 32,
                "global_tokens": 5,
                "compression_factor": 8,
                "num_heads": 2,
                "num_kv_heads": 1,
                "compression_alpha": 100.0,
                "max_sequence_length": 512,
            },
        ),
        # A rate of 3, as near to 2 as to 4.
        (
            61,
            {
                "window": 8,
                "global_tokens": 4,
                "compression_factor": 4,
                "hidden_size": 28,
                "compression_alpha": 3 / math.log(2),
                "max_sequence_length": 2,
            },
        ),
        (61, {"window": 12, "global_tokens": 4, "rate": 3, "compression_factor": 2}),
        (80, {}),  # the default settings
    ],
)
def test_msra_from_the_page(length: int, fields: dict[str, Any], causal: bool) -> None:
    compare(MSRA(MSRAConfig(**SHAPE | fields, causal=causal)), msra, length)


DALA_SMALL = {
    "block_size": 2,
    "state_update_frequency": 3,
    "global_tokens": 3,
    "memory_size": 5,
    "window_max": 4,
    "decay_rate": 0.01,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (57, DALA_SMALL),
        (40, DALA_SMALL | {"decay": "literal", "importance_threshold": 0.3}),
        (
            40,
            DALA_SMALL
            | {
                "global_tokens": 0,
                "use_adaptive_router": False,
                "adaptive_window": False,
                "importance_threshold": 0.0,
            },
        ),
        (
            41,
            DALA_SMALL
            | {
                "memory_size": 100,
                "router_iterations": 0,
                "hidden_size": 28,
                "window_beta": 0.7,
                "max_sequence_length": 50,
            },
        ),
        (17, DALA_SMALL),  # three periods
        (40, DALA_SMALL | {"window": 3, "max_sequence_length": 2}),
        (80, {}),  # the default settings
    ],
)
def test_dala_from_the_page(length: int, fields: dict[str, Any], causal: bool) -> None:
    compare(DALA(DALAConfig(**SHAPE | fields, causal=causal)), dala, length)


@pytest.mark.parametrize("causal", [True, False])
def test_dala_from_the_page_where_scores_tie(causal: bool) -> None:
    """Without weights all scores are zero: the later tokens are remembered."""
    module = DALA(DALAConfig(**SHAPE | DALA_SMALL, importance_threshold=0.4, causal=causal))
    compare(module, dala, 35, like="ties")


UCSA_SMALL = {
    "leaf_max": 2,
    "local_window_size": 8,
    "query_block": 4,
    "candidate_blocks": 4,
    "compression_ratio": 0.5,
    "selected_blocks": 2,
    "global_tokens": 3,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (110, UCSA_SMALL),
        (
            90,
            UCSA_SMALL
            | {
                "query_block": 6,
                "local_window_size": 12,
                "coarse_nodes": False,
                "global_tokens": 0,
                "candidate_blocks": 6,
            },
        ),
        (
            100,
            UCSA_SMALL
            | {
                "compression_ratio": 0.3,
                "candidate_blocks": 7,
                "leaf_max": 5,
                "leaf_alpha": 100.0,
                "sparsity_factor": 0.15,
                "selected_blocks": 9,
            },
        ),
        (90, UCSA_SMALL | {"error_alpha": 0.3, "selected_blocks": 3, "hidden_size": 28}),
        (50, UCSA_SMALL | {"candidate_blocks": 1000}),  # no descent
        (90, UCSA_SMALL | {"leaf_size": 4, "max_sequence_length": 2}),
        (80, {}),  # the default settings
    ],
)
def test_ucsa_from_the_page(length: int, fields: dict[str, Any], causal: bool) -> None:
    compare(UCSA(UCSAConfig(**SHAPE | fields, causal=causal)), ucsa, length)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("error_alpha", [None, 0.0])
def test_ucsa_from_the_page_where_nodes_are_lossless(
    error_alpha: float | None, causal: bool
) -> None:
    fields = UCSA_SMALL | {"error_tolerance": 0.4, "error_alpha": error_alpha}
    compare(UCSA(UCSAConfig(**SHAPE | fields, causal=causal)), ucsa, 90, like="equal leaves")


@pytest.mark.parametrize("causal", [True, False])
def test_ucsa_from_the_page_where_scores_tie(causal: bool) -> None:
    """One voter of one head, or the order of a sum decides between equals."""
    fields = UCSA_SMALL | {"num_heads": 1, "num_kv_heads": 1}
    compare(UCSA(UCSAConfig(**SHAPE | fields, causal=causal)), ucsa, 90, like="ties")


@pytest.mark.parametrize("step", [0, 12])
def test_ucsa_from_the_page_in_training(step: int) -> None:
    fields = UCSA_SMALL | {"sparsity_start": 0.4, "sparsity_decay": 0.1, "candidate_blocks": 8}
    module = UCSA(UCSAConfig(**SHAPE | fields, causal=True)).train()
    anneal(module, step)
    compare(module, ucsa, 80, step=step)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_from_the_page(causal: bool) -> None:
    mask = torch.ones(52, dtype=torch.bool)
    mask[:5] = mask[30:33] = mask[-4:] = False
    small = {"window": 4, "global_tokens": 3, "compression_factor": 2}
    compare(MSRA(MSRAConfig(**SHAPE | small, causal=causal)), msra, 52, mask=mask)
    compare(DALA(DALAConfig(**SHAPE | DALA_SMALL, causal=causal)), dala, 52, mask=mask)
    compare(UCSA(UCSAConfig(**SHAPE | UCSA_SMALL, causal=causal)), ucsa, 52, mask=mask)
