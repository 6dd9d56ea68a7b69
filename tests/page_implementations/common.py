"""Definitions shared by the mechanisms, written from docs/mechanisms.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


class Entries:
    """The entries (key, value, bias) of one query."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.biases: list[Tensor | float] = []

    def add(self, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> None:
        self.keys.append(key)
        self.values.append(value)
        self.biases.append(bias)

    def weights(self, q: Tensor) -> Tensor:
        logits = torch.stack(self.keys) @ q / math.sqrt(len(q))
        return (
            logits + torch.tensor([float(b) for b in self.biases], dtype=torch.float64)
        ).softmax(0)


def length_rate(alpha: float, largest: int, config: Any) -> float:
    return min(alpha * math.log(max(config.max_sequence_length, 2)), largest)


def place(m: int, D: int) -> Tensor:
    return torch.tensor(
        [(math.cos if d % 2 else math.sin)(m / 10000 ** ((d - d % 2) / D)) for d in range(D)],
        dtype=torch.float64,
    )


def near_tokens(i: int, N: int, g: int, W: int, causal: bool) -> list[int]:
    b = max(0, i - g) // W
    near = [j for j in range(N) if j < g or abs((j - g) // W - b) <= 1]
    return [j for j in near if j <= i] if causal else near


def pool(
    k: list[Tensor],
    v: list[Tensor],
    mass: list[int],
    others: list[list[Tensor]],
    rate: int,
    score: Callable[[Tensor, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor], list[int], list[list[Tensor]]]:
    """Nodes of the next level; ``others`` are means with the same weights."""
    keys, values, masses = [], [], []
    means: list[list[Tensor]] = [[] for _ in others]
    for first in range(0, len(k), rate):
        children = range(first, min(first + rate, len(k)))
        w = torch.stack([mass[j] * score(k[j], v[j]).exp() for j in children])
        w = w / w.sum()
        keys.append(w @ torch.stack([k[j] for j in children]))
        values.append(w @ torch.stack([v[j] for j in children]))
        masses.append(sum(mass[j] for j in children))
        for mean, x in zip(means, others, strict=True):
            mean.append(w @ torch.stack([x[j] for j in children]))
    return keys, values, masses, means
