"""The trainer: it learns, by its settings, and it says what went wrong."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from small_training import settings, small, text, weights
from torch import Tensor, nn

from danon import create_dala_model, create_ucsa_model
from danon.config import ConfigError
from danon.training import BaseTrainer, Trainer, TrainingConfig
from danon.training.batch_order import BatchOrder


def test_training_lowers_the_loss() -> None:
    model = small()
    result = Trainer(model, settings(steps=120, log_every=1)).fit(text(), text())
    assert result.outcome == "finished" and result.step == 120
    assert result.history[1]["loss"] > 3 > 0.5 > result.history[120]["eval_loss"]
    assert result.best == result.history[120]["eval_loss"] and result.best_step == 120


def test_annealing_layers_are_told_the_step() -> None:
    model = create_ucsa_model(
        task="lm", hidden_size=32, num_heads=2, num_layers=1, vocab_size=32, sparsity_start=1.0
    )
    Trainer(model, settings(steps=3)).fit(text())
    assert [int(x) for name, x in model.named_buffers() if name.endswith("anneal_step")] == [3]


def test_trainers_of_one_process_keep_their_precision() -> None:
    losses = []
    for precision in ("no", "bf16", "no"):
        result = Trainer(small(), settings(mixed_precision=precision)).fit(text())
        losses.append(result.history[12]["loss"])
    assert losses[0] == losses[2] != losses[1] == pytest.approx(losses[0], rel=0.05)


class Explodes(Trainer):
    def compute_loss(self, outputs: Tensor) -> Tensor:
        loss = super().compute_loss(outputs)
        return loss * torch.inf if self.step == 5 else loss


class Steep(Trainer):
    def compute_loss(self, outputs: Tensor) -> Tensor:
        loss = super().compute_loss(outputs)
        return loss + (outputs.sum() * 0).sqrt() if self.step == 5 else loss


@pytest.mark.parametrize(
    ("kind", "accumulated", "reason"),
    [
        (Explodes, 1, "loss is inf"),
        (Explodes, 2, "loss is inf"),
        (Steep, 1, "norm of the gradient is nan"),
    ],
)
def test_divergence_stops_before_the_weights_move(
    kind: type[Trainer], accumulated: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    c = {"schedule": "constant", "gradient_accumulation_steps": accumulated}
    model, five = small(), small()
    result = kind(model, settings(**c)).fit(text())
    assert (result.outcome, result.step) == ("diverged", 6) and 6 not in result.history
    assert caplog.messages == [f"the {reason} at step 6: training stops"]
    Trainer(five, settings(**c, steps=5)).fit(text())
    assert torch.equal(weights(model), weights(five))
    # No gradient is left that would spoil the next training.
    assert Trainer(model, settings(steps=1)).fit(text()).outcome == "finished"


def test_divergence_of_an_overridden_train_step_is_noticed() -> None:
    class Own(Trainer):
        def train_step(self, batch: object) -> Tensor:
            return torch.tensor(torch.nan if self.step == 5 else 1.0)

    result = Own(small(), settings()).fit(text())
    assert (result.outcome, result.step) == ("diverged", 6)


def test_resumed_batch_order_covers_every_example() -> None:
    whole = iter(BatchOrder(10, 4, seed=1))
    batches = [next(whole) for _ in range(10)]
    later = iter(BatchOrder(10, 4, seed=1, first=12))
    assert [next(later) for _ in range(7)] == batches[3:]
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]
    shares = [iter(BatchOrder(10, 4, seed=1, rank=r, world=2)) for r in (0, 1)]
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
def test_wrong_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**fields)


def test_dictionary_of_the_specification() -> None:
    c = TrainingConfig.from_dict(
        {
            "optimizer": {"type": "adamw", "lr": 1e-4, "weight_decay": 0.01},
            "scheduler": {"type": "cosine", "warmup_steps": 1000},
            "mixed_precision": True,
            "gradient_clipping": 1.0,
            "steps": 5000,
        }
    )
    assert (c.learning_rate, c.weight_decay, c.warmup_steps) == (1e-4, 0.01, 1000)
    assert (c.schedule, c.mixed_precision, c.gradient_clipping) == ("cosine", "bf16", 1.0)
    with pytest.raises(
        ConfigError, match=r"TrainingConfig\.optimizer = 'sgd': must be one of 'adamw', 'muon'"
    ):
        TrainingConfig.from_dict({"optimizer": {"type": "sgd"}})
    with pytest.raises(ConfigError, match=r"scheduler.speed: must be one of type, warmup_steps"):
        TrainingConfig.from_dict({"scheduler": {"speed": 1}})


def test_the_auxiliary_loss_is_logged_beside_the_loss() -> None:
    model = create_dala_model(
        task="lm",
        hidden_size=32,
        num_heads=2,
        num_layers=1,
        vocab_size=32,
        block_size=4,
        state_update_frequency=1,
        global_tokens=4,
    )
    result = Trainer(model, settings(steps=2, log_every=1)).fit(text())
    found = [metrics["auxiliary_loss"] for metrics in result.history.values()]
    assert found[0] == 0 < found[1]  # DALA's router begins in balance


def test_learning_rate_by_schedule() -> None:
    cosine = settings(steps=100, warmup_steps=10)
    assert cosine.rate(0) == 0.1 and cosine.rate(9) == 1.0 and cosine.rate(10) == 1.0
    assert cosine.rate(55) == pytest.approx(0.55) and cosine.rate(100) == pytest.approx(0.1)
    adaptive = settings(steps=100, warmup_steps=25, schedule="adaptive")
    assert adaptive.rate(99) == pytest.approx(0.5)  # sqrt(25 / 100)
    assert settings(schedule="constant").rate(11) == 1.0


def test_trainer_subclass_of_the_specification() -> None:
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


def test_hugging_face_models_recompute_their_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
            use_cache=False,
        )
    )
    ran: list[object] = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: ran.append(1))
    Trainer(model, settings(steps=1)).fit(text())
    assert len(ran) == 1
    Trainer(model, settings(steps=1, gradient_checkpointing=True)).fit(text())
    assert len(ran) == 3


def test_older_hugging_face_models_recompute_their_blocks() -> None:
    class Older(nn.Linear):
        def gradient_checkpointing_enable(self) -> None:
            self.recomputes = True

    model = Older(2, 2)
    Trainer(model, settings(gradient_checkpointing=True)).setup_training()
    assert model.recomputes


def test_model_without_checkpointing_is_refused() -> None:
    message = "Linear must have a method enable_gradient_checkpointing, or Hugging Face's gradient_"
    with pytest.raises(ValueError, match=message):
        Trainer(nn.Linear(2, 2), settings(gradient_checkpointing=True)).fit(text())


class Interrupted(Trainer):
    def _one_step(self, batches: object) -> float:
        if self.step == 8:
            raise KeyboardInterrupt
        return super()._one_step(batches)


def test_progress_bar_starts_at_the_step_and_closes_on_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = settings(checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt) as kept:  # its frames keep the bar from being collected
        Interrupted(small(), c, directory=tmp_path, progress=True).fit(text())
    out, err = capsys.readouterr()
    assert kept.tb and out == "" and err.endswith("\n") and "| 0/12 [" in err and " 8/12 [" in err
    Trainer(small(), c, directory=tmp_path, progress=True).fit(text())
    err = capsys.readouterr().err
    assert "| 0/12 [" not in err and "| 8/12 [" in err and "12/12 [" in err and "loss=" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_is_shown_on_terminals_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    Trainer(small(), settings(steps=1)).fit(text())
    assert ("1/1 [" in stream.getvalue()) == terminal
    stream.truncate(0)
    Trainer(small(), settings(steps=1), progress=False).fit(text())
    assert stream.getvalue() == ""
