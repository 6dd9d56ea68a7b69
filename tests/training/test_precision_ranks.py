"""Levels of precision on two ranks: equal weights, as near to float32 as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from precision_cases import trained
from rank_pool import rank_pool
from torch import Tensor


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two models' weights."""
    squares = [
        (x.double() - b[name].double()).square().sum()
        for name, x in a.items()
        if name.endswith(" weight")
    ]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_ranks_train_as_one_process_does(level: Any, strategy: str) -> None:
    exact, one = trained("O0", "one"), trained(level, "one")
    first, second = rank_pool(2).run(trained, level, strategy)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    error = distance(one, exact)
    if level == "O0":
        assert error == 0 and distance(first, exact) < 1e-6
        return
    start = trained(level, "one", 0)
    assert distance(first, exact) < 1.2 * error < 0.3 * distance(start, exact)
    narrow = {name.split()[0] for name, x in first.items() if x.dtype == torch.bfloat16}
    copied = {name.split()[0] for name in first if name.endswith("master")}
    norm = {"layers.0.0.weight", "layers.1.0.weight"}
    everything = {name.split()[0] for name in first}
    expected = set() if level == "O2" and strategy == "fsdp" else everything
    assert narrow == (expected - norm if level == "O2" else expected)
    assert copied == (narrow if level == "O2" else set())
