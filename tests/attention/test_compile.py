"""torch.compile: each mechanism is one graph, forward and backward, and computes the same."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from danon.attention import DALA, MSRA, UCSA, BaseAttention
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.union.plan import BranchCall, FlatPlan, ScaledBias, VisibilityMask
from danon.attention.union.tiles import Rows, Tiles
from danon.config import DALAConfig, MSRAConfig, UCSAConfig
from danon.config.hybrid import SuperHybridConfig
from danon.measure.torch_settings import open_autocast_regions
from danon.models import create_dala_model, create_msra_model, create_ucsa_model
from danon.models.backbone import Backbone
from danon.testing import make_inputs

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
MSRA_SMALL: dict[str, Any] = {"window": 8, "global_tokens": 3, "compression_factor": 2}
DALA_SMALL: dict[str, Any] = {
    "block_size": 8,
    "state_update_frequency": 2,
    "global_tokens": 3,
    "memory_size": 10,
    "window_max": 6,
}
UCSA_SMALL: dict[str, Any] = {
    "leaf_max": 2,
    "local_window_size": 8,
    "query_block": 4,
    "candidate_blocks": 8,
    "selected_blocks": 2,
    "global_tokens": 3,
}
MECHANISMS: dict[str, Callable[[bool], BaseAttention]] = {
    "msra": lambda causal: MSRA(MSRAConfig(**SHAPE, **MSRA_SMALL, causal=causal)),
    "dala": lambda causal: DALA(DALAConfig(**SHAPE, **DALA_SMALL, causal=causal)),
    "ucsa": lambda causal: UCSA(UCSAConfig(**SHAPE, **UCSA_SMALL, causal=causal)),
}
HYBRID: dict[str, Any] = {
    **SHAPE,
    "causal": True,
    "select_length": 64,
    "components": {"msra": MSRA_SMALL, "dala": DALA_SMALL, "ucsa": UCSA_SMALL},
}
FORMS: dict[str, Callable[[], BaseAttention]] = {
    "literal decay": lambda: DALA(DALAConfig(**SHAPE, **DALA_SMALL, causal=True, decay="literal")),
    "select": lambda: SuperHybrid(SuperHybridConfig(**HYBRID, mode="select")),
    "blend": lambda: SuperHybrid(SuperHybridConfig(**HYBRID, mode="blend")),
}
MODELS: dict[str, Callable[[], Backbone]] = {
    "msra": lambda: create_msra_model(
        **SHAPE, **MSRA_SMALL, num_layers=1, vocab_size=50, task="lm", gradient_checkpointing=True
    ),
    "dala": lambda: create_dala_model(
        **SHAPE, **DALA_SMALL, num_layers=1, vocab_size=50, task="classifier"
    ),
    "ucsa": lambda: create_ucsa_model(
        **SHAPE, **UCSA_SMALL, num_layers=1, vocab_size=50, task="lm"
    ),
}
N = 33


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def assert_same(
    module: nn.Module,
    compiled: Callable[..., Tensor],
    leaves: list[Tensor],
    *args: Tensor | None,
    exact: bool = True,
) -> None:
    """Output and gradients of what is compiled are those of the module itself."""
    found = []
    for run in (module, compiled):
        out: Tensor = run(*leaves, *args)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        found.append((out, *torch.autograd.grad(out, wanted, grad, allow_unused=True)))
    # The kernels are the same; elsewhere a compiler may add in another order.
    scale = max(float(x.detach().abs().max()) for x in found[0] if x is not None)
    for want, got in zip(*found, strict=True):
        assert (want is None) == (got is None)
        if want is not None and got is not None:
            bound = 1e-6 * scale if exact else 1e-4 * scale
            torch.testing.assert_close(got, want, rtol=1e-5 if exact else 1e-3, atol=bound)


def learned(module: nn.Module) -> None:
    """Parameters away from where they start, so that each has a gradient."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def assert_one_graph(module: BaseAttention, padded: bool) -> None:
    """Compiled without a graph break it computes the same, forward and backward."""
    learned(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = make_inputs(module, N, padded=padded)
    assert_same(module, compiled, [t.requires_grad_() for t in x[:3]], x.mask)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_is_one_graph_and_computes_the_same(name: str, causal: bool) -> None:
    assert_one_graph(MECHANISMS[name](causal), padded=not causal)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "blend")) for n in FORMS]
)
def test_other_forms_are_one_graph_and_compute_the_same(name: str) -> None:
    assert_one_graph(FORMS[name](), padded=False)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MECHANISMS)
def test_other_masks_are_one_graph_and_compute_the_same(name: str, causal: bool) -> None:
    assert_one_graph(MECHANISMS[name](causal), padded=causal)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "msra")) for n in MODELS]
)
def test_a_model_is_one_graph_and_computes_the_same(name: str) -> None:
    model = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, [torch.randint(50, (2, N))], torch.rand(2, N) > 0.3)


# PyTorch's code generator imports what PyTorch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MECHANISMS)
def test_generated_code_computes_the_same(name: str) -> None:
    module = MECHANISMS[name](True)
    learned(module)
    x = make_inputs(module, N)
    compiled = torch.compile(module, fullgraph=True)
    assert_same(module, compiled, [t.requires_grad_() for t in x[:3]], None, exact=False)


@pytest.mark.parametrize(
    "make", [lambda: MECHANISMS["msra"](True), FORMS["select"]], ids=["msra", "select"]
)
def test_a_new_length_is_one_more_graph_and_known_ones_are_kept(
    make: Callable[[], BaseAttention],
) -> None:
    module = make()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=count)
    for length, made in ((N, 1), (40, 2), (41, 3), (N, 3), (40, 3)):
        x = make_inputs(module, length)
        torch.testing.assert_close(compiled(*x), module(*x))
        assert len(graphs) == made


def test_more_lengths_than_the_limit_end_and_padding_needs_one_graph() -> None:
    assert torch._dynamo.config.recompile_limit == 8  # as the README says
    module, lengths, counter = MECHANISMS["msra"](True).eval(), (20, 23, 26), CompileCounter()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for length in lengths[:2]:
            compiled(*make_inputs(module, length))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(*make_inputs(module, lengths[2]))
        with torch._dynamo.config.patch(recompile_limit=3):
            compiled(*make_inputs(module, lengths[2]))
        torch._dynamo.reset()
        counter.clear()
        for length in lengths:
            q, k, v, _ = make_inputs(module, length)
            fill = 32 - length
            mask = F.pad(torch.ones(2, length), (0, fill))
            got = compiled(*(F.pad(x, (0, 0, 0, fill)) for x in (q, k, v)), mask)
            torch.testing.assert_close(got[:, :, :length], module(q, k, v))
        assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        ("msra", True),
        pytest.param("dala", False, marks=pytest.mark.slow),
        pytest.param("ucsa", False, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_padding_anywhere_and_refuses_additive_masks(
    name: str, causal: bool
) -> None:
    module, graphs = MECHANISMS[name](causal), []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=count)
    q, k, v, holes = make_inputs(module, N, padded=True)
    assert holes is not None
    at = torch.arange(N).expand(2, -1)
    for mask in (holes, at >= 20, at < 30, at >= 0, at < 0):
        given = mask.float()
        torch.testing.assert_close(compiled(q, k, v, given), module(q, k, v, given))
    assert len(graphs) == 1
    for additive in (torch.where(holes, 0.0, -torch.inf), torch.where(holes, 0.0, -1e9)):
        for precision in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            refused = pytest.raises(RuntimeError, match="mask holds other values than 0 and 1")
            with refused, precision:
                compiled(q, k, v, additive)
            assert open_autocast_regions() == 0


def test_the_union_is_one_operator_of_the_graph() -> None:
    module = MECHANISMS["msra"](True)
    found = torch._dynamo.explain(module)(*make_inputs(module, N))
    assert found.graph_count == 1 and found.break_reasons == []
    names = [str(node.target) for node in found.graphs[0].graph.nodes]
    assert len([name for name in names if name.startswith("danon.union")]) == 1


def test_an_attention_that_breaks_the_graph_is_found() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MECHANISMS["msra"](True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.inner(q, k, v, mask)
            return out if bool(out.isfinite().all()) else torch.zeros_like(out)

    module = Breaking()
    x = make_inputs(module.inner, N)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(module, fullgraph=True, backend="eager")(*x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert len(torch._dynamo.explain(module)(*x).break_reasons) == 1


def test_a_wrong_compiled_result_is_found() -> None:
    module = MECHANISMS["msra"](True)
    leaves = [t.requires_grad_() for t in make_inputs(module, N)[:3]]
    with pytest.raises(AssertionError):
        assert_same(module, lambda q, k, v: module(q, k, 1.001 * v), leaves)


def test_a_compiled_module_can_be_copied_and_saved() -> None:
    module = MECHANISMS["msra"](True)
    x = make_inputs(module, N)
    want = torch.compile(module, fullgraph=True, backend="eager")(*x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert torch.equal(other(*x), want)


def test_calls_are_rebuilt_from_a_flat_plan() -> None:
    tensor = torch.randn
    calls = [
        BranchCall(1, Tiles(3, 2, 4, 5), Tiles(0, 7, 4, 5), causal=True, offset=0.5, shift=2),
        BranchCall(
            0, Tiles(0, 1, 2, 3), Rows(torch.arange(4).view(2, 1, 2), 3), bias=tensor(2, 1, 3, 6)
        ),
        BranchCall(
            2,
            Tiles(0, 1, 2, 3),
            Tiles(0, 1, 2, 4),
            bias=VisibilityMask(tensor(2, 1, 1) > 0, tensor(2, 1, 3, 1) > 0, heads=2, size=2),
        ),
        BranchCall(
            0,
            Tiles(0, 1, 2, 3),
            Tiles(0, 1, 2, 4),
            profile=ScaledBias(1, tensor(3, 4), lambda: (calls[1].bias, calls[1].bias)),
        ),
    ]
    made = FlatPlan.of(calls, scale=0.5).calls()
    for old, new in zip(calls, made, strict=True):
        for field in ("source", "q", "causal", "offset", "shift"):
            assert getattr(old, field) == getattr(new, field)
    assert made[0].k == calls[0].k and made[0].bias is None and made[0].profile is None
    assert isinstance(made[1].k, Rows) and made[1].k.size == 3
    assert made[1].k.index is calls[1].k.index and made[1].bias is calls[1].bias
    assert torch.equal(made[2].bias(0, 2), calls[2].bias(0, 2))
    profile = made[3].profile
    assert profile is not None and profile.scale == 1
    assert profile.values is calls[3].profile.values and profile.factors()[0] is calls[1].bias
