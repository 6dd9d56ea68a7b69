"""The cost of the trainer beside a loop written by hand: a quiet machine is needed."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from danon import create_msra_model
from danon.training import Trainer, TrainingConfig
from danon.training.optimizers import make_optimizer

ROUNDS, STEPS, BATCH = 15, 6, 2
LARGEST = 1.03


def model_and_data() -> tuple[torch.nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = create_msra_model(
        task="lm", hidden_size=256, num_heads=4, num_layers=2, vocab_size=256, window=128
    )
    tokens = torch.randint(0, 256, (BATCH * STEPS, 513))
    return model, TensorDataset(tokens[:, :-1], tokens[:, 1:])


def by_hand(model: torch.nn.Module, data: TensorDataset, config: TrainingConfig) -> list[float]:
    """Return the seconds of each step of a plain loop."""
    optimizer = make_optimizer(model, config)
    ids, labels = data.tensors
    times = [time.perf_counter()]
    model.train()
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        logits = model(ids[rows])
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        (loss + model.auxiliary_loss()).backward()  # type: ignore[operator]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as a loop that shows its loss
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)][1:]


def by_trainer(model: torch.nn.Module, data: TensorDataset, config: TrainingConfig) -> list[float]:
    """Return the seconds of each step of the trainer."""
    times: list[float] = []

    class Timed(Trainer):
        def _after_step(self, *args: Any) -> None:
            super()._after_step(*args)
            times.append(time.perf_counter())

    Timed(model, config, progress=False).fit(data)
    return [b - a for a, b in pairwise(times)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_trainer_costs_at_most_three_percent() -> None:
    model, data = model_and_data()
    config = TrainingConfig(steps=STEPS, batch_size=BATCH, schedule="constant")
    by_hand(model, data, config), by_trainer(model, data, config)  # warm up
    ratios, seconds = [], []
    for number in range(ROUNDS):
        first, second = (by_hand, by_trainer) if number % 2 else (by_trainer, by_hand)
        took = {first: first(model, data, config), second: second(model, data, config)}
        medians = {f: statistics.median(times) for f, times in took.items()}
        ratios.append(medians[by_trainer] / medians[by_hand])
        seconds.append(medians[by_hand])
    ratio = statistics.median(ratios)
    low, high = sorted(ratios)[3], sorted(ratios)[-4]
    print(
        f"{ratio:.3f} [{low:.3f}, {high:.3f}] of steps of {statistics.median(seconds) * 1e3:.0f} ms"
    )
    assert ratio < LARGEST
