"""Studies of an architecture: which attention on which layer, how many layers and heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.bench.eligibility import PROBE, check_eligible
from danon.bench.suite import UnmeasuredError
from danon.bench.timed_workload import TimedModel
from danon.bench.verification import Verifier
from danon.config import AttentionConfig
from danon.config.mechanism import mechanisms
from danon.evaluation.lookup_model import STAGES, VOCABULARY, WIDTH, error_rate, train_until_solved
from danon.evaluation.small_model import build_encoder
from danon.measure.memory import peak_bytes
from danon.models import Backbone
from danon.models.short_convolution import ShortConvolution
from danon.runs.case import Case
from danon.tuned.search_space import Categorical, Range, Space
from danon.tuning.measured_case import measure_beside, speed_case
from danon.tuning.target import TuningTarget, register

__all__ = ["ArchitectureTarget"]

CONVOLUTION, NONE = "convolution", "none"
"""The cheapest layer, which sees only neighbouring tokens; and no layer."""
CHEAP_BASELINES = ("window", "linear")
LAYERS, MIN_LAYERS = 4, 2
TRAINED_STAGES = 4
"""Stages of the lookup model's training that a trial can afford: up to 1024 tokens."""
EXAMPLES = 8


@register("architecture")
class ArchitectureTarget(TuningTarget):
    """The layers of a small model, beside one with the attention on the last of two layers.

    Every trial trains its model from nothing to look keys up over at most 1024 tokens. Time and
    memory are those of its forward pass at the length of the study.
    """

    description = (
        "the attention of each of two to four layers, the heads, and the entries that a query "
        "of a sparse layer sees"
    )
    reference = "a convolution, then `--mechanism`"
    error_meaning = "lookups over 1024 tokens, after a training from nothing in every trial"
    objectives = ("speed", "memory", "quality", "parameters")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        speed_case(attention, length, dtype, device)  # says what cannot run
        self._length, self._dtype, self._device = length, getattr(torch, dtype), device
        ours = mechanisms(combining=False)
        candidates = (CONVOLUTION, registry.REFERENCE, *ours, *CHEAP_BASELINES, attention)
        mixers = tuple(dict.fromkeys(candidates))
        ranges: dict[str, Range] = {
            f"layer{n}": Categorical(mixers if n <= MIN_LAYERS else (NONE, *mixers))
            for n in range(1, LAYERS + 1)
        }
        ranges |= {"heads": Categorical((1, 2, 4)), "entries": Categorical((32, 64, 128, 256, 512))}
        self.space = Space(
            ranges,
            {
                "layer1": CONVOLUTION,
                "layer2": attention,
                "layer3": NONE,
                "layer4": NONE,
                "heads": 1,
                "entries": 128,
            },
        )
        self.starts = tuple({**self.space.default, "layer2": name} for name in mixers)
        self._verifier = Verifier()
        self._default_errors: dict[int, float] = {}  # by seed
        self._ids = torch.randint(
            VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)
        ).to(device)

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        """Yield figures of a choice; see :meth:`TuningTarget.steps`."""
        self._check(choice)
        default = self.space.default
        models = [self._model(each, seed).to(self._device) for each in (choice, default)]
        sizes = [sum(p.numel() for p in model.parameters()) for model in models]
        timed = [TimedModel(model.eval().to(self._dtype), self._ids) for model in models]
        calls = [each.call for each in timed]
        device = torch.device(self._device)
        peak, default_peak = (peak_bytes(call, device) for call in calls)
        pair = measure_beside(calls[0], calls[1], device, seed)
        if fault := timed[0].fault():
            raise ValueError(fault)
        yield {
            "parameters": float(sizes[0]),
            "parameters_ratio": sizes[0] / sizes[1],
            "peak_bytes": float(peak),
            "memory_ratio": peak / default_peak,
            "time_s": median(pair.candidate),
            **pair.metrics(),
        }
        if seed not in self._default_errors:
            *_, self._default_errors[seed] = self._train(default, seed)
        yield {"error_default": self._default_errors[seed]}
        errors = list[float]()
        for number, error in enumerate(self._train(choice, seed)):
            errors.append(error)
            yield {f"error_after_{number + 1}": error}
        yield {"error": errors[-1]}

    def _train(self, choice: Mapping[str, Any], seed: int) -> Iterator[float]:
        """Train a model, and yield its share of wrong answers after each stage.

        Raises:
            ValueError: the training diverged.
        """
        model = self._model(choice, seed).to(self._device)
        for number in range(TRAINED_STAGES):
            if not train_until_solved(model, number, seed * TRAINED_STAGES + number):
                raise ValueError(f"its training diverged in stage {number + 1}")
            longest = max(stage.task.length for stage in STAGES[number][1])
            yield error_rate(model, longest, EXAMPLES, seed)

    def _check(self, choice: Mapping[str, Any]) -> None:
        """Refuse a choice with an attention that is wrong, or cannot be in such a model."""
        shape = self._shape(choice)
        for name in dict.fromkeys(_layers(choice)):
            if name == CONVOLUTION:
                continue
            case = Case(
                "tuned",
                name,
                self._length,
                "float32",
                "training",
                self._device,
                heads=shape.num_heads,
                head_dim=shape.head_dim,
            )
            try:
                check_eligible(case, shape, choice["entries"], PROBE, self._verifier)
            except UnmeasuredError as reason:
                raise ValueError(f"{name}: {reason}") from reason

    def _shape(self, choice: Mapping[str, Any]) -> AttentionConfig:
        return AttentionConfig(
            hidden_size=WIDTH,
            num_heads=choice["heads"],
            causal=True,
            num_layers=len(_layers(choice)),
            vocab_size=VOCABULARY,
            max_sequence_length=self._length,
            rope_theta=1e6,
        )

    def _model(self, choice: Mapping[str, Any], seed: int) -> Backbone:
        shape, names = self._shape(choice), iter(_layers(choice))

        def mixer() -> BaseAttention:
            name = next(names)
            if name == CONVOLUTION:
                return ShortConvolution(shape)
            return registry.get(name).with_budget(shape, choice["entries"])

        return build_encoder(shape, mixer, seed)


def _layers(choice: Mapping[str, Any]) -> list[str]:
    """Return the names of the mixers, the first layer first."""
    return [x for n in range(1, LAYERS + 1) if (x := choice[f"layer{n}"]) != NONE]
