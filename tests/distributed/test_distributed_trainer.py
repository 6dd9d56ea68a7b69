"""The description's DistributedTrainer in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset
from training_cases import small_model, tokens

from danon.config import ConfigError
from danon.distributed import DistributedTrainer


def trainer(**settings: object) -> DistributedTrainer:
    return DistributedTrainer(small_model("msra"), progress=False, **settings)  # type: ignore[arg-type]


def test_passes_over_the_data_are_steps() -> None:
    # 24 examples, batches of 5: five steps see all of them once.
    assert trainer().fit(tokens(20), batch_size=5, num_epochs=1).step == 5
    accumulating = trainer(gradient_accumulation_steps=2)
    assert accumulating.fit(tokens(20), batch_size=4, num_epochs=2).step == 6
    accumulating.set_gradient_accumulation_steps(3)
    assert accumulating.fit(tokens(20), batch_size=4, num_epochs=2).step == 4


def test_evaluations_and_checkpoints_come_after_each_pass(tmp_path: Path) -> None:
    made = trainer(directory=tmp_path)
    result = made.fit(tokens(20), Subset(tokens(20), range(4)), batch_size=6, num_epochs=3)
    evaluated = [step for step, metrics in result.history.items() if "eval_loss" in metrics]
    assert evaluated == [4, 8, 12]
    assert (tmp_path / "step-00000012").is_dir()
    made.load_best()


def test_growing_batches_take_fewer_steps() -> None:
    growing = trainer()
    growing.enable_dynamic_batching(initial_size=4, max_size=8)
    # Passes of 4, 6, 8, 8 examples a step: 6 + 4 + 3 + 3.
    assert growing.fit(tokens(20), batch_size=32, num_epochs=4).step == 16


def test_snippets_of_the_specification() -> None:
    made = trainer(strategy="ddp", gradient_accumulation_steps=4)
    made.set_gradient_accumulation_steps(4)
    made.enable_advanced_training(
        label_smoothing=0.1, mixup_alpha=0.2, gradient_centralization=True
    )
    made.enable_progressive_training(start_size=0.3, growth_rate=1.2, max_size=1.0)
    made.enable_dynamic_batching(initial_size=4, max_size=8)
    result = made.fit(tokens(20), tokens(20), batch_size=4, num_epochs=2)
    assert result.outcome == "finished" and result.best is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: trainer(strategy="dpp"), "strategy = 'dpp': must be one of ddp, deepspeed"),
        (lambda t: trainer(optimization_level="O4"), "optimization_level = 'O4': must be"),
        (lambda t: t.set_gradient_accumulation_steps(0), "gradient_accumulation_steps = 0"),
        (lambda t: t.enable_advanced_training(label_smoothing=1.0), r"label_smoothing = 1.0"),
        (lambda t: t.enable_progressive_training(start_size=0.0), r"start_size = 0.0: must be in"),
        (lambda t: t.enable_dynamic_batching(8, 4), "max_batch_size = 4: must be >= batch_size"),
        (lambda t: t.fit(tokens(20), num_epochs=0), "num_epochs = 0: must be at least 1"),
        (lambda t: t.fit(Subset(tokens(20), [])), "the dataset is empty"),
        (lambda t: t.load_best(), "load_best before fit"),
    ],
)
def test_wrong_values_are_refused(call: object, message: str) -> None:
    made = trainer()
    with pytest.raises((ConfigError, ValueError), match=message):
        call(made)  # type: ignore[operator]
    torch.testing.assert_close(made.fit(tokens(20), batch_size=24).step, 1)
