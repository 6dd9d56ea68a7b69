"""Second derivatives, torch.func, batched gradients, tensors without values: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_compile import DALA_SMALL, MECHANISMS, SHAPE, learned
from torch import Tensor
from torch.autograd import forward_ad

import baselines  # noqa: F401 - registers them
from baselines.xformers import XFormers
from danon import create_msra_model
from danon.attention import DALA, BaseAttention, registry
from danon.attention.union.first_order import first_order_only
from danon.config import AttentionConfig, DALAConfig
from danon.testing import make_inputs, relative_error

N = 57
OTHERS = [name for name in registry.names() if name not in (*MECHANISMS, "super-hybrid")]

REFUSE = ("sdpa", "window")
"""Baselines whose PyTorch kernel says itself that it has no second derivative."""


def ours(name: str, causal: bool = True, **settings: object) -> BaseAttention:
    if name == "literal decay":
        made: BaseAttention = DALA(
            DALAConfig(**SHAPE, **DALA_SMALL, causal=causal, decay="literal")
        )
    else:
        made = MECHANISMS[name](causal)
    made = type(made)(replace(made.config, **settings))  # type: ignore[call-arg, arg-type]
    learned(made)
    return made.eval()


def penalties(
    attend: Callable[..., Tensor], leaves: list[Tensor], parameters: list[Tensor], power: int
) -> tuple[Tensor | None, ...]:
    """Gradients of the squared gradients of a loss, linear or quadratic in the output."""
    wrt = [*leaves, *parameters]
    out = attend(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out**power * weight).sum()
    first = torch.autograd.grad(loss, wrt, create_graph=True, allow_unused=True)
    total = sum(x.double().square().sum() for x in first if x is not None)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, wrt, allow_unused=True)


def assert_seconds_are_the_oracles(
    module: BaseAttention, power: int, *, padded: bool = False, other: BaseAttention | None = None
) -> None:
    """Second derivatives of a module agree with those of its (or another one's) definition."""
    x = make_inputs(module, N, padded=padded)
    rows = torch.arange(N)
    rows = rows[~module.undecided_rows(*x, rows=rows)]
    exact, parameters = other or module, list(module.parameters())
    if module.oracle_kind != "definition":  # a copy, with parameters of its own
        parameters = []
    got = penalties(
        lambda q, k, v: module(q, k, v, x.mask)[:, :, rows],
        [t.clone().requires_grad_() for t in x[:3]],
        parameters,
        power,
    )
    want = penalties(
        lambda q, k, v: exact.oracle(q, k, v, x.mask, rows),
        [t.double().requires_grad_() for t in x[:3]],
        parameters,
        power,
    )
    floor = 1e-3 * max(float(b.norm()) for b in want if b is not None)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            # Rounding in float32: up to 2e-5, by the processor.
            assert float((a.double() - b).norm()) <= 4e-5 * max(floor, float(b.norm()))


@pytest.mark.parametrize(
    ("causal", "padded", "power"), [(True, False, 1), (True, False, 2), (False, True, 1)]
)
@pytest.mark.parametrize("name", [*MECHANISMS, "literal decay"])
def test_the_dense_kernel_has_second_derivatives(
    name: str, causal: bool, padded: bool, power: int
) -> None:
    assert_seconds_are_the_oracles(ours(name, causal, kernel="dense"), power, padded=padded)


def test_wrong_second_derivatives_are_found() -> None:
    module = ours("dala", kernel="dense")
    wrong = ours("dala", kernel="dense", decay_rate=0.02)
    wrong.load_state_dict(module.state_dict())
    with pytest.raises(AssertionError):
        assert_seconds_are_the_oracles(module, 1, other=wrong)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", [*MECHANISMS, "literal decay"])
def test_other_kernels_refuse_second_derivatives(name: str, power: int) -> None:
    module = ours(name)
    leaves = [t.requires_grad_() for t in make_inputs(module, N)[:3]]
    with pytest.raises(NotImplementedError, match="build the attention with kernel='dense'"):
        penalties(module, leaves, list(module.parameters()), power)
    # First derivatives that nobody differentiates are as they were.
    first, plain = (
        torch.autograd.grad(module(*leaves).sum(), leaves, create_graph=graph, allow_unused=True)
        for graph in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True) if a is not None)


def test_a_gradient_penalty_trains_a_model() -> None:
    model = create_msra_model(
        **SHAPE,
        num_layers=1,
        vocab_size=50,
        task="lm",
        window=8,
        compression_factor=2,
        global_tokens=3,
        kernel="dense",
    )
    ids = torch.randint(50, (2, N), generator=torch.Generator().manual_seed(0))
    weights = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(
        model(ids).square().mean(), weights, create_graph=True, allow_unused=True
    )
    penalty = sum(x.square().sum() for x in first if x is not None)
    assert isinstance(penalty, Tensor)
    penalty.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in weights)


@pytest.mark.parametrize("name", OTHERS)
def test_a_baseline_is_right_or_refuses(name: str) -> None:
    shape = AttentionConfig(hidden_size=32, num_heads=2, causal=True, max_sequence_length=N)
    kind, cpu = registry.get(name), torch.device("cpu")
    if why := kind.unavailable(shape, length=N, dtype=torch.float32, device=cpu, backward=True):
        pytest.skip(why)
    module = kind.build(shape).eval()
    if name in REFUSE:
        with pytest.raises(RuntimeError, match=r"derivative for aten::\w+ is not implemented"):
            assert_seconds_are_the_oracles(module, 1)
    else:
        assert_seconds_are_the_oracles(module, 1)


def test_a_kernel_from_elsewhere_is_guarded() -> None:
    class Package(torch.autograd.Function):
        """Square, whose backward autograd takes for a constant, as it does a Triton kernel's."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return x.square()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return (2 * x * grad).detach()

    x = torch.tensor(3.0, requires_grad=True)
    (silent,) = torch.autograd.grad(Package.apply(x * 1), x, create_graph=True)
    assert torch.autograd.grad(silent + 0 * x, x)[0] == 0  # it should be 2
    (guarded,) = first_order_only("there are none", x)
    (first,) = torch.autograd.grad(Package.apply(guarded), x, create_graph=True)
    assert first == 6
    with pytest.raises(NotImplementedError, match="there are none"):
        torch.autograd.grad(first, x)
    (guarded,) = XFormers.once(object.__new__(XFormers), x)
    (first,) = torch.autograd.grad(Package.apply(guarded), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"through xformers: .* sdpa-math has them"):
        torch.autograd.grad(first, x)


# What torch.func.jvp imports is deprecated by PyTorch itself.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", MECHANISMS)
def test_transforms_are_refused(name: str) -> None:
    module = ours(name)
    q, k, v, _ = make_inputs(module, N)
    parameters = dict(module.named_parameters())

    def loss(**given: Tensor) -> Tensor:
        return torch.func.functional_call(module, given, (q, k, v)).sum()

    def batched() -> object:
        out = module(q.requires_grad_(), k, v)
        return torch.autograd.grad(out, q, torch.ones(3, *out.shape), is_grads_batched=True)

    for call in (
        lambda: torch.func.grad(lambda x: module(x, k, v).sum())(q),
        lambda: torch.func.grad(lambda given: loss(**given))(parameters),
        lambda: torch.func.vmap(lambda *x: module(*(t[None] for t in x)))(q, k, v),
        lambda: torch.func.jvp(lambda x: module(x, k, v), (q,), (q,)),
        batched,
    ):
        with pytest.raises(ValueError, match=r"use torch.autograd.grad, for gradients of each"):
            call()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        module(forward_ad.make_dual(q.detach(), q.detach()), k, v)


def test_gradients_of_each_sample_come_one_by_one() -> None:
    module = ours("ucsa")
    x = make_inputs(module, N, batch=3)
    whole = module(*x).square().sum()
    of_whole = torch.autograd.grad(whole, list(module.parameters()), allow_unused=True)
    each = [
        torch.autograd.grad(
            module(*(t[i : i + 1] for t in x[:3])).square().sum(),
            list(module.parameters()),
            allow_unused=True,
        )
        for i in range(3)
    ]
    for total, *parts in zip(of_whole, *each, strict=True):
        if total is not None:
            assert relative_error(torch.stack(parts).sum(0), total.double()) <= 1e-4


def test_samples_of_a_model_are_not_mapped() -> None:
    model = create_msra_model(hidden_size=32, num_layers=1, vocab_size=50)
    ids = torch.randint(50, (2, N))
    with pytest.raises(ValueError, match="give batches as dimension B"):
        torch.func.vmap(lambda row: model(row[None]))(ids)


@pytest.mark.parametrize("name", MECHANISMS)
def test_tensors_without_values_are_refused(name: str) -> None:
    module = ours(name)
    q, k, v, _ = (None if t is None else t.to("meta") for t in make_inputs(module, N))
    with pytest.raises(ValueError, match=r"q is on meta, .*: must have some.*output .* is like q"):
        module(q, k, v)
    model = create_msra_model(hidden_size=32, num_layers=1, vocab_size=50).to("meta")
    with pytest.raises(ValueError, match="input_ids is on meta"):
        model(torch.zeros(2, 9, dtype=torch.int64, device="meta"))
