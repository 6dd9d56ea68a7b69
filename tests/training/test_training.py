"""The trainer: it learns, by its settings, and it says what went wrong."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import danon.training.trainer
from danon import create_dala_model, create_ucsa_model
from danon.config import ConfigError
from danon.training import BaseTrainer, Trainer, TrainingConfig
from danon.training.base import BACKENDS
from danon.training.batch_order import BatchOrder


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
        task="lm",
        hidden_size=32,
        num_heads=2,
        num_layers=1,
        vocab_size=32,
        block_size=4,
        state_update_frequency=2,
        attention_dropout=0.2,
    )


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_ucsa_model(
        task="lm",
        hidden_size=32,
        num_heads=2,
        num_layers=1,
        vocab_size=32,
        local_window_size=16,
        query_block=16,
        leaf_max=4,
        candidate_blocks=8,
        selected_blocks=2,
    )


def settings(**kw: object) -> TrainingConfig:
    return TrainingConfig(**{"steps": 12, "batch_size": 4, "learning_rate": 3e-3, **kw})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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


def test_accumulation_equals_a_larger_batch() -> None:
    models = [small(), small()]
    plain = {"gradient_clipping": None, "steps": 3}
    Trainer(models[0], settings(batch_size=8, **plain)).fit(text())
    Trainer(models[1], settings(gradient_accumulation_steps=2, **plain)).fit(text())
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-4, atol=1e-5)


class Double(nn.Module):
    """A model in float64, so that the order of a sum does not show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(32, 8), nn.Tanh(), nn.Linear(8, 32)).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(ids)


def unequal(kind: str) -> TensorDataset:
    """Twelve examples with 0 to 16 labels; every third batch of four has none at all."""
    ids, labels = text(12, 32).tensors
    for i in range(12):
        labels[i, 2 * i :] = -100
    if kind == "batches without":
        labels[8:] = -100
    return TensorDataset(ids, labels)


class InOrder(BatchOrder):
    def __iter__(self) -> Any:
        at = self.first * self.batch_size
        while True:
            yield [i % self.examples for i in range(at, at + self.batch_size)]
            at += self.batch_size


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


PROCESS = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_training as t, danon.training.trainer
from danon.training import Trainer
danon.training.trainer.BatchOrder = t.InOrder
model = t.Double()
c = t.settings(steps=3, batch_size=4, gradient_accumulation_steps=3, log_every=1,
               checkpoint_every=1)
result = Trainer(model, c, progress=False, directory={place!r}).fit(t.unequal("batches without"))
loss = [metrics["loss"] for metrics in result.history.values()]
if t.Accelerator().is_main_process:
    torch.save((t.weights(model), loss), {place!r} + "/it")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_labels_of_a_step_and_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(__file__).parent
    code = PROCESS.format(root=str(tests.parents[1]), tests=str(tests), place=str(tmp_path))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    known = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    both = [
        subprocess.Popen([sys.executable, "-c", code], env={**known, "RANK": r, "LOCAL_RANK": r})
        for r in "01"
    ]
    assert [one.wait(timeout=120) for one in both] == [0, 0]
    for step in (2, 3):
        states = (tmp_path / f"step-{step:08d}").glob("random_states*")
        assert {file.name for file in states} == {"random_states_0.pkl", "random_states_1.pkl"}
    assert not list(tmp_path.glob(".step-*"))
    got, losses = torch.load(tmp_path / "it")
    monkeypatch.setattr(danon.training.trainer, "BatchOrder", InOrder)
    model = Double()
    c = settings(steps=3, batch_size=12, log_every=1)
    want = Trainer(model, c).fit(unequal("batches without"))
    torch.testing.assert_close(got, weights(model), rtol=1e-12, atol=1e-12)
    assert losses == pytest.approx([m["loss"] for m in want.history.values()], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "'1' or '2'"),
        ("MIXED_PRECISION", "fp16", "'no' or 'bf16'"),
        ("DYNAMO_BACKEND", "INDUCTOR", "'no'"),
        *(
            (f"USE_{name}", "True", "'no' or 'off'")
            for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
        ),
    ],
)
def test_contradicting_environment_is_refused(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    message = f"ACCELERATE_{name} = '{value}' in the environment: must not be set, or be {allowed},"
    c = settings(steps=1, gradient_accumulation_steps=2, mixed_precision="bf16")
    with pytest.raises(ValueError, match=message):
        Trainer(Double(), c).fit(text())


ELSEWHERE = """
    ALLOW_CP_STANDALONE BYPASS_DEVICE_MAP CONFIG_DS_FIELDS CPU_AFFINITY DEBUG_MODE DEBUG_RDV_FILE
    DEEPSPEED_ DOWNCAST_BF16 DYNAMO_ ENABLE_RICH FP8_ GRADIENT_CLIPPING INIT_INCLUDE_BUFFERS
    IN_TPU_POD LOG_LEVEL NUM_PROCESSES SAGEMAKER_ TORCH_DEVICE USE_CPU USE_SAGEMAKER
"""
"""Say where to train or what to log, or are read only with a backend that is refused, or float8."""


def test_every_variable_of_accelerate_is_covered() -> None:
    """A new one may be one more that replaces a part of the configuration."""
    names = {
        name
        for file in Path(accelerate.__file__).parent.rglob("*.py")
        for name in re.findall(r"ACCELERATE_(\w+)", file.read_text(encoding="utf-8"))
    }
    refused = {name.removeprefix("ACCELERATE_") for name in BACKENDS}
    refused |= {"MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND"}
    assert refused <= names
    assert {x for x in names - refused if not x.startswith(tuple(ELSEWHERE.split()))} == set()


def test_variables_of_the_launcher_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Double(), Double()]
    c = settings(steps=3, gradient_accumulation_steps=2)
    Trainer(models[0], c).fit(text())
    for name, value in (
        ("MIXED_PRECISION", "no"),
        ("DYNAMO_BACKEND", "NO"),
        ("DYNAMO_MODE", "default"),
        ("USE_CPU", "True"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("USE_FSDP", "false"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    Trainer(models[1], c).fit(text())
    assert torch.equal(weights(models[0]), weights(models[1]))


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
    trainer.accelerator = Accelerator()
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


def test_resumed_batch_order_covers_every_example() -> None:
    whole = iter(BatchOrder(10, 4, seed=1))
    batches = [next(whole) for _ in range(10)]
    later = iter(BatchOrder(10, 4, seed=1, first=3))
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
    with pytest.raises(ConfigError, match=r"optimizer.type = 'sgd': must be 'adamw'"):
        TrainingConfig.from_dict({"optimizer": {"type": "sgd"}})
    with pytest.raises(ConfigError, match=r"scheduler.speed: must be one of type, warmup_steps"):
        TrainingConfig.from_dict({"scheduler": {"speed": 1}})


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


@pytest.mark.parametrize("package", ["accelerate", "filelock", "tqdm"])
def test_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"the package {package}: pip install 'danon\[training\]'"
    with pytest.raises(ImportError, match=message):
        Trainer(small(), settings(), directory=tmp_path).fit(text())
