"""A training described by a TOML file: model, text, settings, folder.

run = TrainingFile.read(Path("examples/train/code.toml"))
run.fit(run.trainer())
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from danon.config import ConfigError
from danon.data.corpora import CORPORA, corpus
from danon.distributed.distributed_trainer import DistributedTrainer
from danon.models import (
    Backbone,
    create_dala_model,
    create_msra_model,
    create_super_hybrid_model,
    create_ucsa_model,
)
from danon.training.config import TrainingConfig
from danon.training.ranks import Ranks
from danon.training.trainer import TrainingResult

__all__ = ["ByteWindows", "TrainingFile"]

FACTORIES: Mapping[str, Callable[..., Backbone]] = {
    "msra": create_msra_model,
    "dala": create_dala_model,
    "ucsa": create_ucsa_model,
    "hybrid": create_super_hybrid_model,
}
BYTES = 256
"""Entries of the vocabulary: text is read as bytes."""
TABLES = {
    "": ("directory", "experiment", "model", "data", "training"),
    "data": ("files", "corpus", "length", "held_out"),
}
"""Keys of the file and of its table ``data``; ``model`` and ``training`` have those of classes."""
DERIVED = ("steps",)
"""Settings of :class:`TrainingConfig` that follow from the passes."""
SEPARATE = ("strategy", "optimization_level", "gradient_accumulation_steps")
"""Settings that the trainer takes as arguments of its own."""


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows of a text, and the byte that follows each of their bytes.

    Args:
        text: bytes (n,) uint8.
        length: bytes of a window.

    Raises:
        ConfigError: the text is shorter than one window.
    """

    def __init__(self, text: Tensor, length: int) -> None:
        if len(text) <= length:
            raise ConfigError(
                f"a text of {len(text)} bytes: must be longer than data.length = {length}"
            )
        self.text, self.length = text, length

    def __len__(self) -> int:
        """Return the number of whole windows."""
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a window and the bytes that follow, (length,) int64 each."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        both = self.text[start : start + self.length + 1].long()
        return both[:-1], both[1:]


@dataclass(frozen=True)
class TrainingFile:
    """A training as a file describes it.

    Attributes:
        path: the file; relative paths in it are relative to its folder.
        directory: folder of the checkpoints.
        experiment: MLflow experiment; None records nothing.
        mechanism: msra, dala, ucsa or hybrid.
        model: fields of the mechanism's configuration.
        data: table ``data``.
        training: table ``training``.
    """

    path: Path
    directory: Path
    experiment: str | None
    mechanism: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> TrainingFile:
        """Read a file and check everything but the text.

        Args:
            path: TOML file.

        Raises:
            ConfigError: no TOML, an unknown key, or a value that is not allowed; names it.
            OSError: the file cannot be read.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no TOML: {error}") from error
        _check_keys(path, "", values)
        data, model = _table(path, values, "data"), dict(_table(path, values, "model"))
        _check_keys(path, "data", data)
        if ("files" in data) == ("corpus" in data):
            raise ConfigError(f"{path}: data must have either files or corpus")
        if "corpus" in data and data["corpus"] not in CORPORA:
            raise ConfigError(
                f"{path}: data.corpus = {data['corpus']!r}: must be one of {', '.join(CORPORA)}"
            )
        mechanism = model.pop("mechanism", None)
        if mechanism not in FACTORIES:
            raise ConfigError(
                f"{path}: model.mechanism = {mechanism!r}: must be one of {', '.join(FACTORIES)}"
            )
        experiment = values.get("experiment")
        if experiment is not None and not isinstance(experiment, str):
            raise ConfigError(f"{path}: experiment = {experiment!r}: must be a name")
        beside = path.parent / values.get("directory", f"{path.stem}-training")
        directory = Path(os.path.normpath(beside))  # without the dots in between
        found = cls(
            path, directory, experiment, mechanism, model, data, _table(path, values, "training")
        )
        for name, value, least in (
            ("data.length", found.length, 1),
            ("training.epochs", found.epochs, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{path}: {name} = {value!r}: must be an integer >= {least}")
        if not (isinstance(found.held_out, float) and 0 < found.held_out < 1):
            raise ConfigError(f"{path}: data.held_out = {found.held_out!r}: must be in (0, 1)")
        if derived := [name for name in DERIVED if name in found.training]:
            raise ConfigError(f"{path}: training.{derived[0]}: must be left out, epochs sets it")
        try:
            found.trainer()
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return found

    @property
    def length(self) -> Any:
        """Bytes of an example."""
        return self.data.get("length", 512)

    @property
    def epochs(self) -> Any:
        """Passes over the data."""
        return self.training.get("epochs", 1)

    @property
    def held_out(self) -> Any:
        """Share of the text that is evaluated, not trained on."""
        return self.data.get("held_out", 0.1)

    def build_model(self) -> Backbone:
        """Build the model, with the same weights on every process.

        Raises:
            ConfigError: a field that does not exist, or a value that is not allowed.
        """
        torch.manual_seed(self.training.get("seed", 0))
        fields = {"vocab_size": BYTES, **self.model}
        if fields["vocab_size"] < BYTES:
            raise ConfigError(f"vocab_size = {fields['vocab_size']}: must be at least {BYTES}")
        return FACTORIES[self.mechanism](task="lm", **fields)

    def trainer(self, **options: Any) -> DistributedTrainer:
        """Build the model and its trainer.

        Args:
            **options: further arguments of :class:`DistributedTrainer`.

        Raises:
            ConfigError: a setting that is not allowed.
            ValueError: an unknown strategy.
        """
        settings = {n: x for n, x in self.training.items() if n not in ("epochs", "batch_size")}
        separate = {name: settings.pop(name) for name in SEPARATE if name in settings}
        return DistributedTrainer(
            self.build_model(),
            **separate,
            config=settings,
            directory=self.directory,
            experiment=self.experiment,
            **options,
        )

    def datasets(self) -> tuple[ByteWindows, ByteWindows]:
        """Return the windows to train on and those to evaluate on.

        Raises:
            ConfigError: no file matches, or too little text.
            CorpusError: the package of a corpus is not installed.
        """
        if "corpus" in self.data:
            train, held_out, _ = corpus(self.data["corpus"])
        else:
            text = torch.frombuffer(bytearray(self._text()), dtype=torch.uint8)
            cut = len(text) - max(self.length + 1, round(len(text) * self.held_out))
            train, held_out = text[: max(cut, 0)], text[max(cut, 0) :]
        return ByteWindows(train, self.length), ByteWindows(held_out, self.length)

    def fit(self, trainer: DistributedTrainer) -> TrainingResult:
        """Train on the text.

        Args:
            trainer: of :meth:`trainer`.

        Raises:
            ConfigError: no file matches, or too little text.
            CorpusError: the package of a corpus is not installed.
            ValueError: see :meth:`danon.training.Trainer.fit`.
        """
        with Ranks.join().together():
            train, held_out = self.datasets()
        batch: int = self.training.get("batch_size", TrainingConfig.batch_size)
        return trainer.fit(train, held_out, batch, self.epochs)

    def _text(self) -> bytes:
        patterns = self.data["files"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        text = bytearray()
        for pattern in patterns:
            found = sorted(file for file in self.path.parent.glob(pattern) if file.is_file())
            if not found:
                raise ConfigError(
                    f"{self.path}: data.files: no file matches {pattern!r} in {self.path.parent}"
                )
            for file in found:
                text += file.read_bytes()
        return bytes(text)


def _table(path: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {name} = {table!r}: must be a table, [{name}]")
    return table


def _check_keys(path: Path, table: str, values: Mapping[str, Any]) -> None:
    unknown = [key for key in values if key not in TABLES[table]]
    if unknown:
        prefix = f"{table}." if table else ""
        raise ConfigError(
            f"{path}: {prefix}{unknown[0]}: must be one of {', '.join(TABLES[table])}"
        )
