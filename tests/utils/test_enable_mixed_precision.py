"""The forward pass of any model under autocast, and back."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danon import create_msra_model
from danon.measure.torch_settings import open_autocast_regions
from danon.utils import enable_mixed_precision

BF16 = torch.bfloat16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 2)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return self.part(x) * (2 if twice else 1)


X = torch.ones(1, 4)


def test_forward_is_narrow_and_the_weights_are_not() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    undo = enable_mixed_precision(model)
    out = model(X, twice=True)
    with torch.autocast("cpu", BF16):
        expected = Model.forward(model, X, True)
    assert out.dtype == BF16 and torch.equal(out, expected)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert model.part(X).dtype == torch.float32  # a part on its own is as it was
    undo()
    assert model(X).dtype == torch.float32 and "forward" not in model.__dict__


def test_it_trains() -> None:
    model = create_msra_model(hidden_size=16, num_heads=2, num_layers=1, vocab_size=8, task="lm")
    enable_mixed_precision(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(32)[None] % 8
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_calls_may_be_repeated() -> None:
    model = Model()
    undos = [enable_mixed_precision(model), enable_mixed_precision(model, torch.float16)]
    assert model(X).dtype == torch.float16
    undos[0]()
    assert model(X).dtype == torch.float32
    undos[1]()  # nothing is left to undo
    assert model(X).dtype == torch.float32


def test_own_forward_of_an_instance_comes_back() -> None:
    model = Model()

    def own(x: Tensor) -> Tensor:
        return model.part(x) + 1

    model.forward = own
    undo = enable_mixed_precision(model)
    enable_mixed_precision(model)
    assert model(X).dtype == BF16
    assert (model(X) - model.part(X) - 1).abs().max() < 2e-2
    undo()
    assert model.forward is own


def test_errors_close_the_region() -> None:
    model = Model()
    enable_mixed_precision(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 5))
    assert open_autocast_regions() == 0 and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copies_have_weights_of_their_own(how: Any) -> None:
    model = Model()
    enable_mixed_precision(model)
    other = how(model)
    with torch.no_grad():
        other.part.weight.zero_()
        other.part.bias.zero_()
    assert other(X).dtype == BF16 and other(X).abs().sum() == 0 != model(X).abs().sum()


def test_signature_and_hooks_are_those_of_the_model() -> None:
    model = Model()
    before = inspect.signature(model.forward)
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    enable_mixed_precision(model)
    model(X)
    assert inspect.signature(model.forward) == before and seen == [1]


def test_module_without_parameters() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    model = Product()
    enable_mixed_precision(model)
    assert model(X, X.T).dtype == BF16


def test_compiled_model_has_one_graph() -> None:
    model = Model()
    enable_mixed_precision(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X)) and compiled(X).dtype == BF16


def test_wide_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype = torch.float64: must be one of torch.bfloat16"):
        enable_mixed_precision(Model(), torch.float64)
