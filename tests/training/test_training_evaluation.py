"""Evaluation during training: its average, the best step and patience."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_training import settings, small, text
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from danon.training import Trainer


@pytest.mark.parametrize("form", ["pair", "mapping"])
def test_evaluation_counts_batches_by_labels(form: str) -> None:
    ids, labels = text(10).tensors
    labels[0], labels[4:8] = -100, -100  # of batches of 4: three examples, none, two
    labels[8, 2:] = -100
    data: Any = TensorDataset(ids, labels)
    if form == "mapping":
        data = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    model = small()
    trainer = Trainer(model, settings())
    trainer.setup_training()
    got = trainer.evaluate(data)["eval_loss"]
    with torch.no_grad():
        want = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    assert got == pytest.approx(float(want), rel=1e-5)


def test_evaluation_without_labels_counts_batches_by_examples() -> None:
    class Mean(Trainer):
        def compute_loss(self, outputs: Tensor) -> Tensor:
            return outputs.mean()

    trainer = Mean(nn.Identity(), settings())
    got = trainer.evaluate(TensorDataset(torch.arange(6.0)[:, None]))
    assert got == {"eval_loss": 2.5}


def test_evaluation_without_examples_or_labels_is_refused() -> None:
    trainer = Trainer(small(), settings())
    trainer.setup_training()
    ids, labels = text(4).tensors
    with pytest.raises(ValueError, match="every label of the dataset is -100: at least one must"):
        trainer.evaluate(TensorDataset(ids, torch.full_like(labels, -100)))
    empty = TensorDataset(ids[:0], labels[:0])
    with pytest.raises(ValueError, match="the dataset is empty"):
        trainer.evaluate(empty)
    with pytest.raises(ValueError, match="the dataset is empty"):
        trainer.fit(empty)


def test_nan_evaluation_is_never_the_best() -> None:
    class Odd(Trainer):
        def evaluate(self, dataset: Dataset[object]) -> dict[str, float]:
            return {"eval_loss": torch.nan if self.step <= 4 else 2.0}

    result = Odd(small(), settings(eval_every=4)).fit(text(), text())
    assert (result.best, result.best_step) == (2.0, 8)


def test_training_stops_after_patience_evaluations() -> None:
    class Stuck(Trainer):
        def evaluate(self, dataset: Dataset[object]) -> dict[str, float]:
            return {"eval_loss": 1.0 if self.step <= 2 else 2.0}

    result = Stuck(small(), settings(eval_every=2, patience=3)).fit(text(), text())
    assert (result.outcome, result.step, result.best_step) == ("stopped early", 8, 2)
