"""The DANON attention that belongs to one attention layer of a Hugging Face model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from danon.attention import registry
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig, ConfigError
from danon.config.mechanism import mechanisms

__all__ = ["MECHANISMS", "LayerAttention", "head_width", "settings_config"]

MECHANISMS = mechanisms(combining=False)
_OF_THE_MODEL = (
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "causal",
    "num_layers",
    "vocab_size",
    "gradient_checkpointing",
)


def settings_config(mechanism: str, settings: Mapping[str, Any], width: int) -> AttentionConfig:
    """Return the configuration of a mechanism for one head.

    Args:
        mechanism: a name of :data:`MECHANISMS`.
        settings: fields of the configuration.
        width: width D of the head.

    Raises:
        ConfigError: an unknown mechanism or field, a value that is not allowed, or a field that the
            model sets.
    """
    if mechanism not in MECHANISMS:
        raise ConfigError(f"mechanism {mechanism!r}: must be one of {', '.join(MECHANISMS)}")
    given = sorted(set(settings) & set(_OF_THE_MODEL))
    if given:
        raise ConfigError(f"settings {', '.join(given)}: the model decides these")
    shape = {"hidden_size": width, "num_heads": 1, "num_kv_heads": 1, "causal": None}
    return MECHANISMS[mechanism].config.from_dict({**settings, **shape})


def head_width(layer: nn.Module) -> int:
    """Return the width of a head of a model's attention layer, by the names that models use.

    Args:
        layer: attention layer, with a ``config``.

    Raises:
        ValueError: the layer has none of the names.
    """
    for name in ("head_dim", "attention_head_size", "head_size"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    config: Any = layer.config
    try:
        return int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
    except AttributeError as error:
        raise ValueError(f"{type(layer).__name__}: no width of a head to be found") from error


class LayerAttention(PreTrainedModel):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Parameters of the DANON attention of one layer.

    They depend on the width of a head alone, so they can be trained and loaded before the first
    input shows the number of heads and whether attention is causal. The class is a
    ``PreTrainedModel``, since ``from_pretrained`` asks one to initialise what a checkpoint lacks.

    Args:
        mechanism: a name of :data:`MECHANISMS`.
        settings: fields of its configuration.
        width: width D of a head.
        seed: seed of the random initial values, where a mechanism has any.

    Attributes:
        attended: True once the layer has called the attention in the current forward pass.
    """

    def __init__(
        self, mechanism: str, settings: Mapping[str, Any], width: int, seed: int = 0
    ) -> None:
        super().__init__(PreTrainedConfig())
        self.mechanism, self.settings, self.width, self.seed = (
            mechanism,
            dict(settings),
            width,
            seed,
        )
        device = torch.empty(0).device  # "meta" while from_pretrained builds a model
        self.attention = self._fresh().to(device)
        self.attended = False
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Return any name: the implementation of the model does not concern these parameters."""
        return requested_attention or "eager"

    def _fresh(self) -> StreamingAttention:
        config = settings_config(self.mechanism, self.settings, self.width)
        # A generator of its own, so that the model's other weights stay as they are without DANON.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            attention: Any = registry.get(self.mechanism)
            built: StreamingAttention = attention(config)
        return built

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            fresh = dict(self._fresh().named_parameters())
            for name, parameter in self.attention.named_parameters():
                init.copy_(parameter, fresh[name])  # skips what was loaded

    def fit(self, q: Tensor, k: Tensor, causal: bool) -> StreamingAttention:
        """Return the attention for the heads of an input.

        Args:
            q: (B, H, n, D).
            k: (B, G, n, D).
            causal: True hides later tokens.

        Raises:
            ValueError: heads of another width than the parameters.
        """
        _, H, _, D = q.shape
        if self.width != D:
            raise ValueError(
                f"queries have heads of width {D}: must be {self.width} like the parameters"
            )
        old = self.attention.config
        if (old.num_heads, old.num_kv_heads, old.causal) != (H, k.shape[1], causal):
            new = dataclasses.replace(
                old, hidden_size=H * D, num_heads=H, num_kv_heads=k.shape[1], causal=causal
            )
            for name in ("config", "cfg"):
                setattr(self.attention, name, new)
        return self.attention
