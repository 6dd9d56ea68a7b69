"""Short training of a pretrained model with another attention in its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from danon.attention.base import BaseAttention
from danon.bench.suite import UnmeasuredError
from danon.data.corpora import sample_windows
from danon.evaluation.attention_swap import swap_attention
from danon.evaluation.pretrained_plans import Adaptation
from danon.training import Trainer, TrainingConfig

__all__ = ["finetune"]

WARMUP = 10
"""Most steps of warm-up."""


class _ModelWithAuxiliaryLoss(nn.Module):
    """A model as the trainer calls it: tokens (B, N) to logits, and an auxiliary loss."""

    def __init__(self, model: Any, attentions: Sequence[BaseAttention]) -> None:
        super().__init__()
        self.model = model
        self._attentions = tuple(attentions)  # which the model has in its layers

    def forward(self, ids: Tensor) -> Any:
        """Return the model's output for tokens (B, N)."""
        return self.model(ids, use_cache=False)

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the attentions' auxiliary losses, a scalar."""
        return torch.stack([a.auxiliary_loss() for a in self._attentions]).sum()


@contextmanager
def finetune(
    model: Any, attentions: Sequence[BaseAttention], text: Tensor, length: int, how: Adaptation
) -> Iterator[tuple[Any, float]]:
    """Train a copy of a model, all of its weights, with other attentions in its layers.

    Args:
        model: model of transformers, which stays as it is.
        attentions: one for each layer.
        text: tokens (n,) to train on.
        length: tokens of an example.
        how: steps, batch size and learning rate.

    Yields:
        The trained copy, and the seconds of its training.

    Raises:
        UnmeasuredError: the training diverged.
        CorpusError: the text is shorter than an example.
    """
    data = TensorDataset(*sample_windows(text, how.steps * how.batch, length, seed=0))
    with swap_attention(copy.deepcopy(model).requires_grad_(True), attentions) as changed:
        seconds = _train(changed, attentions, data, how)
        yield changed.eval().requires_grad_(False), seconds


def _train(
    model: Any, attentions: Sequence[BaseAttention], data: TensorDataset, how: Adaptation
) -> float:
    config = TrainingConfig(
        steps=how.steps,
        batch_size=how.batch,
        learning_rate=how.rate,
        log_every=how.steps,
        warmup_steps=min(WARMUP, how.steps // 5),
        mixed_precision="bf16",
    )
    wrapped = _ModelWithAuxiliaryLoss(model, attentions)
    start = perf_counter()
    try:
        result = Trainer(wrapped, config, progress=False).fit(data)
    finally:  # the wrapped model is in a reference cycle, which would keep all of it
        wrapped.model, wrapped._attentions = None, ()
    if result.outcome == "diverged":
        raise UnmeasuredError("failed", f"diverged at step {result.step}")
    return perf_counter() - start
