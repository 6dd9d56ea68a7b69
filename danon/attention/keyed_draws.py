"""Random numbers of a training step that do not depend on how its batch is spread.

    set_draw_key(model, seed=0, step=7, rows=torch.arange(32))
    loss = model(input_ids)  # draws the same numbers wherever its 32 examples are computed

Two processes that share a batch, or two passes whose gradients are accumulated, must draw what one
pass over the whole batch draws: else they train on other numbers. So a draw is a function of the
seed, the step, the module, and, where each example has draws of its own, its position in the batch
of the step. Without a key, draws come from torch's generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "DrawKey",
    "clear_draw_key",
    "draw",
    "draw_by_example",
    "number_attentions",
    "set_draw_key",
]

STEP = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64, a counter-based generator (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators", OOPSLA)."""
WORD = 1 << 64


@dataclass(frozen=True)
class DrawKey:
    """Key of the draws of one module in a forward pass.

    Attributes:
        step: seed, step and module mixed, () int64.
        rows: position of each example in the batch of the whole step, (B,) int64; None: the pass
            has all of them in order.
    """

    step: Tensor
    rows: Tensor | None


def number_attentions(model: nn.Module) -> list[nn.Module]:
    """Give the attentions of a model numbers, so that its parts draw what the whole draws.

    Numbers that were given before stay. Call it before a model is cut into stages.

    Args:
        model: any module.

    Returns:
        The attentions, which have an attribute ``draw_key``, in order.
    """
    attentions = [module for module in model.modules() if hasattr(module, "draw_key")]
    for number, module in enumerate(attentions):
        if getattr(module, "draw_stream", None) is None:
            module.draw_stream = number  # type: ignore[assignment]
    return attentions


def set_draw_key(
    model: nn.Module, seed: int, step: int, rows: Tensor | Sequence[int] | None = None
) -> None:
    """Set the key of the draws of every attention of a model, until :func:`clear_draw_key`.

    Args:
        model: any module.
        seed: seed of the training.
        step: number of the optimizer step.
        rows: position of each example of the next forward passes in the batch of the whole step,
            (B,); None: 0, 1, 2 ...
    """
    places = {}
    for module in number_attentions(model):
        parameter = next(module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        if rows is not None and device not in places:
            places[device] = torch.as_tensor(rows, dtype=torch.int64, device=device)
        stream = module.draw_stream
        assert isinstance(stream, int)
        key = _mixed_integers(seed, step, stream)
        module.draw_key = DrawKey(  # type: ignore[assignment]
            torch.tensor(key, dtype=torch.int64, device=device), places.get(device)
        )


def clear_draw_key(model: nn.Module) -> None:
    """Let every attention of a model draw from torch's generator again.

    Args:
        model: any module.
    """
    for module in number_attentions(model):
        module.draw_key = None  # type: ignore[assignment]


def draw(key: DrawKey | None, count: int, device: torch.device, kind: int = 0) -> Tensor:
    """Draw uniform numbers in [0, 1) that all examples of a step share.

    Args:
        key: of the module; None draws from torch's generator.
        count: how many.
        device: where.
        kind: tells the draws of one pass apart.

    Returns:
        (count,) float32.
    """
    if key is None:
        return torch.rand(count, dtype=torch.float32, device=device)
    return _uniform(_mixed(key.step + kind, torch.arange(count, device=device)))


def draw_by_example(key: DrawKey | None, examples: int, count: int, device: torch.device) -> Tensor:
    """Draw uniform numbers in [0, 1) for each example of a pass.

    Args:
        key: of the module; None draws from torch's generator.
        examples: B.
        count: numbers of an example.
        device: where.

    Returns:
        (B, count) float32.

    Raises:
        ValueError: the key is of another number of examples.
    """
    if key is None:
        return torch.rand(examples, count, dtype=torch.float32, device=device)
    rows = torch.arange(examples, device=device) if key.rows is None else key.rows
    if examples % len(rows):
        raise ValueError(
            f"the draw key has {len(rows)} rows: must have one for each of {examples} examples, "
            "or for each of equal groups of them"
        )
    each = examples // len(rows)
    if each > 1:  # an item of the dataset is several examples
        rows = (rows[:, None] * each + torch.arange(each, device=device)).flatten()
    by_example = _mixed(key.step, ~rows)  # other words than those of the shared draws
    return _uniform(_mixed(by_example[:, None], torch.arange(count, device=device)))


def _uniform(word: Tensor) -> Tensor:
    """Return float32 numbers in [0, 1) of the upper 24 bits of random words."""
    return _shifted(word, 40).to(torch.float32) * 2.0**-24


def _mixed(state: Tensor, counter: Tensor) -> Tensor:
    """Return random words of a state and counters, which broadcast."""
    x = state + counter * _signed(STEP)  # products of integers wrap around, on every device
    x = (x ^ _shifted(x, 30)) * _signed(MIX[0])
    x = (x ^ _shifted(x, 27)) * _signed(MIX[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift words to the right, zeros first: torch would repeat the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed_integers(*values: int) -> int:
    """Return one random signed word of several integers."""
    word = 0
    for value in values:
        word = (word + value * STEP + STEP) % WORD
        word = (word ^ (word >> 30)) * MIX[0] % WORD
        word = (word ^ (word >> 27)) * MIX[1] % WORD
        word ^= word >> 31
    return _signed(word)


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word
