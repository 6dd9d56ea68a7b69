"""Layers on two processes: the numbers of one, and a slow layer that makes others move."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import KINDS, SHAPE, full, small_model, tokens

from danon import create_msra_model
from danon.attention.keyed_draws import set_draw_key
from danon.distributed.dynamic_sharding import DynamicSharding
from danon.training.ranks import Ranks


def four_layers(task: str = "lm") -> nn.Module:
    torch.manual_seed(0)
    return create_msra_model(task=task, **{**SHAPE, "num_layers": 4}, window=8).double()


def slow_down(layer: nn.Module, seconds: float) -> None:
    before = layer.forward

    def forward(*args: Any) -> Any:
        time.sleep(seconds)
        return before(*args)

    layer.forward = forward  # type: ignore[method-assign]


def step(model: Any, optimizer: torch.optim.Optimizer, i: int, whole: Any) -> float:
    """Take one step on four examples, clipped."""
    ids, labels = (x[4 * i : 4 * i + 4] for x in tokens(40).tensors)
    set_draw_key(whole, 0, i)
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()) + model.auxiliary_loss()
    loss.backward()
    clip = getattr(model, "clip_grad_norm_", None)
    if clip is None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    else:
        clip(0.5)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def trained(model: nn.Module, steps: int, move: bool = False, **options: Any) -> dict[str, Any]:
    """Train on the processes there are."""
    sharding = DynamicSharding(model, **options)
    sharded = sharding.apply()
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3)
    bounds, held = [sharding.bounds], [sum(p.numel() for p in model.parameters())]
    losses = []
    for i in range(steps):
        if move and i == 2:  # without a look at times: the cut is forced
            sharding._move((0, 1, len(model.layers)))  # type: ignore[attr-defined]
            bounds.append(sharding.bounds)
            held.append(sum(p.numel() for p in model.parameters()))
        losses.append(step(sharded, optimizer, i, model))
    whole = sharding.gather()
    assert whole is model
    return {
        "losses": losses,
        "bounds": bounds,
        "held": held,
        "moves": sharding.moves,
        "weights": torch.cat([full(p).flatten() for p in model.parameters()]),
    }


def both_kinds(kind: str) -> dict[str, Any]:
    return trained(small_model(kind).double(), 3, auto_rebalance=False)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_models_train_as_one_process(kind: str) -> None:
    want = both_kinds(kind)
    for got in rank_pool(2).run(both_kinds, kind):
        assert got["bounds"] == [(0, 1, 2)] and want["bounds"] == [(0, 2)]
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-9)
        assert float((got["weights"] - want["weights"]).abs().max()) < 1e-9
        assert got["held"][0] < 0.75 * len(want["weights"])


def moved(move: bool) -> dict[str, Any]:
    return trained(four_layers(), 5, move, auto_rebalance=False)


def test_moved_layers_keep_weights_and_states_of_the_optimizer() -> None:
    want = moved(False)
    several = rank_pool(2).run(moved, True)
    for got in several:
        assert got["bounds"][-1] == (0, 1, 4)
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-9)
        assert float((got["weights"] - want["weights"]).abs().max()) < 1e-9
    assert sum(one["held"][-1] for one in several) == len(want["weights"])


def with_slow_layer() -> dict[str, Any]:
    model: Any = four_layers()
    for layer in model.layers:
        slow_down(layer, 0.03)
    sharding = DynamicSharding(model, 2, auto_rebalance=True, check_every=3, tolerance=0.1)
    sharded = sharding.apply()
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3)
    bounds, losses = [], []
    for i in range(6):
        if i == 3:
            slow_down(model.layers[0], 0.09)
        losses.append(step(sharded, optimizer, i, model))
        bounds.append(sharding.bounds)
    quiet = sharding.rebalance()
    return {"bounds": bounds, "moves": sharding.moves, "losses": losses, "quiet": quiet}


def test_a_slow_layer_moves_the_others() -> None:
    want = trained(four_layers(), 6)
    for got in rank_pool(2).run(with_slow_layer):
        assert got["bounds"][0] == (0, 2, 4)
        assert got["bounds"][4] == (0, 2, 4)  # compared after the third step, when all was well
        assert got["bounds"][-1] == (0, 1, 4) and got["moves"] == {6: (0, 1, 4)}
        assert got["quiet"] is False
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-9)


def outputs(task: str) -> dict[str, Any]:
    """Run a padded batch without gradients, in both forms."""
    model = four_layers(task).eval()
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :9] = mask[2, 20:] = False
    ids = tokens(40).tensors[0][:3]
    sharding = DynamicSharding(model, chunks=2)
    with torch.no_grad():
        want = model(ids, mask)
        got = sharding.apply().eval()(ids, mask)
    sharding.gather()
    return {"want": want, "got": got}


@pytest.mark.parametrize("task", ["encoder", "lm", "classifier"])
def test_outputs_are_on_every_process(task: str) -> None:
    for one in rank_pool(2).run(outputs, task):
        torch.testing.assert_close(one["got"], one["want"], rtol=0, atol=1e-12)


def test_one_process_keeps_the_whole_model(caplog: pytest.LogCaptureFixture) -> None:
    model = four_layers()
    with caplog.at_level("INFO"):
        sharding = DynamicSharding(model, num_devices=4, auto_rebalance=True)
        assert sharding.apply() is model and sharding.gather() is model
    assert "torchrun --nproc-per-node 4 SCRIPT" in caplog.text
    with pytest.raises(ValueError, match="no layers are placed"):
        sharding.rebalance()


def error_of(wrong: str) -> str:
    """Place layers with something wrong and return the error."""
    Ranks.join()
    model: Any = four_layers()
    options: dict[str, Any] = {}
    if wrong == "devices":
        options["num_devices"] = 4
    elif wrong == "layers":
        model.layers = model.layers[:1]
    elif wrong == "sample":
        options["sample"] = torch.full((2, 8), 64)
    try:
        DynamicSharding(model, **options).apply()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("devices", "num_devices = 4, but there are 2 processes: must be equal"),
        ("layers", "the number of processes = 2: must be from 1 to 1, the number of the model's"),
        ("sample", "input_ids holds 64: must be in [0, vocab_size = 64)"),
    ],
)
def test_wrong_processes_are_the_same_error_on_each(wrong: str, message: str) -> None:
    for said in rank_pool(2).run(error_of, wrong, timeout_s=20):
        assert message in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_devices": 5}, "num_devices = 5: must be from 1 to 4"),
        ({"chunks": 0}, "chunks = 0: must be at least 1"),
        ({"check_every": 0}, "check_every = 0: must be at least 1"),
        ({"tolerance": 0.0}, "tolerance = 0.0: must be > 0"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSharding(four_layers(), **options)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear cannot be placed by layers: must be a danon"):
        DynamicSharding(nn.Linear(3, 3))


def early() -> str:
    sharded: Any = DynamicSharding(four_layers()).apply()
    try:
        loss: Tensor = sharded.auxiliary_loss()
        return str(loss)
    except ValueError as error:
        return str(error)


def test_auxiliary_loss_needs_a_forward_pass() -> None:
    for said in rank_pool(2).run(early):
        assert "auxiliary_loss before a forward pass" in said
