"""Numbers hidden in real text and asked for at its end, as a test of a long context."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.runs.task_registry import TaskRecord, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answer", "Prompt", "prompts"]

BEGIN = (
    "<|im_start|>user\nThere is important information hidden in a lot of text. Find it and "
    "memorize it.\n\n"
)
NEEDLE = "\n\nRemember this: {} is {}.\n\n"
QUESTION = "\n\nWhat did you have to remember?<|im_end|>\n<|im_start|>assistant\n"
# The blank before a number is part of what is given: whether the model would write it is not asked.
ASK = "Remember this: {} is "
END = ".\n"
THINGS = (
    "the pass key of the castle",
    "the price of the black horse",
    "the number of soldiers in the north",
    "the year of the great storm",
    "the weight of the golden crown",
)
DIGITS = 5

register(
    TaskRecord(
        suite="pretrained",
        name="passkey",
        title="numbers hidden in a text, asked for at its end",
        question="Numbers are hidden in a text: which number belongs to each thing?",
    )
)


@dataclass(frozen=True)
class Answer:
    """A number as it is asked for: tokens [start, stop) of a prompt are its digits.

    Attributes:
        depth: where it was hidden, as a share of the text.
    """

    number: str
    depth: float
    start: int
    stop: int


@dataclass(frozen=True)
class Prompt:
    """Text with numbers in it, and each of them asked for and answered, in some order.

    Attributes:
        ids: tokens (N,).
    """

    ids: Tensor
    answers: tuple[Answer, ...]


def prompts(
    encode: Callable[[str], Tensor],
    text: Tensor,
    length: int,
    depths: Sequence[float],
    examples: int,
) -> Iterator[Prompt]:
    """Yield prompts, the same for the same arguments.

    Each prompt has its own numbers, order of questions and stretch of the text.

    Args:
        encode: tokens (n,) of a string.
        text: tokens to hide the numbers in.
        length: tokens N of a prompt.
        depths: ascending shares of the text, a number at each; at most as many as there are
            :data:`THINGS`.
        examples: number of prompts.

    Raises:
        ValueError: a text that is too short, or a length without room for any of it.
    """
    import torch

    begin, question, end = encode(BEGIN), encode(QUESTION), encode(END)
    for example in range(examples):
        draw = random.Random(example)
        things = draw.sample(THINGS, len(depths))
        numbers = [str(n) for n in draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), len(depths))]
        needles = [encode(NEEDLE.format(*pair)) for pair in zip(things, numbers, strict=True)]
        order = draw.sample(range(len(depths)), len(depths))
        tail, spans = [question], []
        for i in order:
            tail += [encode(ASK.format(things[i])), encode(numbers[i]), end]
            stop = sum(map(len, tail)) - len(end)
            spans.append((stop - len(tail[-2]), stop))
        room = length - sum(map(len, (begin, *needles, *tail)))
        if not 0 < room < len(text):
            raise ValueError(
                f"length = {length}: leaves {room} tokens of text, must be from 1 to {len(text)}"
            )
        start = draw.randrange(len(text) - room)
        excerpt = text[start : start + room]
        cuts = [0, *(round(depth * room) for depth in depths), room]
        parts = [begin, excerpt[: cuts[1]]]
        for i, needle in enumerate(needles):
            parts += [needle, excerpt[cuts[i + 1] : cuts[i + 2]]]
        first = sum(map(len, parts))
        answers = (
            Answer(numbers[i], depths[i], first + a, first + b)
            for i, (a, b) in zip(order, spans, strict=True)
        )
        yield Prompt(torch.cat([*parts, *tail]), tuple(answers))
