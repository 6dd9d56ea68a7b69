"""The Pareto front."""

from __future__ import annotations

import random

import numpy as np

from danon.report.pareto import pareto_front


def test_a_dominated_point() -> None:
    assert pareto_front({"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 4.0)}) == ["a", "b"]


def test_equal_points() -> None:
    assert pareto_front({1: (1.0, 2.0), 2: (1.0, 2.0), 3: (1.0, 2.5)}) == [1, 2]


def test_one_coordinate() -> None:
    assert pareto_front({"a": [2.0], "b": [1.0], "c": [1.0]}) == ["b", "c"]


def test_no_points() -> None:
    assert pareto_front({}) == []


def test_random_points_against_numpy() -> None:
    draw = random.Random(0)
    points = {i: [draw.randrange(6) for _ in range(3)] for i in range(80)}
    x = np.array(list(points.values()))
    no_larger = (x[:, None] <= x[None]).all(-1)
    smaller = (x[:, None] < x[None]).any(-1)
    dominated = (no_larger & smaller).any(0)
    assert pareto_front(points) == [i for i in points if not dominated[i]]
