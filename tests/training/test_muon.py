"""Muon moves the matrices of the blocks, AdamW the rest; sharded as in one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from muon_cases import CONFIG, Blocks, step, tokens, trained, trained_in_shards
from rank_pool import rank_pool
from small_training import settings, small, text
from torch import Tensor, nn

from danon.training import Trainer, state_files
from danon.training.muon import MuonWithAdamW
from danon.training.optimizers import make_optimizer
from danon.training.ranks import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def made(model: nn.Module) -> MuonWithAdamW:
    optimizer = make_optimizer(model, CONFIG)
    assert isinstance(optimizer, MuonWithAdamW)
    return optimizer


def test_matrices_of_blocks_are_moved_by_muon_alone() -> None:
    model = Blocks()
    optimizer = made(model)
    step(model, optimizer, tokens())
    kinds = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    muon = {name for name, keys in kinds.items() if keys == {"momentum_buffer"}}
    assert muon == {f"layers.{i}.{j}.weight" for i in (0, 1) for j in (1, 3)}
    assert all(
        keys == {"step", "exp_avg", "exp_avg_sq"} for n, keys in kinds.items() if n not in muon
    )
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() >= 2}
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def orthogonal_by_hand(gradient: Tensor) -> Tensor:
    """Return U V^T of the gradient's singular value decomposition."""
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    return u @ v


def test_steps_are_orthogonal_and_as_large_as_those_of_adamw() -> None:
    """The Newton-Schulz iteration brings singular values near 1, not onto it."""
    model = Blocks()
    optimizer = made(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, matrix in model.named_parameters():
        if not (name.startswith("layers") and matrix.dim() == 2):
            continue
        change = (before[name] - matrix.detach()).double()
        root_mean_square = change.square().mean().sqrt()
        assert 0.1e-2 < root_mean_square < 0.3e-2  # 0.2 of the learning rate
        change /= 1e-2 * 0.2 * 63**0.5
        values = torch.linalg.svdvals(change)
        assert 0.6 < values.min() <= values.max() < 1.3
        assert matrix.grad is not None
        expected = orthogonal_by_hand(matrix.grad)
        assert (change * expected).sum() / change.norm() / expected.norm() > 0.97


def test_weight_decay_and_learning_rate_of_the_groups_count() -> None:
    model = Blocks()
    optimizer = made(model)
    weight = model.layers[0][1].weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5  # as the trainer sets it
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.5 * 0.1))


def test_shards_of_two_ranks_are_moved_as_whole_matrices() -> None:
    expected = trained()
    for rank in rank_pool(2).run(trained_in_shards):
        assert rank.keys() == expected.keys()
        for name, value in rank.items():
            assert (value - expected[name]).abs().max() < 1e-5, name
    start = {name: p.detach() for name, p in Blocks().named_parameters()}
    moved = {name: (expected[name] - p).abs().max() for name, p in start.items()}
    assert min(moved.values()) > 1e-3  # two orders of magnitude more than they may differ


def test_checkpoint_of_shards_continues_to_the_same_weights(tmp_path: Path) -> None:
    expected = trained()
    for rank in rank_pool(2).run(trained_in_shards, 3, str(tmp_path)):
        assert all((x - expected[name]).abs().max() < 1e-5 for name, x in rank.items())


@pytest.mark.parametrize("way", ["state_dict", "state_files"])
def test_saved_states_continue_to_the_same_weights(way: str, tmp_path: Path) -> None:
    model, other = Blocks(), Blocks()
    optimizer, resumed = made(model), made(other)
    for _ in range(2):
        step(model, optimizer, tokens())
    step(other, resumed, tokens().flip(0))
    if way == "state_files":
        state_files.save(tmp_path, model, optimizer, ALONE)
        state_files.load(tmp_path, other, resumed, ALONE)
    else:
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer, tokens())
        step(other, resumed, tokens())
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_trainer_learns_with_muon_and_resumes(tmp_path: Path) -> None:
    config = settings(optimizer="muon", steps=30, checkpoint_every=10, learning_rate=1e-2)
    model = small()
    result = Trainer(model, config, directory=tmp_path / "a").fit(text())
    assert result.history[30]["loss"] < 0.7 * result.history[10]["loss"]

    class Ends(Trainer):
        def _one_step(self, batches: object) -> float | None:
            if self.step == 15:
                raise KeyboardInterrupt
            return super()._one_step(batches)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        Ends(small(), config, directory=tmp_path / "b").fit(text())
    resumed = small()
    Trainer(resumed, config, directory=tmp_path / "b").fit(text())
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_closure_is_called_once() -> None:
    model = Blocks()
    optimizer = made(model)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(tokens()).square().mean()
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    assert optimizer.step(closure) == losses[0] and len(losses) == 1


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer = 'muon': must be 'adamw' for Linear, which"):
        make_optimizer(nn.Linear(2, 2), CONFIG)
    frozen = Blocks()
    for layer in frozen.layers:
        layer.requires_grad_(False)
    with pytest.raises(ValueError, match="no matrices in repeated blocks"):
        make_optimizer(frozen, CONFIG)
    with pytest.raises(ValueError, match="Muon has no matrix: must have at least one"):
        MuonWithAdamW([], [], 1e-3, 0.0)
