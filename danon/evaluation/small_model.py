"""The small model that every attention is trained in, and its trainer; equal for all.

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
"""Tokens of an evaluation batch."""


@dataclass(frozen=True)
class Shape:
    """Shape of the model.

    Attributes:
        vocabulary: number of different tokens.
        length: tokens of the longest input, for which the attention is sized.
        entries: entries that a query may see on average, about.
        width: width C of the hidden states.
        heads: heads of an attention.
        layers: number of layers.
    """

    vocabulary: int
    length: int
    entries: int
    width: int
    heads: int
    layers: int

    def config(self) -> AttentionConfig:
        """Return the configuration of the model's attention."""
        return AttentionConfig(
            hidden_size=self.width,
            num_heads=self.heads,
            causal=True,
            num_layers=self.layers,
            vocab_size=self.vocabulary,
            max_sequence_length=self.length,
        )


def sized(attention: str, shape: Shape) -> BaseAttention:
    """Build an attention in the size of the task.

    Args:
        attention: registered name.
        shape: of the model.

    Raises:
        NotImplementedError: the attention has no such size.
    """
    return registry.get(attention).with_budget(shape.config(), shape.entries)


def build_encoder(
    config: AttentionConfig, mixer: Callable[[], BaseAttention], seed: int
) -> Backbone:
    """Build a model that returns hidden states.

    Args:
        config: shape of the model.
        mixer: builds the attention of a layer.
        seed: seed of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Backbone(config, mixer, task="encoder")
        # With embeddings as large as what the layers add, recall is learned in half the steps.
        nn.init.normal_(model.embed.weight, std=config.hidden_size**-0.5)
    return model


def build_small_model(attention: str, shape: Shape, seed: int) -> Backbone:
    """Build the small model: a short convolution, then layers with the attention under test.

    Args:
        attention: registered name.
        shape: shape of the model.
        seed: seed of the initial weights.

    Returns:
        A model of tokens (B, N) to hidden states (B, N, C).
    """
    config, layer = shape.config(), 0

    def mixer() -> BaseAttention:
        nonlocal layer
        layer += 1
        with torch.random.fork_rng(devices=[]):  # so that other layers start from equal weights
            torch.manual_seed(1000 * seed + layer)
            return ShortConvolution(config) if layer == 1 else sized(attention, shape)

    return build_encoder(config, mixer, seed)


def measured_attention(model: Backbone) -> BaseAttention:
    """Return the attention under test, of the last layer."""
    mixer = list(model.layers)[-1].mixer
    assert isinstance(mixer, BaseAttention)
    return mixer


def answer_logits(model: Backbone, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens that ask, and the right answers.

    Args:
        model: model of hidden states.
        ids: tokens (B, N).
        answers: (B, N), -100 where nothing is asked.

    Returns:
        Logits (answers, vocabulary), and answers (answers,).
    """
    asked = answers != IGNORED
    return F.linear(model(ids)[asked], model.embed.weight), answers[asked]


class AnswerTrainer(Trainer):
    """Trainer of a model of hidden states, whose loss is over the answers only.

    Attributes:
        evaluation_s: seconds of the evaluations, which do not count as training.
    """

    evaluation_s = 0.0

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the logits and the answers of a batch, whose items may be batches themselves."""
        ids, answers = (x.flatten(0, -2) for x in batch)
        assert isinstance(self.unwrapped, Backbone)
        return answer_logits(self.unwrapped, ids, answers)

    def compute_loss(self, outputs: Any) -> Tensor:
        """Return the mean cross entropy of the answers."""
        logits, answers = outputs
        return F.cross_entropy(logits.float(), answers)

    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Return the mean loss over a dataset, in batches of EVAL_TOKENS."""
        start, config = perf_counter(), self.config
        length = dataset[0][0].shape[-1]  # may differ from the training's
        self.config = replace(config, batch_size=max(1, EVAL_TOKENS // length))
        try:
            return super().evaluate(dataset)
        finally:
            self.config = config
            self.evaluation_s += perf_counter() - start
