"""Examples of a batch are cut out and joined without a change."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from danon.training.batch_examples import (
    count_examples,
    form,
    join_examples,
    move_batch,
    take_examples,
)

Pair = namedtuple("Pair", ["inputs", "labels"])
X = torch.arange(12).view(6, 2)
BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, X[:, 0]),
    "list": [X, X[:, 0]],
    "named tuple": Pair(X, X[:, 0]),
    "mapping": {"ids": X, "inner": {"labels": (X[:, 0],)}},
    "mapping of one's own": UserDict(ids=X),
    "objects": {"ids": X, "name": list("abcdef"), "number": (1, 2, 3, 4, 5, 6)},
    "objects alone": list("abcdef"),
}


def plain(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.tolist()
    if hasattr(batch, "items"):
        return {name: plain(x) for name, x in batch.items()}
    if isinstance(batch, list | tuple):
        return [type(batch).__name__, *(plain(x) for x in batch)]
    return batch


@pytest.mark.parametrize("kind", BATCHES)
def test_parts_join_to_the_whole(kind: str) -> None:
    batch = BATCHES[kind]
    assert count_examples(batch) == 6
    parts = [take_examples(batch, a, b) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert [count_examples(part) for part in parts] == [1, 3, 2]
    assert plain(join_examples(parts)) == plain(batch)
    assert form(parts[0]) == form(parts[1]) == form(batch)
    assert plain(move_batch(batch, torch.device("cpu"))) == plain(batch)
    assert join_examples(parts[:1]) is parts[0]


def test_move_to_a_device() -> None:
    moved = move_batch({"ids": (X,), "name": list("abcdef")}, torch.device("meta"))
    assert moved["ids"][0].device.type == "meta" and moved["name"] == list("abcdef")


@pytest.mark.parametrize(
    "other",
    [X[:, :1], X.float(), (X,), {"ids": X}, X.to("meta"), list("abc")],
    ids=["width", "dtype", "tuple", "mapping", "device", "objects"],
)
def test_batches_of_other_forms_differ(other: Any) -> None:
    assert form(X) != form(other)
    assert form({"a": X, "b": X}) != form({"a": X, "b": other})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, X[:4]), r"parts of \[4, 6\] examples: all must have the same number"),
        ({}, r"a batch is {}: must hold at least one tensor or list"),
        ((X, torch.tensor(1)), "holds a tensor of no dimension: must be a tensor with a dimension"),
        ({"ids": X, "step": 3}, "holds a int: must be a tensor with a dimension of examples"),
    ],
)
def test_batches_without_a_number_of_examples_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_examples(batch)
