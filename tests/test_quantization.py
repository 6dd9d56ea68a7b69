"""Fewer bits in linear layers: what a plan changes, how exact it stays, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from danon import create_dala_model, create_msra_model, create_ucsa_model
from danon.models import Backbone
from danon.quantization import KINDS, model_bytes, quantize, quantize_dynamic

IDS = torch.randint(256, (1, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Backbone:
    torch.manual_seed(0)
    made = create_msra_model(hidden_size=128, num_heads=2, num_layers=2, vocab_size=256, task="lm")
    nn.init.normal_(made.embed.weight)
    return made.eval()


@torch.no_grad()
def error(changed: nn.Module, model: nn.Module) -> float:
    out, exact = (some(IDS).double() for some in (changed, model))
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("kind", "most"), [("bfloat16", 0.01), ("int8-dynamic", 0.03), ("int8-weight-only", 0.02)]
)
def test_a_narrow_model_is_smaller_and_nearly_as_exact(
    model: Backbone, kind: str, most: float
) -> None:
    if kind != "bfloat16":
        pytest.importorskip("torchao")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    changed = quantize(model, {"": kind})
    assert 1e-5 < error(changed, model) < most
    share = 0.5 if kind == "bfloat16" else 0.25
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    saved = (model_bytes(model) - model_bytes(changed)) / linear
    assert 0.9 * (1 - share) < saved <= 1 - share
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    ((out), _) = changed.generate(IDS, 3)
    assert out.shape == (1, 3)  # it streams, too


def test_the_inner_part_decides(model: Backbone) -> None:
    changed = quantize(
        model, {"layers": "bfloat16", "layers.1": "float32", "layers.1.down": "bfloat16"}
    )
    kinds = {n: m.weight.dtype for n, m in changed.named_modules() if isinstance(m, nn.Linear)}
    for name, dtype in kinds.items():
        narrow = name.startswith("layers.0") or name == "layers.1.down"
        assert (dtype == torch.bfloat16) == narrow, name


def test_weights_that_are_shared_count_once() -> None:
    shared = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    shared[1].weight = shared[0].weight
    assert model_bytes(shared) == 8 * 8 * 4


def test_a_bias_stays() -> None:
    layer = nn.Sequential(nn.Linear(64, 32))
    x: Tensor = torch.randn(3, 64)
    torch.testing.assert_close(quantize(layer, {"0": "bfloat16"})(x), layer(x), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 64)])
def test_a_layer_may_get_no_tokens(kind: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("torchao")
    layer = nn.Sequential(nn.Linear(64, 32))
    out = quantize(layer, {"": kind})(torch.zeros(shape))
    torch.testing.assert_close(out, layer(torch.zeros(shape)), atol=0.02, rtol=0)


@pytest.mark.parametrize("create", [create_msra_model, create_dala_model, create_ucsa_model])
def test_a_model_in_eight_bits_streams_what_it_gives_on_the_whole(
    create: Callable[..., Backbone],
) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(1)
    made = create(hidden_size=64, num_heads=1, num_layers=1, vocab_size=256, task="lm").eval()
    model = quantize_dynamic(made)
    state, outs = model.init_state(1), []
    for chunk in IDS.split([1, 40, 55], 1):  # DALA scores none of the first 41 tokens
        out, state = model.step(chunk, state)
        outs.append(out)
    whole = model(IDS).detach()
    assert float((torch.cat(outs, 1) - whole).norm()) <= 0.03 * float(whole.norm())
    assert model.generate(IDS[:, :1], 3)[0].shape == (1, 3)


def test_all_of_a_model_at_once(model: Backbone) -> None:
    pytest.importorskip("torchao")
    assert error(quantize_dynamic(model), model) == error(
        quantize(model, {"": "int8-dynamic"}), model
    )


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"": "int4"}, f"'int4': must be one of {', '.join(KINDS)}"),
        (
            {"layers.7": "bfloat16"},
            "no linear layer in 'layers.7'; it has layers.0.qkv, layers.0.out",
        ),
        ({"embed": "bfloat16"}, "no linear layer in 'embed'"),
    ],
)
def test_a_plan_of_another_model_is_refused(
    model: Backbone, plan: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        quantize(model, plan)


def test_a_model_that_is_narrow_already_is_refused(model: Backbone) -> None:
    with pytest.raises(ValueError, match=r"layers.0.qkv is torch.bfloat16: must be torch.float32"):
        quantize(model.bfloat16(), {"": "bfloat16"})


def test_without_torchao_the_extra_is_named(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"danon\[quantization\]"):
        quantize_dynamic(model)
