"""Rounds of the gate that are made up."""

from __future__ import annotations

import math
import random

from danon.gate.paired_processes import Measurement
from danon.runs.case import Case
from gate_validation.rounds import Round


def rounds(slowdown: float, count: int, *, noise: float = 0.005, seed: int = 0) -> list[Round]:
    """Made up: two attentions, both slowed."""
    draw = random.Random(seed)
    names = [Case("speed", name, 64, "float32", "forward").id for name in ("a", "b")]

    def measured() -> Measurement:
        offset = draw.gauss(0, noise) + math.log1p(slowdown)
        base = tuple(0.02 * math.exp(draw.gauss(0, noise)) for _ in range(4))
        return Measurement(offset, base, tuple(x * math.exp(offset) for x in base))

    return [
        Round(slowdown, "quiet", "c" * 40, "abacus", "now", 1.0, {n: measured() for n in names})
        for _ in range(count)
    ]
