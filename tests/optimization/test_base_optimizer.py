"""Optimizers of one's own are torch optimizers, whatever little they define."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from danon.optimization import BaseOptimizer
from danon.training import state_files
from danon.training.master_weights import MasterWeights
from danon.training.ranks import Ranks


class CustomOptimizer(BaseOptimizer):
    """The specification's example, as it stands."""

    def __init__(self, params, lr=1e-3):  # noqa: ANN001, ANN204
        super().__init__(params, lr)
        self.setup_optimizer()

    def step(self):  # noqa: ANN201
        # 实现自定义优化步骤
        for param in self.params:
            if param.grad is not None:
                self.update_param(param)


class Momentum(CustomOptimizer):
    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"velocity": torch.zeros_like(param)}

    def update_param(self, param: Tensor) -> None:
        velocity = self.state[param]["velocity"]
        velocity.mul_(0.9).add_(param.grad)
        param -= self.group_of(param)["lr"] * velocity


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


X = torch.linspace(-1, 1, 32).view(8, 4)
Y = X.sum(1, keepdim=True).sin()


def train(net: nn.Module, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", [BaseOptimizer, CustomOptimizer])
def test_default_is_plain_descent(kind: Any) -> None:
    ours, theirs = model(), model()
    losses = train(ours, kind(ours.parameters(), lr=0.1), 30)
    assert losses == pytest.approx(train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), 30))
    assert close(weights(ours), weights(theirs)) and losses[-1] < 0.9 * losses[0]
    assert all(not p.grad_fn for p in ours.parameters())


def test_overridden_update_has_states_from_the_start() -> None:
    ours, theirs = model(), model()
    optimizer = Momentum(ours.parameters(), lr=0.05)
    assert all(set(optimizer.state[p]) == {"velocity"} for p in ours.parameters())
    train(ours, optimizer, 10)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9), 10)
    assert close(weights(ours), weights(theirs))


def test_groups_have_settings_of_their_own() -> None:
    net = model()
    first, last = net[0], net[2]
    optimizer = Momentum([{"params": first.parameters(), "lr": 0.0}, {"params": last.parameters()}])
    before = weights(first)
    train(net, optimizer, 3)
    assert close(weights(first), before)
    assert [optimizer.group_of(p)["lr"] for p in net.parameters()] == [0.0, 0.0, 1e-3, 1e-3]
    assert optimizer.params == list(net.parameters())
    optimizer.param_groups[0]["lr"] = 0.5  # as a schedule sets it
    assert optimizer.group_of(first.weight)["lr"] == 0.5
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is not in the optimizer"):
        optimizer.group_of(nn.Parameter(torch.zeros(3)))


def test_group_added_later_gets_states() -> None:
    net = model()
    optimizer = Momentum(net[0].parameters())
    train(net, optimizer, 2)
    kept = optimizer.state[net[0].weight]["velocity"]
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.1})
    optimizer.setup_optimizer()
    assert set(optimizer.state[net[2].weight]) == {"velocity"}
    assert optimizer.state[net[0].weight]["velocity"] is kept
    assert optimizer.group_of(net[2].bias)["lr"] == 0.1


def test_state_dict_continues_to_the_same_weights() -> None:
    net = model()
    optimizer = Momentum(net.parameters())
    train(net, optimizer, 3)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, 3)
    other = model()
    resumed = Momentum(other.parameters(), lr=7.0)
    train(other, resumed, 1)  # has looked its groups up
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(other), strict=True))


def test_checkpoints_of_torch_and_of_the_trainer_take_it(tmp_path: Path) -> None:
    net = model()
    optimizer = Momentum(net.parameters())
    train(net, optimizer, 3)
    expected = {id(p): optimizer.state[p]["velocity"].clone() for p in net.parameters()}
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    state_files.save(tmp_path, net, optimizer, alone)
    for load in (
        lambda: set_optimizer_state_dict(net, optimizer, state),
        lambda: state_files.load(tmp_path, net, optimizer, alone),
    ):
        train(net, optimizer, 2)
        load()
        assert all(
            torch.equal(optimizer.state[p]["velocity"], expected[id(p)]) for p in net.parameters()
        )


def test_torch_plans_a_checkpoint_of_an_optimizer_without_a_step() -> None:
    """It takes an empty step for that, with a closure of None."""
    net = model()
    before = weights(net)
    state = get_optimizer_state_dict(net, Momentum(net.parameters()))
    assert {name for name, x in state["state"].items() if "velocity" in x} == set(net.state_dict())
    assert close(weights(net), before)


def test_schedules_scalers_and_float32_copies_take_it() -> None:
    net = model()
    optimizer = Momentum(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((net(X) - Y).square().mean()).backward()
    scaler.step(optimizer)
    schedule.step()
    assert optimizer.group_of(net[0].weight)["lr"] == 0.05
    narrow = model().bfloat16()
    copies = MasterWeights(BaseOptimizer(narrow.parameters(), lr=0.1))
    (narrow(X.bfloat16()) - Y).square().mean().backward()
    copies.step()
    assert copies.state[narrow[0].weight]["master"].dtype == torch.float32


@pytest.mark.parametrize("kind", [BaseOptimizer, CustomOptimizer])
def test_closure_is_called_whether_the_step_takes_one_or_not(kind: Any) -> None:
    net = model()
    optimizer = kind(net.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (net(X) - Y).square().mean()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert closure() < first


def test_step_of_ones_own_gets_the_closure() -> None:
    class Twice(BaseOptimizer):
        def step(self, closure: Any = None) -> Any:
            assert not torch.is_grad_enabled()
            super().step()
            return closure

    def closure() -> None:
        raise AssertionError("the step decides when")

    assert Twice(model().parameters()).step(closure) is closure


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lr = 0\.0: must be > 0"):
        BaseOptimizer(model().parameters(), lr=0.0)

    class Counting(CustomOptimizer):
        def init_state(self, param: Tensor) -> dict[str, Any]:
            return {"count": 0}

    with pytest.raises(TypeError, match="the state count is a int: must be a tensor"):
        Counting(model().parameters())
