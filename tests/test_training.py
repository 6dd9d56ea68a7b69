"""The trainer: it learns, it resumes to the same weights, and it says what went wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from danon import create_dala_model, create_ucsa_model
from danon.config import ConfigError
from danon.experiment import store
from danon.training import BaseTrainer, Trainer, TrainingConfig, checkpoint
from danon.training.order import Order
from danon.training.recorded import recorded

ROOT = Path(__file__).parents[1]


def text(examples: int = 24, length: int = 32) -> TensorDataset:
    """A language of pairs: every even token is followed by its successor."""
    g = torch.Generator().manual_seed(0)
    first = torch.randint(0, 15, (examples, length // 2), generator=g) * 2
    ids = torch.stack((first, first + 1), -1).flatten(1)
    labels = torch.full_like(ids, -100)
    labels[:, ::2] = ids[:, 1::2]
    return TensorDataset(ids, labels)


def drawing(seed: int = 0) -> nn.Module:
    """A model that draws random numbers as it trains."""
    torch.manual_seed(seed)
    return create_dala_model(
        task="lm", hidden_size=32, num_heads=2, num_layers=1, vocab_size=32, block_size=4,
        state_update_frequency=2, attention_dropout=0.2,
    )  # fmt: skip


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_ucsa_model(
        task="lm", hidden_size=32, num_heads=2, num_layers=1, vocab_size=32,
        local_window_size=16, query_block=16, leaf_max=4, candidate_blocks=8, selected_blocks=2,
    )  # fmt: skip


def settings(**kw: object) -> TrainingConfig:
    return TrainingConfig(**{"steps": 12, "batch_size": 4, "learning_rate": 3e-3, **kw})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns() -> None:
    model = small()
    result = Trainer(model, settings(steps=120, log_every=1)).fit(text(), text())
    assert result.outcome == "finished" and result.step == 120
    assert result.history[1]["loss"] > 3 > 0.5 > result.history[120]["eval_loss"]
    assert result.best == result.history[120]["eval_loss"] and result.best_step == 120


def test_accumulation_is_a_larger_batch() -> None:
    models = [small(), small()]
    plain = {"gradient_clipping": None, "steps": 3}
    Trainer(models[0], settings(batch_size=8, **plain)).fit(text())
    Trainer(models[1], settings(gradient_accumulation_steps=2, **plain)).fit(text())
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-4, atol=1e-5)


def test_trainers_of_one_process_have_their_own_precision() -> None:
    losses = []
    for precision in ("no", "bf16", "no"):
        result = Trainer(small(), settings(mixed_precision=precision)).fit(text())
        losses.append(result.history[12]["loss"])
    assert losses[0] == losses[2] != losses[1] == pytest.approx(losses[0], rel=0.05)


KILLED = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_training as t
from danon.training import Trainer
class Dies(Trainer):
    def backward_step(self, loss):
        if self.step == {at}:
            os._exit(9)
        super().backward_step(loss)
Dies(t.drawing(), t.settings(checkpoint_every={every}), directory={place!r}).fit(t.text(), t.text())
"""


@pytest.mark.parametrize(("at", "every"), [(0, 1), (5, 1), (7, 4), (11, 5)])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, at: int, every: int) -> None:
    whole = drawing()
    want = Trainer(whole, settings(checkpoint_every=every)).fit(text(), text())
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), at=at, every=every,
                         place=str(tmp_path))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    again = drawing(seed=5)  # its weights come from the checkpoint, or from the start
    if not list(tmp_path.glob("step-*")):
        again = drawing()
    got = Trainer(again, settings(checkpoint_every=every), directory=tmp_path).fit(text(), text())
    assert torch.equal(weights(again), weights(whole))
    assert got == want


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(small(), settings(steps=4, checkpoint_every=2, keep_checkpoints=2),
            directory=tmp_path).fit(text())  # fmt: skip
    newest = tmp_path / "step-00000004"
    file = max(newest.iterdir(), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[1] == 2
    assert f"{newest} is damaged ({file.name} changed" in caplog.text


def test_checkpoints_that_are_too_old_go(tmp_path: Path) -> None:
    Trainer(small(), settings(steps=6, checkpoint_every=1, keep_checkpoints=3),
            directory=tmp_path).fit(text())  # fmt: skip
    assert [p.name[-1] for p in sorted(tmp_path.iterdir())] == ["4", "5", "6"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, lambda p: (p / "x").write_text("1") and None, {}, 2)

    def full(place: Path) -> None:
        (place / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, full, {}, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(small(), settings(steps=2), directory=tmp_path).fit(text())
    with pytest.raises(ValueError, match=r"is of a run with steps = 2: must have steps = 3, or"):
        Trainer(small(), settings(steps=3), directory=tmp_path).fit(text())


def test_a_run_that_diverges_says_when() -> None:
    class Explodes(Trainer):
        def compute_loss(self, outputs: Tensor) -> Tensor:
            loss = super().compute_loss(outputs)
            return loss * torch.inf if self.step == 5 else loss

    result = Explodes(small(), settings()).fit(text())
    assert (result.outcome, result.step) == ("diverged", 6)
    assert 6 not in result.history


def test_it_stops_when_nothing_improves() -> None:
    class Stuck(Trainer):
        def evaluate(self, dataset: Dataset[object]) -> dict[str, float]:
            return {"eval_loss": 1.0 if self.step <= 2 else 2.0}

    result = Stuck(small(), settings(eval_every=2, patience=3)).fit(text(), text())
    assert (result.outcome, result.step, result.best_step) == ("stopped early", 8, 2)


def test_the_order_goes_on_where_it_stopped_and_leaves_nobody_out() -> None:
    whole = iter(Order(10, 4, seed=1))
    batches = [next(whole) for _ in range(10)]
    later = iter(Order(10, 4, seed=1, first=3))
    assert [next(later) for _ in range(7)] == batches[3:]
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]
    shares = [iter(Order(10, 4, seed=1, rank=r, world=2)) for r in (0, 1)]
    for batch in batches:
        a, b = (next(share) for share in shares)
        assert sorted(a + b) == sorted(batch) and len(a) == len(b) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps = 0: must be >= 1"),
        ({"schedule": "adaptive"}, "warmup_steps = 0: must be >= 1 with schedule = 'adaptive'"),
        ({"warmup_steps": 13}, "warmup_steps = 13: must be from 0 to steps = 12"),
        ({"patience": 2}, "patience = 2: must be None without eval_every"),
        ({"mixed_precision": "int8"}, "mixed_precision = 'int8': must be"),
    ],
)
def test_wrong_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**fields)


def test_the_seeds_dictionary() -> None:
    c = TrainingConfig.from_dict({
        "optimizer": {"type": "adamw", "lr": 1e-4, "weight_decay": 0.01},
        "scheduler": {"type": "cosine", "warmup_steps": 1000},
        "mixed_precision": True, "gradient_clipping": 1.0, "steps": 5000,
    })  # fmt: skip
    assert (c.learning_rate, c.weight_decay, c.warmup_steps) == (1e-4, 0.01, 1000)
    assert (c.schedule, c.mixed_precision, c.gradient_clipping) == ("cosine", "bf16", 1.0)
    with pytest.raises(ConfigError, match=r"optimizer.type = 'sgd': must be 'adamw'"):
        TrainingConfig.from_dict({"optimizer": {"type": "sgd"}})
    with pytest.raises(ConfigError, match=r"scheduler.speed: must be one of type, warmup_steps"):
        TrainingConfig.from_dict({"scheduler": {"speed": 1}})


def test_schedules() -> None:
    cosine = settings(steps=100, warmup_steps=10)
    assert cosine.rate(0) == 0.1 and cosine.rate(9) == 1.0 and cosine.rate(10) == 1.0
    assert cosine.rate(55) == pytest.approx(0.55) and cosine.rate(100) == pytest.approx(0.1)
    adaptive = settings(steps=100, warmup_steps=25, schedule="adaptive")
    assert adaptive.rate(99) == pytest.approx(0.5)  # sqrt(25 / 100)
    assert settings(schedule="constant").rate(11) == 1.0


def test_ones_own_trainer_as_in_the_seed() -> None:
    class CustomTrainer(BaseTrainer):
        def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
            super().__init__(model, config)
            self.setup_training()

        def train_step(self, batch: object) -> Tensor:
            outputs = self.model(batch[0])
            loss = self.compute_loss(outputs)
            self.backward_step(loss)
            return loss.detach()

    model = small()
    before = weights(model).clone()
    trainer = CustomTrainer(model, settings())
    trainer.batch = text()[:4]
    trainer.train_step(trainer.batch)
    assert not torch.equal(weights(model), before)


def test_a_run_is_recorded_with_its_metrics_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    c = settings(steps=4, log_every=2)
    with recorded("good", c.to_dict()) as listener:
        result = Trainer(small(), c, listeners=(listener,)).fit(text(), text())
    with pytest.raises(RuntimeError, match="broken"), recorded("bad", {}):
        raise RuntimeError("broken")
    with pytest.raises(KeyboardInterrupt), recorded("stopped", {}):
        raise KeyboardInterrupt
    client = store.connect(uri)
    runs = {run.info.run_name: run for run in client.search_runs(
        [store.experiment_id(client, uri, "training")])}  # fmt: skip
    ended = {name: run.info.status for name, run in runs.items()}
    assert ended == {"good": "FINISHED", "bad": "FAILED", "stopped": "KILLED"}
    good = runs["good"]
    assert good.data.params["learning_rate"] == "0.003"
    steps = client.get_metric_history(good.info.run_id, "loss")
    assert {m.step: m.value for m in steps} == {
        step: metrics["loss"] for step, metrics in result.history.items()
    }
    assert good.data.metrics["eval_loss"] == result.best
