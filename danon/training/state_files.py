"""Weights and optimizer on disk, in the format of torch's distributed checkpoints.

Each rank writes what it holds, and any number of ranks reads it again. What an optimizer has not
touched yet has no state, and gets none.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from danon.training.ranks import Ranks

__all__ = ["load", "save"]

FOLDER = "state"
"""Folder of a checkpoint with weights and optimizer."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Write weights and optimizer; every rank calls it with the same folder.

    Args:
        folder: of the checkpoint.
        model: the model itself, not a wrapper.
        optimizer: over its parameters.
        ranks: processes of the training.
    """
    state: dict[str, Any] = _model_state(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[_key(name, key)] = value
    writer = FileSystemWriter(folder / FOLDER)
    with _alone(ranks):
        save_sharded(state, storage_writer=writer, no_dist=ranks.world_size == 1)


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> None:
    """Read weights, and the optimizer if one is given.

    Args:
        folder: of the checkpoint.
        model: the model itself, whose tensors are overwritten.
        optimizer: over its parameters; its states are replaced. None: the weights alone.
        ranks: processes of the training.
    """
    state: dict[str, Any] = _model_state(model)
    reader = FileSystemReader(folder / FOLDER)
    by_parameter: dict[str, dict[str, str]] = {}
    if optimizer is not None:
        recorded = reader.read_metadata().state_dict_metadata
        by_parameter = dict(_optimizer_keys(recorded, [n for n, _ in model.named_parameters()]))
        parameters = dict(model.named_parameters())
        for name, keys in by_parameter.items():
            for key in keys.values():
                state[key] = _empty(recorded[key], parameters[name])
    with _alone(ranks):
        load_sharded(state, storage_reader=reader, no_dist=ranks.world_size == 1)
    if optimizer is not None:
        optimizer.state.clear()
        for name, keys in by_parameter.items():
            optimizer.state[parameters[name]] = {own: state[key] for own, key in keys.items()}


@contextlib.contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """Hide the warning that a process without others is taken to be alone."""
    with warnings.catch_warnings():
        if ranks.world_size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _model_state(model: nn.Module) -> dict[str, Any]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _key(parameter: str, own: str) -> str:
    return f"optimizer.{parameter}.{own}"


def _optimizer_keys(recorded: Any, parameters: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a parameter and the recorded keys of its states by their own names."""
    for name in parameters:
        prefix = _key(name, "")
        yield name, {x.removeprefix(prefix): x for x in recorded if x.startswith(prefix)}


def _empty(recorded: Any, parameter: Tensor) -> Any:
    """Return a value to read a state of the optimizer into, placed like the parameter."""
    if not isinstance(recorded, TensorStorageMetadata):
        return None
    dtype = recorded.properties.dtype
    if recorded.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(recorded.size, dtype=dtype)
