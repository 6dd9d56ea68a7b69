"""A small dense model that looks keys up over 16384 tokens, in which other attentions are tried.

``python -m danon.evaluation.lookup_model`` trains it again (two and a half minutes on two cores).
Its weights are kept beside this file, so that errors compare wherever they were measured.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.discovery import discover
from danon.attention.registry import REFERENCE
from danon.config import AttentionConfig
from danon.data.tasks.lookup import Lookup
from danon.evaluation.curriculum import CurriculumDataset, Stage
from danon.evaluation.pretrained_plans import LookupPlan
from danon.evaluation.small_model import AnswerTrainer, build_encoder
from danon.evaluation.small_model_training import EVAL_SEED, score_answers
from danon.measure.threads import fewer_threads_beside_load
from danon.models import Backbone
from danon.models.short_convolution import ShortConvolution
from danon.runs.files import replace_file
from danon.training import TrainingConfig

__all__ = [
    "EXAMPLES",
    "LONGEST",
    "STAGES",
    "VOCABULARY",
    "WIDTH",
    "error_rate",
    "errors",
    "num_queries",
    "right_answers",
    "train_until_solved",
]

WEIGHTS = Path(__file__).with_name("lookup_model.pt")
VOCABULARY, WIDTH = 512, LookupPlan.head_dim
LONGEST = 16384
"""Tokens of the longest examples of its training."""
EXAMPLES = 4
SHARE, MOST = 8, 200
"""One in eight tokens asks, and at most 200 of an example."""
STAGES = (
    (6e-3, (Stage(Lookup(32, 4, VOCABULARY), 64, 150),)),
    (5e-3, (Stage(Lookup(128, 16, VOCABULARY), 16, 80), Stage(Lookup(32, 4, VOCABULARY), 64, 25))),
    (
        4e-3,
        (Stage(Lookup(256, 32, VOCABULARY), 8, 100), Stage(Lookup(128, 16, VOCABULARY), 16, 25)),
    ),
    (
        4e-3,
        (Stage(Lookup(1024, 128, VOCABULARY), 2, 150), Stage(Lookup(256, 32, VOCABULARY), 8, 30)),
    ),
    (
        3e-3,
        (Stage(Lookup(4096, 200, VOCABULARY), 1, 60), Stage(Lookup(1024, 128, VOCABULARY), 2, 30)),
    ),
    (
        3e-3,
        (
            Stage(Lookup(LONGEST, 240, VOCABULARY), 1, 160),
            Stage(Lookup(4096, 200, VOCABULARY), 1, 40),
        ),
    ),
)
"""Learning rates, and the stages that are trained with each."""


def errors(
    make: Callable[[AttentionConfig], BaseAttention], length: int, seed: int, device: str
) -> float:
    """Return the share of wrong answers with another attention in the model, untrained with it.

    Args:
        make: builds the attention of a configuration.
        length: tokens of an example, at most LONGEST of which are used.
        seed: seed of the examples.
        device: device of the model, in float32.
    """
    return 1 - float(right_answers(make, length, seed, device).mean())


def right_answers(
    make: Callable[[AttentionConfig], BaseAttention], length: int, seed: int, device: str
) -> Tensor:
    """Return 1 or 0 for every question, the same questions in the same order for every attention.

    Args:
        make: builds the attention of a configuration.
        length: tokens of an example, at most LONGEST of which are used.
        seed: seed of the examples.
        device: device of the model, in float32.

    Returns:
        (EXAMPLES * num_queries(length),) float64.
    """
    length = min(length, LONGEST)
    model = _model(make, length)
    loaded = model.load_state_dict(_weights(), strict=False)
    assert not loaded.unexpected_keys  # missing ones are the attention's
    return _right(model.to(device), length, EXAMPLES, seed)


def num_queries(length: int) -> int:
    """Return the number of questions of an example of that many tokens."""
    return max(1, min(length // SHARE, MOST))


def error_rate(model: Backbone, length: int, examples: int, seed: int) -> float:
    """Return the share of wrong answers of a model.

    Args:
        model: model of hidden states.
        length: tokens N of an example.
        examples: number of examples.
        seed: seed of the examples.
    """
    return 1 - float(_right(model, length, examples, seed).mean())


def _right(model: Backbone, length: int, examples: int, seed: int) -> Tensor:
    task = Lookup(length, num_queries(length), VOCABULARY)
    return score_answers(model.eval(), *task.examples(examples, EVAL_SEED + seed))


def _model(make: Callable[[AttentionConfig], BaseAttention], length: int) -> Backbone:
    config = AttentionConfig(
        hidden_size=WIDTH,
        num_heads=1,
        causal=True,
        num_layers=2,
        vocab_size=VOCABULARY,
        max_sequence_length=length,
        rope_theta=1e6,
    )
    mixers: list[BaseAttention] = []

    def mixer() -> BaseAttention:
        mixers.append(make(config) if mixers else ShortConvolution(config))
        return mixers[-1]

    return build_encoder(config, mixer, seed=0)


@cache
def _weights() -> dict[str, Any]:
    saved = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    return {name: x.float() for name, x in saved.items()}


def train() -> dict[str, Any]:
    """Train the model and return its weights in half precision."""
    discover((), ())
    model = _model(registry.get(REFERENCE).build, LONGEST)
    for number in range(len(STAGES)):
        train_until_solved(model, number, number)
    return {name: x.half() for name, x in model.state_dict().items()}


def train_until_solved(model: Backbone, number: int, seed: int) -> bool:
    """Train a model on a stage of :data:`STAGES`.

    Args:
        model: model of hidden states.
        number: number of the stage.
        seed: seed of the examples and of their order.

    Returns:
        False if the training diverged.
    """
    rate, stages = STAGES[number]
    dataset = CurriculumDataset(list(stages), seed=seed)
    steps = len(dataset)
    config = TrainingConfig(
        steps=steps,
        batch_size=1,
        log_every=steps,
        learning_rate=rate,
        seed=seed,
        weight_decay=0.1,
        warmup_steps=min(10, steps // 5),
    )
    with fewer_threads_beside_load(model.embed.weight.device):
        result = AnswerTrainer(model, config, progress=False).fit(dataset)
    return result.outcome != "diverged"


if __name__ == "__main__":
    buffer = io.BytesIO()
    torch.save(train(), buffer)
    replace_file(WEIGHTS, buffer.getvalue())
