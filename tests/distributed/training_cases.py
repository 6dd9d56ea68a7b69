"""Trainings of small models that the tests run in one process and in several."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hybrids import SMALL, record
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from danon import create_dala_model, create_msra_model, create_super_hybrid_model, create_ucsa_model
from danon.training import Trainer, TrainingConfig

KINDS = ("msra", "dala", "ucsa", "select", "blend")
LENGTHS = {"short": 6, "long": 90}
"""Tokens of an example: all inside the near window, where parameters have no gradient; and not."""
SHAPE = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "vocab_size": 64}
FACTORIES = {"msra": create_msra_model, "dala": create_dala_model, "ucsa": create_ucsa_model}
MORE: dict[str, dict[str, Any]] = {
    "dala": {"attention_dropout": 0.1, "importance_threshold": 0.0, "load_balance_weight": 0.5},
    "ucsa": {"information_weight": 0.5},
}
"""Settings under which each model draws, or has an auxiliary loss that counts."""


def small_model(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind in FACTORIES:
        fields = {**SHAPE, **SMALL[kind], **MORE.get(kind, {})}
        return FACTORIES[kind](task="lm", **fields)
    fields = {"components": copy.deepcopy(SMALL), "mode": kind}
    if kind == "select":
        fields |= {"select_length": 64, "measurements": record(Path(tempfile.mkdtemp()))}
    return create_super_hybrid_model(task="lm", **SHAPE, **fields)


def tokens(length: int, examples: int = 24) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (examples, length + 1), generator=g)
    labels = ids[:, 1:].clone()
    labels[::3, : length // 2] = -100  # examples with different numbers of labels
    return TensorDataset(ids[:, :-1], labels)


def full(tensor: Tensor) -> Tensor:
    """Return a whole tensor, also of a sharded one."""
    whole = tensor.detach()
    return (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).clone()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make models in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(kind: str, length: int, *, wide: bool = True, **settings: Any) -> dict[str, Any]:
    """Train a small model, in float64 if wide, and return its weights and losses.

    Adam divides gradients by their size: where they are rounding alone, so are its steps. In
    float64 no such rounding hides what is wrong.
    """
    directory = settings.pop("directory", None)
    with default_dtype(torch.float64 if wide else torch.float32):
        return _train(small_model(kind), length, directory, settings)


def _train(
    model: nn.Module, length: int, directory: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    config = TrainingConfig(
        **{"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, **settings}
    )
    trainer = Trainer(model, config, directory=directory, progress=False)
    result = trainer.fit(tokens(length))
    return {
        "weights": {name: full(p) for name, p in trainer.unwrapped.named_parameters()},
        "losses": [step["loss"] for step in result.history.values()],
        "outcome": result.outcome,
    }


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two trainings' weights."""
    assert one["weights"].keys() == other["weights"].keys()
    return max(
        float((one["weights"][name] - w).abs().max()) for name, w in other["weights"].items()
    )
