"""Padding is no part of its sequence, wherever it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrids import SMALL, away_from_zero, hybrid
from small_mechanisms import small_dala, small_msra, small_ucsa
from torch import Tensor

import baselines  # noqa: F401 - registers them
from danon.attention import BaseAttention, registry
from danon.attention.padding import Compaction
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig
from danon.models import (
    create_dala_model,
    create_msra_model,
    create_super_hybrid_model,
    create_ucsa_model,
)
from danon.models.backbone import Backbone
from danon.models.short_convolution import ShortConvolution
from danon.testing import make_inputs, relative_error

N = 83
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_heads": 4}
MECHANISMS: dict[str, Callable[[bool], BaseAttention]] = {
    "msra": lambda causal: small_msra(causal, 2, calibration_factor=0.3),
    "dala": lambda causal: small_dala(causal, 2),
    "ucsa": lambda causal: small_ucsa(causal, 2),
    "select": lambda causal: hybrid("select", causal, 2, select_length=N),
    "blend": lambda causal: hybrid("blend", causal, 2),
}
BASELINES = ("sdpa", "sdpa-math", "window", "linear")
MODELS: dict[str, Callable[..., Backbone]] = {
    "msra": lambda **kw: create_msra_model(**SMALL["msra"], **kw),
    "dala": lambda **kw: create_dala_model(**SMALL["dala"], **kw),
    "ucsa": lambda **kw: create_ucsa_model(**SMALL["ucsa"], **kw),
    "blend": lambda **kw: create_super_hybrid_model(components=SMALL, mode="blend", **kw),
    "layers": lambda **kw: create_super_hybrid_model(components=SMALL, mode="layers", **kw),
}


def masks(length: int = N) -> Tensor:
    """Left, right, holes, everything, nothing and a single token: (6, length) bool."""
    at = torch.arange(length)
    holes = torch.rand(length, generator=torch.Generator().manual_seed(3)) > 0.4
    return torch.stack((at >= 29, at < length - 17, holes, at < 0, at >= 0, at == 40))


def made(name: str, causal: bool) -> BaseAttention:
    if name in MECHANISMS:
        module = MECHANISMS[name](causal)
    else:
        module = registry.get(name).build(AttentionConfig(**SHAPE, num_kv_heads=2, causal=causal))
    away_from_zero(module)
    return module.eval()


def alone(run: Callable[..., Tensor], x: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Run each row on its real tokens alone; return the outputs in place, zeros elsewhere."""
    outs = []
    for b, real in enumerate(mask):
        out = torch.where(mask[b, :, None], 0.0, x[0][b].double() * 0)
        if real.any():
            out = out.index_copy(
                1, real.nonzero()[:, 0], run(*(t[b : b + 1, :, real] for t in x))[0].double()
            )
        outs.append(out)
    return torch.stack(outs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*MECHANISMS, *BASELINES])
def test_rows_of_a_batch_get_what_they_get_alone(name: str, causal: bool) -> None:
    """Forward, backward and step in float32, against the float64 oracle without a mask."""
    module, mask = made(name, causal), masks()
    x = [t.requires_grad_() for t in make_inputs(module, N, batch=len(mask))[:3]]
    out, want = module(*x, mask), alone(module.oracle, tuple(x), mask)
    assert out.transpose(1, 2)[~mask].eq(0).all()
    assert relative_error(out, want) <= 1e-5
    assert relative_error(module.oracle(*x, mask), want) <= 1e-12
    wanted = [*x, *module.parameters()]
    grad = torch.randn(out.shape)
    found, exact = (
        torch.autograd.grad(y, wanted, g, allow_unused=True, materialize_grads=True)
        for y, g in ((out, grad), (want, grad.double()))
    )
    largest = max(float(e.norm()) for e in exact)
    for f, e in zip(found, exact, strict=True):
        assert float((f.double() - e.double()).norm()) <= 1e-4 * max(
            float(e.norm()), 1e-3 * largest
        )
    for f in found[:3]:
        assert f.transpose(1, 2)[~mask].eq(0).all()
    if causal and isinstance(module, StreamingAttention) and module.streams:
        stepped, state = module.step(*x, module.init_state(len(mask)), mask)
        assert state.lengths == tuple(mask.sum(1).tolist())
        torch.testing.assert_close(stepped, out.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["msra", "dala", "ucsa", "sdpa"])
def test_low_precision_rows_get_what_they_get_alone(name: str, causal: bool) -> None:
    module, mask = made(name, causal), masks()
    q, k, v, _ = make_inputs(module, N, batch=len(mask), dtype=torch.bfloat16)
    with torch.no_grad():
        got = module(q, k, v, mask)
        want, exact = (alone(run, (q, k, v), mask) for run in (module, module.oracle))
    assert got.dtype == torch.bfloat16
    assert relative_error(got, exact) <= 1.05 * relative_error(want, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*MECHANISMS, *BASELINES])
def test_nothing_in_a_masked_place_reaches_a_real_token(name: str, causal: bool) -> None:
    module, mask = made(name, causal), masks()
    x = make_inputs(module, N, batch=len(mask))[:3]
    found = []
    for value in (0.0, torch.nan, torch.inf, -torch.inf, 1e30):
        leaves = [torch.where(mask[:, None, :, None], t, value).requires_grad_() for t in x]
        out = module(*leaves, mask)
        wanted = [*leaves, *module.parameters()]
        grads = torch.autograd.grad(out, wanted, out.detach(), allow_unused=True)
        found.append([out, *(g for g in grads if g is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    assert all(bool(t.isfinite().all()) for t in found[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"candidate_blocks": 5, "compression_ratio": 0.5},
        {"candidate_blocks": 9, "compression_ratio": 0.25, "selected_blocks": 3},
        {"sparsity_factor": 0.3, "selected_blocks": 20},
        {"error_alpha": 0.5, "error_tolerance": 0.3},
        {"global_tokens": 0, "query_block": 8, "coarse_nodes": False},
        {"sparsity_start": 0.4, "sparsity_decay": 0.0},
    ],
)
def test_more_padding_on_the_right_changes_no_selection(fields: dict[str, Any]) -> None:
    """Depth, budget and error statistics are those of the sequence, not of the longest one."""
    module = small_ucsa(False, 2, **fields).double().train()
    away_from_zero(module)
    for n in (1, 5, 18, 19, 37, 60):
        q, k, v, _ = make_inputs(module, 150, dtype=torch.float64)
        k[:, :, 20:28] = k[:, :, 20:21]  # lossless nodes
        with torch.no_grad():
            want = module(*(t[:, :, :n] for t in (q, k, v)))
            for length in (n + 1, n + 2, n + 7, 80, 150):
                mask = (torch.arange(length) < n).expand(2, -1)
                got = module(*(t[:, :, :length] for t in (q, k, v)), mask)
                torch.testing.assert_close(got[:, :, :n], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_a_padded_batch_as_it_steps_through_it(name: str) -> None:
    """Rotary positions, too, count real tokens only."""
    model = MODELS[name](**SHAPE, num_layers=3, vocab_size=50, task="lm").eval()
    mask = masks()
    ids = torch.randint(50, mask.shape)
    with torch.no_grad():
        out = model(ids, mask)
        stepped, state = model.step(ids, model.init_state(len(mask)), mask)
        torch.testing.assert_close(stepped, out, rtol=1e-4, atol=1e-5)
        assert out[~mask].eq(0).all() and state.lengths == tuple(mask.sum(1).tolist())
        for b, real in enumerate(mask):
            if real.any():
                torch.testing.assert_close(
                    out[b, real], model(ids[b : b + 1, real])[0], rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("task", ["encoder", "classifier"])
@pytest.mark.parametrize("name", MODELS)
def test_a_bidirectional_model_reads_each_row_alone(name: str, task: Any) -> None:
    model = MODELS[name](**SHAPE, num_layers=2, vocab_size=50, task=task).eval()
    mask = masks()
    ids = torch.randint(50, mask.shape)
    with torch.no_grad():
        out = model(ids, mask)
        for b, real in enumerate(mask):
            if real.any():
                got = out[b, real] if task == "encoder" else out[b]
                want = model(ids[b : b + 1, real])[0]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("create", [create_msra_model, create_dala_model, create_ucsa_model])
def test_one_pad_token_before_3000_tokens_with_default_settings(
    create: Callable[..., Backbone],
) -> None:
    model = create(hidden_size=64, num_heads=2, num_layers=1, vocab_size=50, task="lm").eval()
    ids, mask = torch.randint(50, (2, 3000)), torch.ones(2, 3000, dtype=torch.long)
    mask[0, 0] = 0
    with torch.no_grad():
        stepped, _ = model.step(ids, model.init_state(2), mask)
        assert relative_error(model(ids, mask), stepped.double()) <= 1e-5


def test_a_convolution_reads_no_padding() -> None:
    config = AttentionConfig(**SHAPE, causal=True)
    module, mask = ShortConvolution(config), masks()
    x = make_inputs(module, N, batch=len(mask))[:3]
    want = alone(module, x, mask)
    holes = ~mask[:, None, :, None]
    got = module(*(t.masked_fill(holes, torch.nan) for t in x), mask)
    torch.testing.assert_close(got.double(), want)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_zeros_and_ones_of_any_type_are_a_mask(dtype: torch.dtype) -> None:
    module, mask = made("msra", True), masks()
    x = make_inputs(module, N, batch=len(mask))[:3]
    assert torch.equal(module(*x, mask.to(dtype)), module(*x, mask))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (-torch.inf, "-inf"),
        (torch.nan, "nan"),
        (torch.finfo(torch.float32).min, "-3.4"),
        (-1e9, "-1000000000.0"),
        (2.0, "2.0"),
        (0.5, "0.5"),
    ],
)
def test_a_mask_with_other_values_is_refused(value: float, named: str) -> None:
    """An additive mask (0 for a token) would be read the wrong way round."""
    module, model = made("ucsa", True), MODELS["msra"](**SHAPE, vocab_size=50, task="lm")
    x = make_inputs(module, N)[:3]
    mask = torch.zeros(2, N)
    mask[0, 3:] = value
    ids = torch.zeros(2, N, dtype=torch.long)
    calls: list[Callable[[], Any]] = [
        lambda: module(*x, mask),
        lambda: made("sdpa", True)(*x, mask),
        lambda: hybrid("blend")(*make_inputs(hybrid("blend"), N)[:3], mask),
        lambda: module.step(*x, module.init_state(2), mask),
        lambda: model(ids, mask),
        lambda: model.step(ids, model.init_state(2), mask),
        lambda: model.generate(ids, 1, attention_mask=mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"mask holds {named}.*: must be bool, or 1 for a"):
            call()


def test_a_mask_on_another_device_is_refused() -> None:
    model = MODELS["msra"](**SHAPE, vocab_size=50)
    with pytest.raises(
        ValueError, match="attention_mask is on meta: must be on cpu like input_ids"
    ):
        model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, device="meta"))


def test_expanded_tokens_are_those_that_were_compacted() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]) == 1
    moved = Compaction.of(mask)
    assert moved is not None
    assert torch.equal(moved.real, mask.int().sort(dim=1, descending=True).values == 1)
    for shape in ((4, 5, 2), (4, 3, 5, 2), (4, 1, 2, 5, 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        hidden = ~mask.view(4, *[1] * (len(shape) - 3), 5, 1)
        assert torch.equal(moved.expand(moved.compact(x)), x.masked_fill(hidden, 0.0))
        assert torch.autograd.gradcheck(moved.compact, x)
        assert torch.autograd.gradgradcheck(moved.expand, x)
    assert Compaction.of(mask[1:2]) is None
    stays = Compaction.of(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert stays is not None and stays.source is None
