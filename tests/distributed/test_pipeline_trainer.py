"""A model trained in two stages has the weights, the losses and the checkpoints of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from training_cases import KINDS, LENGTHS, distance, full, small_model, tokens

from danon.distributed.pipeline_strategy import PipelineOptions
from danon.distributed.pipeline_trainer import PipelineTrainer
from danon.training import Trainer, TrainingConfig
from danon.training.ranks import Ranks

SETTINGS = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1}


def piped(
    model: nn.Module,
    data: Dataset[Any],
    options: dict[str, Any] | None = None,
    evaluated: Dataset[Any] | None = None,
    directory: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train in stages and return what :func:`training_cases.train` returns."""
    trainer = PipelineTrainer(
        model,
        TrainingConfig(**{**SETTINGS, **settings}),
        PipelineOptions(**{"stages": 2, "chunks": 2, **(options or {})}),
        directory=directory,
        progress=False,
    )
    empty = []
    trainer.listeners = (lambda *_: empty.append(sum(p.numel() == 0 for p in model.parameters())),)
    result = trainer.fit(data, evaluated)
    return {
        "weights": {name: full(p) for name, p in model.named_parameters()},
        "losses": [step["loss"] for step in result.history.values()],
        "evaluations": [x["eval_loss"] for x in result.history.values() if "eval_loss" in x],
        "outcome": result.outcome,
        "released": empty,
        "step": result.step,
        "optimizer": len(trainer.optimizer.state),
    }


def double(kind: str) -> nn.Module:
    """Return a model in float64: Adam makes any size of a gradient that is nearly zero."""
    return small_model(kind).double()


def small(kind: str, length: int, schedule: str, **settings: Any) -> dict[str, Any]:
    return piped(double(kind), tokens(length), {"schedule": schedule}, **settings)


def alone(kind: str, length: int, **settings: Any) -> dict[str, Any]:
    """Train in one process."""
    model, directory = double(kind), settings.pop("directory", None)
    config = TrainingConfig(**{**SETTINGS, **settings})
    result = Trainer(model, config, directory=directory, progress=False).fit(tokens(length))
    return {
        "weights": {name: full(p) for name, p in model.named_parameters()},
        "losses": [step["loss"] for step in result.history.values()],
    }


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_one_process(kind: str, length: str) -> None:
    schedule = "gpipe" if length == "short" else "1f1b"
    want = alone(kind, LENGTHS[length])
    for got in rank_pool(2).run(small, kind, LENGTHS[length], schedule):
        assert got["outcome"] == "finished"
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-9)
        assert distance(got, want) < 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3, "gradient_clipping": None},
        {"gradient_clipping": 0.01, "label_smoothing": 0.1},
        {"gradient_centralization": True, "gradient_checkpointing": True},
        {"start_size": 0.3, "size_growth": 2.0, "steps": 12},
        pytest.param({"max_batch_size": 8, "steps": 10}, marks=pytest.mark.slow),
        {"mixed_precision": "bf16"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_do_the_same(settings: dict[str, Any]) -> None:
    want = alone("dala", 40, **settings)
    several = rank_pool(2).run(with_settings, settings)
    narrow = "mixed_precision" in settings  # sums in bfloat16 depend on their order
    for got in several:
        assert got["losses"] == pytest.approx(want["losses"], abs=2e-2 if narrow else 1e-9)
        assert distance(got, want) < (2e-3 if narrow else 1e-9)


def with_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return small("dala", 40, "1f1b", **settings)


def evaluating() -> dict[str, Any]:
    data = tokens(20)
    return piped(small_model("ucsa"), data, None, Subset(data, range(7)), eval_every=1)


def test_evaluations_are_those_of_one_process() -> None:
    model, data = small_model("ucsa"), tokens(20)
    config = TrainingConfig(**SETTINGS, eval_every=1)
    result = Trainer(model, config, progress=False).fit(data, Subset(data, range(7)))
    want = [x["eval_loss"] for x in result.history.values()]
    for got in rank_pool(2).run(evaluating):
        assert got["evaluations"] == pytest.approx(want, abs=1e-5)


def test_each_process_holds_its_stage_alone() -> None:
    first, second = rank_pool(2).run(small, "msra", 20, "1f1b")
    parameters = dict(small_model("msra").named_parameters())
    held = [
        {name for name in parameters if name.startswith(starts)}
        for starts in (("embed", "layers.0"), ("embed", "layers.1", "norm"))
    ]
    # Listeners are called by the main process alone.
    assert first["released"] == [len(parameters) - len(held[0])] * 3
    for one, names in zip((first, second), held, strict=True):
        assert 0 < one["optimizer"] <= len(names)  # those that have had a gradient
    assert distance(first, second) == 0


def stopped_and_resumed(directory: Path) -> dict[str, Any]:
    """Train in one go, and with a stop; some steps each."""
    data = tokens(40)
    straight = piped(double("dala"), data, steps=6)
    stopping = {"directory": directory, "checkpoint_every": 2}

    class StopError(Exception):
        pass

    class Stopped(Dataset[Any]):
        def __init__(self) -> None:
            self.reads = 0

        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            if self.reads > 2 + 4 * 3:  # the sample, and three steps
                raise StopError
            return data[index]

    try:
        piped(double("dala"), Stopped(), steps=6, **stopping)
        raise AssertionError("it must stop")
    except StopError:
        pass
    resumed = piped(double("dala"), data, steps=6, **stopping)
    return {"straight": straight, "resumed": resumed}


def test_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    for both in rank_pool(2).run(stopped_and_resumed, tmp_path / "run"):
        straight, resumed = both["straight"], both["resumed"]
        assert resumed["step"] == 6
        assert distance(resumed, straight) == 0
    # One process goes on from the checkpoint of two stages.
    one = alone("dala", 40, steps=6, directory=tmp_path / "run", checkpoint_every=2)
    assert distance(one, straight) < 1e-12


def continued(directory: Path) -> dict[str, Any]:
    return piped(double("ucsa"), tokens(40), steps=4, directory=directory, checkpoint_every=2)


def test_checkpoint_of_one_process_continues_in_stages(tmp_path: Path) -> None:
    want = alone("ucsa", 40, steps=4, directory=tmp_path / "run", checkpoint_every=2)
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    for got in rank_pool(2).run(continued, tmp_path / "run"):
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-9)
        assert distance(got, want) < 1e-9


class Tied(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def error_of(wrong: str) -> str:
    """Train with something wrong and return the error."""
    rank = Ranks.join().rank
    model, data, options, settings = small_model("msra"), tokens(20), {}, {}
    if wrong == "too many stages":
        options = {"stages": 3}
    elif wrong == "stages and processes":
        model, options = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), {"stages": 4}
        options["chunks"] = 4
    elif wrong == "chunks":
        options = {"chunks": 3}
    elif wrong == "growing batch":
        settings = {"max_batch_size": 7}
    elif wrong == "mixup":
        settings = {"mixup_alpha": 0.2}
    elif wrong == "fp16":
        settings = {"mixed_precision": "fp16"}
    elif wrong == "options":
        options = {"schedule": "gpipe", "chunks": 2 if rank == 0 else 4}
    elif wrong == "model":
        model = nn.Linear(3, 3)
    elif wrong == "inputs":
        data = [{"tokens": torch.zeros(3), "labels": torch.zeros(3)}] * 8  # type: ignore[assignment]
    elif wrong == "tied":
        weight = nn.Parameter(torch.eye(3))
        model = nn.Sequential(Tied(weight), nn.Linear(3, 3), Tied(weight))
        data = TensorDataset(torch.ones(8, 3), torch.zeros(8, dtype=torch.int64))
    elif wrong == "token":
        data.tensors[0][:] = 64
    try:
        piped(model, data, options, **settings)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("too many stages", "pipeline_stages = 3: must be from 1 to 2, the number of the model"),
        ("stages and processes", "pipeline_stages = 4 with 2 processes: their number must be a"),
        ("chunks", "a batch of 4 examples: must be a multiple of 3, 1 replicas with pipeline_"),
        ("growing batch", "a batch of 7 examples: must be a multiple of 2, 1 replicas"),
        ("mixup", "mixup_alpha = 0.2: must be 0 in a pipeline"),
        ("fp16", "mixed_precision = 'fp16': must be 'bf16' or 'no' in a pipeline"),
        ("options", "the ranks disagree about chunks: rank 0: 2; rank 1: 4"),
        ("model", "Linear cannot be cut into stages: must be a danon.models.Backbone"),
        ("inputs", "a batch with tokens: in a pipeline it must have input_ids"),
        ("tied", "2.weight is in the stages 0 and 1: layers that share a parameter"),
        ("token", "input_ids holds 64: must be in [0, vocab_size = 64)"),
    ],
)
def test_wrong_input_is_the_same_error_on_every_rank(wrong: str, message: str) -> None:
    for said in rank_pool(2).run(error_of, wrong, timeout_s=20):
        assert message in said, said


def diverging() -> tuple[str, int]:
    class Steep(PipelineTrainer):
        def compute_loss(self, outputs: Any) -> Any:
            return super().compute_loss(outputs)

        def _chunk_loss(self, *args: Any) -> Any:
            odd = float("inf") if self.step == 1 else 1.0
            return tuple(x * odd for x in super()._chunk_loss(*args))

    config = TrainingConfig(**SETTINGS, gradient_clipping=None)
    options = PipelineOptions(2, 2)
    result = Steep(small_model("msra"), config, options, progress=False).fit(tokens(20))
    return result.outcome, result.step


def test_divergence_ends_all_stages() -> None:
    assert rank_pool(2).run(diverging) == [("diverged", 2)] * 2
