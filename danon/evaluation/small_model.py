"""The small model that every attention is trained in, and its training: equal for everyone.

Shapes: tokens (B, N), hidden states (B, N, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.config import AttentionConfig
from danon.models import Backbone
from danon.models.short_convolution import ShortConvolution
from danon.training import IGNORED, Trainer

__all__ = [
    "EVAL_TOKENS",
    "AnswerTrainer",
    "Shape",
    "answer_logits",
    "build_encoder",
    "build_small_model",
    "measured_attention",
    "sized",
]

EVAL_TOKENS = 16384
"""Tokens that are judged at once."""


@dataclass(frozen=True)
class Shape:
    """Of the model.

    Attributes:
        vocabulary: different tokens.
        length: the longest input, which the attention is sized for.
        entries: what a query may see of it on average, at most about.
    """

    vocabulary: int
    length: int
    entries: int
    width: int
    heads: int
    layers: int

    def config(self) -> AttentionConfig:
        return AttentionConfig(
            hidden_size=self.width,
            num_heads=self.heads,
            causal=True,
            num_layers=self.layers,
            vocab_size=self.vocabulary,
            max_sequence_length=self.length,
        )


def sized(attention: str, shape: Shape) -> BaseAttention:
    """The attention under test, in the size of the task."""
    return registry.get(attention).with_budget(shape.config(), shape.entries)


def build_encoder(
    config: AttentionConfig, mixer: Callable[[], BaseAttention], seed: int
) -> Backbone:
    """A model that gives hidden states, with first weights of that seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Backbone(config, mixer, task="encoder")
        # Tokens as long as what the layers add to them: recall is learned in half the steps.
        nn.init.normal_(model.embed.weight, std=config.hidden_size**-0.5)
    return model


def build_small_model(attention: str, shape: Shape, seed: int) -> Backbone:
    """A model that gives hidden states; its layers past the first have that attention."""
    config, made = shape.config(), 0

    def mixer() -> BaseAttention:
        nonlocal made
        made += 1
        with torch.random.fork_rng(devices=[]):  # or what it draws would change the rest
            torch.manual_seed(1000 * seed + made)
            return ShortConvolution(config) if made == 1 else sized(attention, shape)

    return build_encoder(config, mixer, seed)


def measured_attention(model: Backbone) -> BaseAttention:
    """The one under test, of the last layer."""
    mixer = list(model.layers)[-1].mixer
    assert isinstance(mixer, BaseAttention)
    return mixer


def answer_logits(model: Backbone, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the places that have an answer, and these answers."""
    wanted = answers != IGNORED
    return F.linear(model(ids)[wanted], model.embed.weight), answers[wanted]


class AnswerTrainer(Trainer):
    """Judges a model of hidden states where there are answers, and only there.

    Attributes:
        judging_s: seconds that evaluations took, which are no training.
    """

    judging_s = 0.0

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        ids, answers = (x.flatten(0, -2) for x in batch)  # of items, each a batch itself
        return answer_logits(self.accelerator.unwrap_model(self.model), ids, answers)

    def compute_loss(self, outputs: Any) -> Tensor:
        logits, wanted = outputs
        loss = F.cross_entropy(logits.float(), wanted)
        extra: Tensor = self.accelerator.unwrap_model(self.model).auxiliary_loss()
        return loss + extra if self.model.training else loss

    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        start, config = perf_counter(), self.config
        length = dataset[0][0].shape[-1]  # may be another than that of the training's batches
        self.config = replace(config, batch_size=max(1, EVAL_TOKENS // length))
        try:
            return super().evaluate(dataset)
        finally:
            self.config = config
            self.judging_s += perf_counter() - start
