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
    """The mechanism's configuration for one head of that width.

    Raises:
        ConfigError: an unknown mechanism or field, a value that is not allowed, or a field that the
            model decides.
    """
    if mechanism not in MECHANISMS:
        raise ConfigError(f"mechanism {mechanism!r}: must be one of {', '.join(MECHANISMS)}")
    given = sorted(set(settings) & set(_OF_THE_MODEL))
    if given:
        raise ConfigError(f"settings {', '.join(given)}: the model decides these")
    shape = {"hidden_size": width, "num_heads": 1, "num_kv_heads": 1, "causal": None}
    return MECHANISMS[mechanism].config.from_dict({**settings, **shape})


def head_width(layer: nn.Module) -> int:
    """Width of a head of a model's attention layer, from the names that models give it.

    Raises:
        ValueError: none of them is there.
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
    """Holds the parameters of one layer.

    They depend on the width of a head alone, so they exist, can be trained and loaded, before the
    first input tells how many heads there are and whether they are causal. A ``PreTrainedModel``,
    because that is what ``from_pretrained`` asks to initialise what a checkpoint lacks.

    Args:
        mechanism: a name of :data:`MECHANISMS`.
        settings: fields of its configuration.
        width: of a head.
        seed: of the random initial values, where a mechanism has any.
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
        place = torch.empty(0).device  # "meta" while from_pretrained builds a model
        self.attention = self._fresh().to(place)
        self.attended = False  # whether the layer has called it in the forward pass going on
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Any: what the model around it is switched to is nothing to these parameters."""
        return requested_attention or "eager"

    def _fresh(self) -> StreamingAttention:
        config = settings_config(self.mechanism, self.settings, self.width)
        # A generator of its own: the model's other weights stay what they are without us.
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
                init.copy_(parameter, fresh[name])  # leaves alone what was loaded

    def fit(self, q: Tensor, k: Tensor, causal: bool) -> StreamingAttention:
        """The attention for these queries (B, H, n, D) and keys (B, G, n, D).

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
