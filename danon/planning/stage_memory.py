"""The bytes of a micro-batch through one block, for sequences of any length.

MSRA is run as it is. DALA takes a step a period and UCSA one a block of queries, so a million
tokens would take minutes: they are run on shorter sequences. Their bytes go with the tokens of this
rank and with those of the whole sequence.
"""

from __future__ import annotations

import dataclasses

from danon.planning.activations import PartialModel, StageMemory, run_stage

__all__ = ["stage_memory"]

LONGEST = 32768
"""Tokens of the longest sequence that DALA and UCSA are run on as they are."""
OWN, WHOLE = 4096, 16384
"""Tokens of a rank, and of a sequence, of the shorter runs, about."""
UNIT = 3072
"""Tokens by which the runs differ: whole periods, blocks and nodes of a few levels by default."""


def stage_memory(part: PartialModel) -> StageMemory:
    """Return the bytes of a micro-batch through one block.

    Args:
        part: what is run.
    """
    own, whole = part.tokens, part.shape.length
    if part.shape.mechanism == "msra" or whole <= LONGEST:
        return run_stage(part)
    low = _short(whole, WHOLE)
    high = low + _units(WHOLE)
    if own == whole:
        short, long = (_at(part, tokens, tokens) for tokens in (low, high))
        return _combined((short, 1.0), (_difference(long, short), (whole - low) / (high - low)))
    few = _short(own, OWN)
    short, long = (_at(part, few, tokens) for tokens in (low, high))
    keys = _difference(long, short), (whole - low) / (high - low)
    if few == own:
        return _combined((short, 1.0), keys)
    many = few + _units(OWN)
    queries = _difference(_at(part, many, high), long), (own - few) / (many - few)
    return _combined((short, 1.0), keys, queries)


def _units(tokens: int) -> int:
    """Return about so many tokens in whole units."""
    return tokens // UNIT * UNIT


def _short(tokens: int, about: int) -> int:
    """Return about so many tokens, whole units less than there are; all if they are few."""
    return tokens if tokens <= 2 * about else tokens - _units(tokens - about)


def _at(part: PartialModel, own: int, whole: int) -> StageMemory:
    """Run a rank with ``own`` tokens of a sequence of ``whole``."""
    shape = dataclasses.replace(part.shape, length=whole)
    return run_stage(dataclasses.replace(part, shape=shape, tokens=own))


def _difference(a: StageMemory, b: StageMemory) -> StageMemory:
    return _combined((a, 1.0), (b, -1.0))


def _combined(*terms: tuple[StageMemory, float]) -> StageMemory:
    """Return a weighted sum, with the names of the first."""
    numbers = [field.name for field in dataclasses.fields(StageMemory) if field.name != "used"]
    sums = {
        name: round(sum(factor * getattr(run, name) for run, factor in terms)) for name in numbers
    }
    return StageMemory(**sums, used=terms[0][0].used)
