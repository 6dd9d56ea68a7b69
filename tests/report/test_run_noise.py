"""Noise between runs, estimated from a comparison; changes judged beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from danon.report.run_noise import SIGNIFICANT, Change, adjust, judge, standard_error

ROUNDS = Path(__file__).parents[2] / "results" / "gate_validation" / "rounds.jsonl"


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 6, 7])
def test_standard_error_of_few_rounds(rounds: int) -> None:
    samples = np.random.default_rng(rounds).normal(0.0, 0.01, (20_000, rounds))
    ends = zip(samples.min(axis=1), samples.max(axis=1), strict=True)
    errors = [standard_error(math.exp(low), math.exp(high), rounds) for low, high in ends]
    assert np.mean(errors) == pytest.approx(np.median(samples, axis=1).std(), rel=0.15)


def test_standard_error_of_many_rounds() -> None:
    assert standard_error(0.95, 1.05, 30) == pytest.approx(0.0189, abs=1e-4)


def test_holm_correction() -> None:
    assert adjust([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert adjust([]) == []


def changes(values: dict[str, list[float]], error: float = 0.01) -> list[Change]:
    return [
        Change(value, error, ("speed", "speedup"), family)
        for family, numbers in values.items()
        for value in numbers
    ]


def quiet(seed: int, families: str = "abcdef", each: int = 8) -> dict[str, list[float]]:
    generator = np.random.default_rng(seed)
    return {name: list(generator.normal(0.0, 0.02, each)) for name in families}


def moved(values: dict[str, list[float]]) -> list[int]:
    return [i for i, x in enumerate(judge(changes(values))) if x.p < SIGNIFICANT]


def test_one_case_of_a_quiet_comparison() -> None:
    values = quiet(0)
    values["c"][3] += math.log(1.2)
    assert moved(values) == [2 * 8 + 3]


def test_one_case_of_a_noisy_comparison() -> None:
    values = {name: [6 * x for x in numbers] for name, numbers in quiet(0).items()}
    values["c"][3] = math.log(1.2)
    assert moved(values) == []


def test_a_family_that_moved_as_a_whole_is_no_noise() -> None:
    values = quiet(1)
    values["c"] = [x + 0.3 for x in values["c"]]
    values["e"][0] = 0.3
    assert moved(values) == [*range(16, 24), 32]


def test_interval_and_least_change() -> None:
    values = quiet(2)
    verdicts = judge(changes(values))
    flat = [x for numbers in values.values() for x in numbers]
    covered = [v.low <= 0 <= v.high for v in verdicts]
    assert sum(covered) >= 45
    assert all(v.low < x < v.high for v, x in zip(verdicts, flat, strict=True))
    values["a"][0] = 1.01 * verdicts[0].least
    assert 0 in moved(values)
    values["a"][0] = 0.99 * verdicts[0].least
    assert 0 not in moved(values)


def test_noise_is_not_learned_from_expected_differences() -> None:
    values = {"a": [0.5] * 10, "b": [0.5] * 10}
    assert all(x.p < SIGNIFICANT for x in judge(changes(values), learn_noise=False))


def equal_rounds(load: str, together: int) -> Iterator[list[Change]]:
    """Yield the changes of equal code in the gate's recorded rounds, medians of so many."""
    rounds = [json.loads(line) for line in ROUNDS.read_text(encoding="utf-8").splitlines()]
    equal = [x["measured"] for x in rounds if x["load"] == load and not x["slowdown"]]
    for start in range(0, len(equal) - together + 1, together):
        some = equal[start : start + together]
        yield [
            Change(
                float(np.median([x[case][0] for x in some])),
                0.015,
                (case.split("/")[0],),
                case.split("/")[1],
            )
            for case in some[0]
            if all(case in x for x in some)
        ]


@pytest.mark.parametrize(("load", "most"), [("quiet", 2), ("busy core", 1)])
def test_recorded_rounds_of_equal_code(load: str, most: int) -> None:
    sets = list(equal_rounds(load, 3))
    alarms = sum(any(x.p < SIGNIFICANT for x in judge(some)) for some in sets)
    assert len(sets) >= 26
    assert alarms <= most


def test_recorded_rounds_with_a_planted_slowdown() -> None:
    sets = list(equal_rounds("quiet", 3))[:40]
    exact = 0
    for number, some in enumerate(sets):
        index = number % len(some)
        old = some[index]
        some[index] = Change(old.value + math.log(1.2), old.error, old.group, old.family)
        exact += [i for i, x in enumerate(judge(some)) if x.p < SIGNIFICANT] == [index]
    assert exact >= 36
