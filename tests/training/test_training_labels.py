"""Labels of a step: examples without them, accumulated batches and several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_pool import rank_pool
from small_training import Double, InOrder, settings, small, text, unequal, weights
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import danon.training.trainer
from danon.training import Trainer


def test_accumulation_equals_a_larger_batch() -> None:
    models = [small(), small()]
    plain = {"gradient_clipping": None, "steps": 3}
    Trainer(models[0], settings(batch_size=8, **plain)).fit(text())
    Trainer(models[1], settings(gradient_accumulation_steps=2, **plain)).fit(text())
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["examples without", "batches without"])
@pytest.mark.parametrize("accumulated", [3, 6, 12])
def test_accumulated_gradients_with_unequal_labels_equal_one_batch(
    kind: str, accumulated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(danon.training.trainer, "BatchOrder", InOrder)
    found = []
    for batch_size, steps in ((12, 1), (12 // accumulated, accumulated)):
        model = Double()
        c = settings(
            steps=3,
            batch_size=batch_size,
            gradient_accumulation_steps=steps,
            log_every=1,
            gradient_clipping=0.1,
        )
        found.append((weights(model), Trainer(model, c).fit(unequal(kind)), weights(model)))
    (_, one, after), (_, several, others) = found
    torch.testing.assert_close(others, after, rtol=1e-12, atol=1e-12)
    for step, metrics in one.history.items():
        assert several.history[step]["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_overridden_loss_counts_by_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Smooth(Trainer):
        def compute_loss(self, outputs: Tensor) -> Tensor:  # not a number where there is no label
            return nn.functional.cross_entropy(
                outputs.flatten(0, 1), self.batch[1].flatten(), label_smoothing=0.1
            )

    monkeypatch.setattr(danon.training.trainer, "BatchOrder", InOrder)
    models = [Double(), Double()]
    data = unequal("batches without")
    one = Smooth(models[0], settings(steps=3, batch_size=12)).fit(data)
    c = settings(steps=3, batch_size=4, gradient_accumulation_steps=3)
    several = Smooth(models[1], c).fit(data)
    assert one.outcome == several.outcome == "finished"
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-12, atol=1e-12)


def test_step_without_labels_changes_nothing_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Kept(Trainer):
        def _after_step(self, *args: Any) -> None:
            after.append(weights(self.model))
            super()._after_step(*args)

    monkeypatch.setattr(danon.training.trainer, "BatchOrder", InOrder)
    after: list[Tensor] = []
    c = settings(steps=7, batch_size=4, log_every=1)
    result = Kept(Double(), c).fit(unequal("batches without"))
    assert (result.outcome, result.step) == ("finished", 7)
    assert [step for step, metrics in result.history.items() if "loss" not in metrics] == [3, 6]
    assert torch.equal(after[1], after[2]) and not torch.equal(after[2], after[3])
    assert caplog.messages == [
        "the batches of step 3 have no label other than -100: the step changes nothing"
    ]


def test_resumed_training_may_end_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops(Trainer):
        def _one_step(self, batches: object) -> float | None:
            if self.step == 2:
                raise KeyboardInterrupt
            return super()._one_step(batches)

    monkeypatch.setattr(danon.training.trainer, "BatchOrder", InOrder)
    c, data = settings(steps=3, batch_size=4, checkpoint_every=2), unequal("batches without")
    with pytest.raises(KeyboardInterrupt):
        Stops(Double(), c, directory=tmp_path).fit(data)
    result = Trainer(Double(), c, directory=tmp_path).fit(data)
    assert (result.outcome, result.step) == ("finished", 3)


@pytest.mark.parametrize("steps", [1, 100])
def test_training_without_any_label_is_refused(steps: int) -> None:
    ids, labels = text(12).tensors
    data = TensorDataset(ids, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="every label of the training's examples is -100: at lea"):
        Trainer(small(), settings(steps=steps)).fit(data)


def test_one_labelled_example_is_enough() -> None:
    ids, labels = text(24).tensors
    labels[1:] = -100
    result = Trainer(Double(), settings(steps=60, batch_size=1, log_every=1)).fit(
        TensorDataset(ids, labels)
    )
    assert result.outcome == "finished"
    assert sum("loss" in metrics for metrics in result.history.values()) in (2, 3)


def test_alternating_trainers_keep_their_accumulation() -> None:
    def between(step: int, metrics: object) -> None:
        Trainer(Double(), settings(steps=1)).fit(text())

    models = [Double(), Double()]
    c = settings(steps=2, gradient_accumulation_steps=3, log_every=1)
    Trainer(models[0], c).fit(text())
    Trainer(models[1], c, listeners=(between,)).fit(text())
    assert torch.equal(weights(models[0]), weights(models[1]))


def shared_labels(directory: str) -> tuple[Tensor, list[float]]:
    """Train with batches of unequal labels, some without any."""
    with mock.patch.object(danon.training.trainer, "BatchOrder", InOrder):
        model = Double()
        c = settings(
            steps=3, batch_size=4, gradient_accumulation_steps=3, log_every=1, checkpoint_every=1
        )
        trainer = Trainer(model, c, progress=False, directory=directory)
        result = trainer.fit(unequal("batches without"))
    return weights(model), [metrics["loss"] for metrics in result.history.values()]


def test_processes_share_the_labels_of_a_step_and_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, losses = rank_pool(2).run(shared_labels, str(tmp_path))[0]
    for step in (2, 3):
        states = (tmp_path / f"step-{step:08d}").glob("random-*")
        assert {file.name for file in states} == {"random-0.pt", "random-1.pt"}
    assert not list(tmp_path.glob(".step-*"))
    monkeypatch.setattr(danon.training.trainer, "BatchOrder", InOrder)
    model = Double()
    c = settings(steps=3, batch_size=12, log_every=1)
    want = Trainer(model, c).fit(unequal("batches without"))
    torch.testing.assert_close(got, weights(model), rtol=1e-12, atol=1e-12)
    assert losses == pytest.approx([m["loss"] for m in want.history.values()], rel=1e-6)
