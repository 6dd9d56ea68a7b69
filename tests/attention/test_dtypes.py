"""Dtypes that are nobody's business: the default one, the parameters', what autocast asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_compile import FORMS, MECHANISMS
from torch import Tensor

import baselines  # noqa: F401 - registers them
from danon.attention import BaseAttention, registry
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig
from danon.testing import make_inputs, relative_error

N = 57
OURS: dict[str, Any] = {
    **{f"{name} causal": lambda make=make: make(True) for name, make in MECHANISMS.items()},
    **{f"{name} both sides": lambda make=make: make(False) for name, make in MECHANISMS.items()},
    **FORMS,
}
EXTRA = ("msra", "dala", "ucsa", "super-hybrid")
OTHERS = [name for name in registry.names() if name not in EXTRA]
DEFAULTS = [torch.float16, torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
ERRORS = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Yield a default dtype for the test to set, and restore float32 afterwards."""
    yield request.param
    torch.set_default_dtype(torch.float32)


def trained(module: BaseAttention) -> BaseAttention:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float32) * 0.3)
    return module.eval()


def results(module: BaseAttention, *, padded: bool) -> list[Tensor]:
    """Output, gradients, auxiliary loss and oracle; of a stream what comes out of its steps."""
    x = make_inputs(module, N, padded=padded)
    leaves = [t.requires_grad_() for t in x[:3]]
    torch.manual_seed(0)  # UCSA's information loss draws
    out = module.train()(*leaves, x.mask)
    loss = module.auxiliary_loss()
    wrt = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view_as(out)
    grads = torch.autograd.grad((out * grad).sum() + loss, wrt, allow_unused=True)
    rows = torch.tensor([0, 20, N - 1])
    found = [out, loss, *(t for t in grads if t is not None), module.oracle(*x, rows=rows)]
    if isinstance(module, StreamingAttention) and module.streams and module.config.is_causal:
        state = module.init_state(2, dtype=torch.float32)
        for places in torch.arange(N).split([1, 20, 1, N - 22]):
            q, k, v = (t[:, :, places] for t in x[:3])
            here = None if x.mask is None else x.mask[:, places]
            out, state = module.step(q, k, v, state, here)
            found.append(out)
    return found


def assert_default_changes_nothing(module: BaseAttention, default: torch.dtype) -> None:
    for padded in (False, True):
        torch.set_default_dtype(torch.float32)
        want = results(module, padded=padded)
        torch.set_default_dtype(default)
        got = results(module, padded=padded)
        for a, b in zip(want, got, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("default_dtype", DEFAULTS, indirect=True)
@pytest.mark.parametrize("name", OURS)
def test_the_default_dtype_changes_nothing(name: str, default_dtype: torch.dtype) -> None:
    assert_default_changes_nothing(trained(OURS[name]()), default_dtype)


@pytest.mark.parametrize("default_dtype", [torch.float16], indirect=True)
def test_a_bias_in_the_default_dtype_is_found(
    monkeypatch: pytest.MonkeyPatch, default_dtype: torch.dtype
) -> None:
    import danon.attention.msra.layer as place
    from danon.attention.kernels.base import HIDDEN

    monkeypatch.setattr(place, "hide", lambda seen: torch.where(seen, 0.0, HIDDEN))
    with pytest.raises(AssertionError):
        assert_default_changes_nothing(trained(OURS["msra both sides"]()), default_dtype)


def baseline(name: str) -> BaseAttention:
    """Return the baseline, or skip the test with the reason why it does not run here."""
    shape = AttentionConfig(hidden_size=32, num_heads=2, causal=True, max_sequence_length=N)
    kind, cpu = registry.get(name), torch.device("cpu")
    if why := kind.unavailable(shape, length=N, dtype=torch.float32, device=cpu, backward=True):
        pytest.skip(why)
    return kind.build(shape)


@pytest.mark.parametrize("name", OTHERS)
def test_autocast_leaves_a_baseline_alone(name: str) -> None:
    module = baseline(name).eval()
    x = make_inputs(module, N)
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(*x)
    assert inside.dtype == torch.float32 and torch.equal(inside, module(*x))


@pytest.mark.parametrize("default_dtype", [torch.float16], indirect=True)
@pytest.mark.parametrize("name", OTHERS)
def test_the_default_dtype_changes_no_baseline(name: str, default_dtype: torch.dtype) -> None:
    module = baseline(name).train()
    want = results(module, padded=False)
    torch.set_default_dtype(default_dtype)
    for a, b in zip(want, results(module, padded=False), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(
    ("parameters", "inputs"),
    [
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", [name for name in OURS if "both" not in name])
def test_parameters_of_another_dtype_than_the_inputs(
    name: str, parameters: torch.dtype, inputs: torch.dtype
) -> None:
    module = trained(OURS[name]()).to(parameters)
    x = make_inputs(module, N, dtype=inputs)
    leaves = [t.requires_grad_() for t in x[:3]]
    out = module(*leaves)
    wrt = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(out.square().sum(), wrt, allow_unused=True)
    assert all(a is None or a.dtype == b.dtype for a, b in zip(grads, wrt, strict=True))
    rows = torch.tensor([3, 20, 40, N - 1])
    rows = rows[~module.undecided_rows(*x, rows=rows)]
    assert len(rows) >= 2 and out.dtype == inputs
    assert relative_error(out[:, :, rows], module.oracle(*x, rows=rows)) <= ERRORS[inputs]
    assert isinstance(module, StreamingAttention)
    state, outs = module.init_state(2, dtype=inputs), []
    for places in torch.arange(N).split([1, 20, 1, N - 22]):
        step, state = module.step(*(t[:, :, places] for t in x[:3]), state)
        outs.append(step)
    assert relative_error(torch.cat(outs, 2), out.double()) <= ERRORS[inputs]
