"""Figures of a trial: settings beside the default ones, schedules, lookups."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import baselines  # noqa: F401  registers them
from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.config import AttentionConfig
from danon.data.pretrained_models import pretrained_model
from danon.data.tasks.lookup import Lookup
from danon.evaluation import lookup_model
from danon.evaluation.curriculum import Stage
from danon.evaluation.lookup_model import errors
from danon.tuning import measured_case, target
from danon.tuning.objective import Objective
from danon.tuning.targets import architecture, quantization, schedule
from danon.tuning.targets.architecture import ArchitectureTarget
from danon.tuning.targets.hyperparameters import HyperparameterTarget
from danon.tuning.targets.quantization import QuantizationTarget
from danon.tuning.targets.schedule import ScheduleTarget
from danon.tuning.trial_server import TrialServer


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_case, "TIMING_S", 0.05)


class Blind(BaseAttention):
    """Finds nothing."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(q)


class TestLookupErrors:
    def test_errors_fall_as_the_attention_sees_more(self) -> None:
        window = registry.get("window")
        found = [
            errors(make, 2048, 0, "cpu")
            for make in (
                registry.get("sdpa").build,
                lambda shape: window.build(shape, width=512),
                lambda shape: window.build(shape, width=64),
                Blind,
            )
        ]
        assert found[0] < 0.03 < found[1] < found[2] < found[3]
        assert found[3] > 0.95

    def test_errors_depend_on_the_seed_alone(self) -> None:
        dense = registry.get("window").build
        assert errors(dense, 1024, 0, "cpu") == errors(dense, 1024, 0, "cpu")
        assert len({errors(dense, 1024, seed, "cpu") for seed in range(4)}) > 1


class TestHyperparameters:
    def test_figures_are_ratios_to_the_default_settings(self) -> None:
        some = HyperparameterTarget("window", 1500, "float32", "cpu")
        usual, narrow = (list(some.steps({"width": width, "sinks": 64}, 0)) for width in (512, 64))
        assert len(usual) == 2 and usual[0]["memory_ratio"] == 1
        assert usual[1]["error"] == usual[0]["error_default"] == narrow[0]["error_default"]
        assert narrow[0]["memory_ratio"] < 1 and narrow[1]["error"] > usual[1]["error"]
        assert some.settings({"width": 64, "sinks": 4}) == {"width": 64, "sinks": 4}

    def test_wrong_output_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        some = HyperparameterTarget("window", 600, "float32", "cpu")
        real = some._build

        def wrong(shape: AttentionConfig, settings: dict[str, Any]) -> BaseAttention:
            made = real(shape, settings)
            made.band = type(made.band)(10, 0, 0, True)  # type: ignore[assignment]
            made.oracle = real(shape, settings).oracle  # type: ignore[method-assign]
            return made

        monkeypatch.setattr(some, "_build", wrong)
        with pytest.raises(ValueError, match=r"error|output"):
            list(some.steps({"width": 64, "sinks": 0}, 0))


class TestSchedule:
    def test_figures_of_each_schedule(self) -> None:
        some, threads = ScheduleTarget("window", 1500, "float32", "cpu"), torch.get_num_threads()
        for change in ({}, {"batch": 2}, {"chunk": 512}, {"threads": 1}):
            ((figures),) = some.steps({**some.space.default, **change}, 0)
            assert figures["time_ratio"] > 0 and figures["tokens_per_s"] > 0
            assert (figures["memory_ratio"] > 1.5) == ("batch" in change)
        assert torch.get_num_threads() == threads

    def test_schedule_with_a_wrong_output_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forgetful(module: Any, chunk: int) -> Any:
            return lambda q, k, v: torch.cat(
                [module(*x) for x in zip(*(y.split(chunk, 2) for y in (q, k, v)), strict=True)], 2
            )

        monkeypatch.setattr(schedule, "_in_chunks", forgetful)
        some = ScheduleTarget("window", 1500, "float32", "cpu")
        with pytest.raises(ValueError, match=r"error|output"):
            list(some.steps({**some.space.default, "chunk": 512}, 0))


class TestArchitecture:
    CHOICE: ClassVar[dict[str, Any]] = {
        "layer1": "convolution",
        "layer2": "window",
        "layer3": "none",
        "layer4": "sdpa",
        "heads": 2,
        "entries": 64,
    }

    def test_figures_of_a_trained_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stages = tuple((6e-3, (Stage(Lookup(n, 4, 512), 4, 3),)) for n in (32, 48))
        for module in (lookup_model, architecture):
            monkeypatch.setattr(module, "STAGES", stages)
        monkeypatch.setattr(architecture, "TRAINED_STAGES", 2)
        some = ArchitectureTarget("msra", 1500, "float32", "cpu")
        steps = list(some.steps(self.CHOICE, 0))
        figures: dict[str, float] = {}
        for step in steps:
            figures |= step
        assert figures["parameters"] > 100_000 and figures["parameters_ratio"] > 1.2
        assert figures["time_ratio"] > 1 and figures["memory_ratio"] > 0
        assert figures["error"] == figures["error_after_2"] and 0 < figures["error"] <= 1
        assert "error" not in steps[0]  # what is cheap comes first
        assert Objective(("balanced",), {}, some.objectives).lower_bound(steps[0]) > 0
        assert {**steps[0], "error": 1} != steps[-1]
        assert [some.space.check(start) for start in some.starts] == [None] * 7

    def test_attention_that_cannot_be_in_a_model_raises(self) -> None:
        some = ArchitectureTarget("super-hybrid", 600, "float32", "cpu")
        with pytest.raises(ValueError, match="super-hybrid: runs one of the mechanisms"):
            next(some.steps(some.space.default, 0))


class TestQuantization:
    @pytest.fixture(autouse=True)
    def _tiny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers")
        monkeypatch.setattr(quantization, "MODEL", "tiny")
        monkeypatch.setattr(quantization, "TEXT", ("code", "argparse.py"))

    def test_figures_of_quantized_layers(self) -> None:
        some = QuantizationTarget("window", 256, "float32", "cpu")
        same, narrow = (
            {k: x for step in some.steps(choice, 0) for k, x in step.items()}
            for choice in some.starts[:2]
        )
        assert same["error"] == 0 and same["memory_ratio"] == 1 and narrow["memory_ratio"] < 1
        assert (
            0 < narrow["error"] < 0.01
            and same["changed"] == 0
            and narrow["perplexity"] != same["perplexity"]
        )
        mixed = {"layer0": "bfloat16", "layer1": "float32"}
        assert some.settings(mixed) == {"model.layers.0": "bfloat16", "model.layers.1": "float32"}
        ((between), _) = some.steps(mixed, 0)
        assert narrow["weight_bytes"] < between["weight_bytes"] < same["weight_bytes"]

    @pytest.mark.parametrize(
        ("length", "dtype", "words"),
        [
            (256, "bfloat16", "--dtype 'bfloat16': a quantization plan begins with float32"),
            (10**6, "float32", "--length 1000000: argparse.py has [0-9]+ tokens"),
        ],
    )
    def test_wrong_dtype_or_length_raises(self, length: int, dtype: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            QuantizationTarget("window", length, dtype, "cpu")

    def test_missing_model_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            type(pretrained_model("tiny")), "unavailable", lambda _: "needs a package"
        )
        with pytest.raises(ValueError, match="needs a package"):
            QuantizationTarget("window", 256, "float32", "cpu")


class TestTrialServer:
    def test_unknown_kind_lists_the_known_ones(self) -> None:
        with pytest.raises(
            ValueError, match=f"--kind 'luck': must be one of {', '.join(target.names())}"
        ):
            TrialServer().open("luck", "window", "cpu", 64, "float32")

    def test_choice_outside_the_space_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "danon.tuning.trial_server.limit_memory", lambda: None
        )  # it is of this process
        trials = TrialServer()
        trials.open("hyperparameters", "window", "cpu", 64, "float32")
        assert trials.describe()["objectives"] == ("speed", "memory", "quality")
        with pytest.raises(ValueError, match="width = 3: must be one of 64"):
            trials.begin({"width": 3, "sinks": 4}, 0)
