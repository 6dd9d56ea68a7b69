"""The cut of a model into stages: the best one, by times that are really measured."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch
from torch import Tensor, nn
from training_cases import SHAPE, small_model

from danon import create_msra_model
from danon.distributed.stage_split import LayerCosts, measure_costs, partition
from danon.distributed.stages import make_stage


def test_partition_is_the_best_of_all_partitions() -> None:
    draw = random.Random(0)
    for _ in range(200):
        layers = draw.randint(1, 8)
        costs = LayerCosts(
            tuple(draw.choice([1.0, 2.0, draw.random()]) for _ in range(layers)),
            before=draw.random() * 2,
            behind=draw.random() * 2,
        )
        stages = draw.randint(1, layers)
        bounds = partition(costs, stages)
        assert bounds[0] == 0 and bounds[-1] == layers and len(bounds) == stages + 1
        assert all(a < b for a, b in itertools.pairwise(bounds))
        cuts = itertools.combinations(range(1, layers), stages - 1)
        assert costs.slowest(bounds) == min(costs.slowest((0, *c, layers)) for c in cuts)


def test_equal_layers_are_cut_equally() -> None:
    assert partition(LayerCosts((1.0,) * 12), 4) == (0, 3, 6, 9, 12)


def test_head_counts_in_the_last_stage() -> None:
    assert partition(LayerCosts((1.0,) * 6, behind=4.0), 2) == (0, 5, 6)


@pytest.mark.parametrize("stages", [0, 4])
def test_more_stages_than_layers_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match=rf"pipeline_stages = {stages}: must be from 1 to 3"):
        partition(LayerCosts((1.0, 1.0, 1.0)), stages)


class Slow(nn.Module):
    """A layer that takes so many seconds, and as long again in the backward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        x = x * self.weight
        x.register_hook(lambda _: time.sleep(self.seconds))
        return x


def test_measured_times_find_the_slow_layer() -> None:
    model = nn.Sequential(Slow(0.0), Slow(0.01), Slow(0.0), Slow(0.0))
    costs = measure_costs(model, {"x": torch.ones(2, 3)})
    assert 0.019 < costs.layers[1] < 0.05
    assert max(costs.layers[i] for i in (0, 2, 3)) < 0.01
    assert partition(costs, 3)[1:3] == (1, 2)


def test_measuring_changes_nothing() -> None:
    model = small_model("ucsa").eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    drawn = torch.get_rng_state()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = False
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    costs = measure_costs(model, {"input_ids": ids, "attention_mask": mask}, rounds=1)
    assert len(costs.layers) == 2 and min(costs.before, costs.behind, *costs.layers) > 0
    assert torch.equal(torch.get_rng_state(), drawn) and not model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("task", ["encoder", "lm", "classifier"])
@pytest.mark.parametrize("padding", [False, True])
def test_stages_one_after_the_other_are_the_model(task: str, padding: bool) -> None:
    model = create_msra_model(task=task, **SHAPE)
    ids = torch.randint(0, 64, (3, 40))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :7] = mask[1, 30:] = not padding
    want = model(ids, mask if padding else None)
    x, auxiliary = ids, None
    given = {"attention_mask": mask} if padding else {}
    names: set[str] = set()
    for first, last in ((0, 1), (1, 2)):
        stage = make_stage(model, first, last)
        x, auxiliary = stage(x, auxiliary, **given)
        names |= {name for name, _ in stage.named_parameters()}
    assert torch.equal(x, want) and auxiliary is not None and auxiliary.shape == (3,)
    assert names == {name for name, _ in model.named_parameters()}


def test_auxiliary_losses_add_up_over_the_stages() -> None:
    model = small_model("blend")
    ids = torch.randint(0, 64, (2, 90))
    drawn = torch.get_rng_state()
    model(ids)
    want = model.auxiliary_loss()
    torch.set_rng_state(drawn)
    x, auxiliary = make_stage(model, 0, 1)(ids)
    _, auxiliary = make_stage(model, 1, 2)(x, auxiliary)
    assert want > 0 and torch.allclose(auxiliary.mean(), want)


def test_other_models_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"Linear cannot be cut into stages: must be a danon"):
        make_stage(nn.Linear(3, 3), 0, 1)
