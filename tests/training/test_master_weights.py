"""Narrow weights are the rounded sums of float32 steps, over checkpoints and loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danon.training import TrainingConfig, state_files
from danon.training.master_weights import MasterWeights
from danon.training.optimizers import make_optimizer
from danon.training.precision import apply_level
from danon.training.ranks import Ranks

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "muon": lambda model: make_optimizer(model, TrainingConfig(optimizer="muon")),
}
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def prepared(kind: str = "adamw") -> tuple[nn.Module, MasterWeights]:
    model = Blocks()
    made = apply_level(model, "O2").optimizer(lambda: OPTIMIZERS[kind](model))
    assert isinstance(made, MasterWeights)
    return model, made


def gradients(model: nn.Module, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def states(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Tensor]]:
    return [optimizer.state[p] for p in model.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(
        x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_copies_move_as_float32_weights_do(kind: str) -> None:
    wide = Blocks()
    plain = OPTIMIZERS[kind](wide)
    model, optimizer = prepared(kind)
    train(wide, plain, range(4))
    train(model, optimizer, range(4))
    for ours, theirs in zip(model.parameters(), wide.parameters(), strict=True):
        copied = optimizer.state[ours].get("master", ours)  # norms are wide themselves
        assert torch.equal(copied, theirs) and torch.equal(ours, theirs.to(ours.dtype))
        assert same(
            [{**optimizer.state[ours], "master": theirs}],
            [{**plain.state[theirs], "master": theirs}],
        )


def test_small_steps_are_not_lost() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1e-4))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.state[weight]["master"].item() == pytest.approx(0.99, abs=1e-5)
    assert weight.item() == pytest.approx(0.99, abs=2e-3) and weight.dtype == torch.bfloat16


def test_settings_of_groups_reach_the_copies() -> None:
    model, optimizer = prepared("sgd")
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_parameters_without_a_gradient_stay() -> None:
    model, optimizer = prepared()
    gradients(model, 0)
    model.layers[0][1].weight.grad = None
    before = model.layers[0][1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.layers[0][1].weight, before)
    assert set(optimizer.state[model.layers[0][1].weight]) == {"master"}


def test_closure_is_called_with_gradients() -> None:
    model, optimizer = prepared()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 8)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first is not None and closure() < first


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_dict_continues_to_the_same_weights(kind: str) -> None:
    model, optimizer = prepared(kind)
    train(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(2, 4))
    other, resumed = prepared(kind)
    train(other, resumed, range(7, 8))  # has states of its own
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(2, 4))
    assert same([model.state_dict()], [other.state_dict()])
    assert same(states(optimizer, model), states(resumed, other))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_checkpoint_continues_to_the_same_weights(kind: str, tmp_path: Path) -> None:
    model, optimizer = prepared(kind)
    train(model, optimizer, range(2))
    state_files.save(tmp_path, model, optimizer, ALONE)
    train(model, optimizer, range(2, 4))
    other, resumed = prepared(kind)
    train(other, resumed, range(7, 8))
    state_files.load(tmp_path, other, resumed, ALONE)
    train(other, resumed, range(2, 4))
    assert same([model.state_dict()], [other.state_dict()])
    assert same(states(optimizer, model), states(resumed, other))


def test_loaded_weights_are_copied_anew() -> None:
    model, optimizer = prepared("sgd")
    train(model, optimizer, range(2))
    model.load_state_dict({name: torch.ones_like(x) for name, x in model.state_dict().items()})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    assert all(bool((x == 1).all()) for x in model.state_dict().values())


def test_original_counts_unless_the_weight_has_changed() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.001, 1.002]]))
    exact = model.weight.detach().clone()
    made = apply_level(model, "O2").optimizer(lambda: torch.optim.SGD(model.parameters()))
    assert torch.equal(made.state[model.weight]["master"], exact)
    other = nn.Linear(2, 1, bias=False)
    precision = apply_level(other, "O2")
    with torch.no_grad():
        other.weight.fill_(2.0)  # as a broadcast from another rank does
    made = precision.optimizer(lambda: torch.optim.SGD(other.parameters()))
    assert made.state[other.weight]["master"].tolist() == [[2.0, 2.0]]


def test_used_optimizer_and_later_groups_are_refused() -> None:
    model = Blocks()
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, range(1))
    with pytest.raises(ValueError, match="has states: it must not have made a step"):
        MasterWeights(plain)
    _, optimizer = prepared()
    with pytest.raises(ValueError, match="must be in the optimizer before it is wrapped"):
        optimizer.add_param_group({"params": []})
