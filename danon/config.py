"""Typed, frozen, validated configurations.

Every field is checked at construction; a wrong value raises :class:`ConfigError`, which names
the field, the value and what is allowed. ``from_dict`` / ``to_dict`` round-trip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

__all__ = ["AttentionConfig", "ConfigError", "DALAConfig", "MSRAConfig", "UCSAConfig"]


class ConfigError(ValueError):
    """A configuration value that is not allowed; the message says which and what is."""


def _require(ok: bool, config: object, field: str, allowed: str) -> None:
    if not ok:
        raise ConfigError(
            f"{type(config).__name__}.{field} = {getattr(config, field)!r}: must be {allowed}"
        )


def _matches(value: object, hint: object) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is not None:  # a union such as ``int | None``
        return any(_matches(value, arg) for arg in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What every attention and every model around it needs to know.

    Attributes:
        hidden_size: model width; ``num_heads * head_dim``.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv, a divisor of ``num_heads``; None means ``num_heads``.
        causal: a query sees no later token. None means the default of the class.
        num_layers: blocks of the backbone.
        vocab_size: entries of the token embedding.
        max_sequence_length: the length L the module is configured for, in tokens. The seed's
            rates (r_t, w_t, c_t) use it, so they never depend on how long an input happens to be.
            Longer inputs work.
        gradient_checkpointing: recompute each block in the backward pass.
    """

    hidden_size: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    causal: bool | None = None
    num_layers: int = 6
    vocab_size: int = 32000
    max_sequence_length: int = 1_000_000
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _require(_matches(getattr(self, name), hint), self, name, _describe(hint))
            value = getattr(self, name)
            if isinstance(value, float):
                _require(math.isfinite(value), self, name, "finite")
        positive = ("hidden_size", "num_heads", "num_layers", "vocab_size", "max_sequence_length")
        for name in positive:
            _require(getattr(self, name) >= 1, self, name, ">= 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{type(self).__name__}.hidden_size = {self.hidden_size} is not a multiple of "
                f"num_heads = {self.num_heads}"
            )
        kv = self.kv_heads
        _require(kv >= 1 and self.num_heads % kv == 0, self, "num_kv_heads",
                 f"a divisor of num_heads = {self.num_heads}")  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def is_causal(self) -> bool:
        return bool(self.causal)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping; an unknown key is an error that lists the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields are: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def shared(self) -> dict[str, Any]:
        """The fields of :class:`AttentionConfig` alone, to build another mechanism's from."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(AttentionConfig)}


def _describe(hint: object) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) is not None:
        return " or ".join(_describe(a) for a in get_args(hint))
    if hint is type(None):
        return "None"
    return {int: "an integer", float: "a number", bool: "True or False"}.get(hint, str(hint))  # type: ignore[call-overload, no-any-return]
