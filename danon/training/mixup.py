"""Mixup: training on weighted sums of two examples and of their losses.

Zhang et al. 2018 (arXiv 1710.09412): x = l x_i + (1 - l) x_j, and the loss is l of that against y_i
and 1 - l of that against y_j, l from Beta(alpha, alpha). Tokens have no sum: their embeddings are
mixed instead.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["PairedExamples", "Partners", "mix_embeddings", "mix_inputs", "mixing_share"]


def mixing_share(alpha: float, seed: int, step: int) -> float:
    """Return l of an optimizer step, from Beta(alpha, alpha).

    Args:
        alpha: > 0; the larger, the closer to one half.
        seed: seed of the training.
        step: number of the step.
    """
    return random.Random(f"mixup {seed} {step}").betavariate(alpha, alpha)


@dataclass(frozen=True)
class Partners:
    """Partners of the examples of a batch.

    Attributes:
        batch: the partners.
        share: l of the examples.
        labels: labels of the examples.
        partner_labels: labels of the partners.
    """

    batch: Any
    share: float
    labels: int
    partner_labels: int

    def mean(self, loss: Tensor, partner_loss: Tensor) -> Tensor:
        """Return the mean of two losses over the labels of both, by their shares.

        Args:
            loss: mean over the labels of the examples.
            partner_loss: mean over those of the partners.
        """
        weights = self.share * self.labels, (1 - self.share) * self.partner_labels
        # The mean over nothing need not be a number.
        parts = [x * w for w, x in zip(weights, (loss, partner_loss), strict=True) if w > 0]
        return torch.stack(parts).sum() / sum(weights) if parts else loss * 0.0


class PairedExamples(Dataset[tuple[Any, Any]]):
    """A dataset indexed by pairs of indices.

    Args:
        dataset: map-style dataset of single examples.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, pair: Sequence[int]) -> tuple[Any, Any]:
        """Return both examples of a pair."""
        return self.dataset[pair[0]], self.dataset[pair[1]]


def mix_inputs(first: Any, second: Any, share: float) -> tuple[Any, Tensor | None]:
    """Return a batch of mixed inputs, and the tokens whose embeddings are still to be mixed in.

    Args:
        first: batch of the examples, ``(inputs, labels)`` or a mapping.
        second: batch of their partners.
        share: l of the first.

    Returns:
        The first batch with mixed inputs, and None; or as it is, and the tokens of the second.

    Raises:
        ValueError: padded examples, which have no sum.
    """
    for batch in (first, second):
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError(
                "mixup_alpha > 0 with padding in attention_mask: must be 0, or examples of one "
                "length; a token and padding have no sum"
            )
    key: Any = (
        ("input_ids" if "input_ids" in first else next(iter(first)))
        if isinstance(first, Mapping)
        else 0
    )
    one, other = first[key], second[key]
    if not one.is_floating_point():
        return first, other
    mixed = share * one + (1 - share) * other
    if isinstance(first, Mapping):
        return {**first, key: mixed}, None
    return [mixed, *first[1:]], None


@contextlib.contextmanager
def mix_embeddings(model: nn.Module, tokens: Tensor, share: float) -> Iterator[None]:
    """Mix the embeddings of other tokens into those that a model looks up.

    Args:
        model: has ``get_input_embeddings``, as Hugging Face models do, or an ``nn.Embedding``.
        tokens: of the partners, of the shape that the model is called with.
        share: l of the model's own tokens.

    Raises:
        ValueError: the model has no embedding.
    """
    embedding = _embedding_of(model)

    def mix(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return share * output + (1 - share) * module.forward(tokens)  # type: ignore[no-any-return]

    hook = embedding.register_forward_hook(mix)
    try:
        yield
    finally:
        hook.remove()


def _embedding_of(model: nn.Module) -> nn.Module:
    own = getattr(model, "get_input_embeddings", None)
    found = own() if own is not None else None
    if found is None:
        found = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"mixup_alpha > 0: {type(model).__name__} must read numbers, or have an nn.Embedding "
            "of its tokens"
        )
    return found
