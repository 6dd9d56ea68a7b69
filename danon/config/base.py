"""Typed, frozen, validated configurations.

Every field is checked at construction; a wrong value raises :class:`ConfigError`, which names
the field, the value and what is allowed. ``from_dict`` / ``to_dict`` round-trip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

__all__ = ["AttentionConfig", "Config", "ConfigError", "length_dependent", "require"]


class ConfigError(ValueError):
    """A configuration value that is not allowed; the message says which and what is."""


def require(ok: bool, config: object, field: str, allowed: str) -> None:
    """Raise a ConfigError that names field, value and what is allowed, unless ok.

    Args:
        ok: True if the value is allowed.
        config: holds the field.
        field: name of the field.
        allowed: what is allowed, after "must be".

    Raises:
        ConfigError: ``ok`` is False.
    """
    if not ok:
        raise ConfigError(
            f"{type(config).__name__}.{field} = {getattr(config, field)!r}: must be {allowed}"
        )


def _matches(value: object, hint: object) -> bool:
    """Return True if a value is of the type that a hint says."""
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
class Config:
    """Fields of the types they are declared with, from and to a mapping."""

    def __post_init__(self) -> None:
        """Check the types of the fields.

        Raises:
            ConfigError: a value of another type, or a number that is not finite.
        """
        for name, hint in get_type_hints(type(self)).items():
            require(_matches(getattr(self, name), hint), self, name, _describe(hint))
            value = getattr(self, name)
            if isinstance(value, float):
                require(math.isfinite(value), self, name, "finite")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, which :meth:`from_dict` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping of fields; fields that are left out have their default.

        Args:
            values: field -> value.

        Raises:
            ConfigError: an unknown field, or a value that is not allowed.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields are: {', '.join(sorted(names))}"
            )
        return cls(**values)


HEAD_WIDTH = 64
"""Width of a head where the number of heads is not given; what most models and kernels have."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config):
    """Configuration that every attention, and every model around it, needs.

    Example::

        >>> from danon.config import AttentionConfig
        >>> config = AttentionConfig(hidden_size=256, num_kv_heads=2, causal=True)
        >>> config.num_heads, config.head_dim, config.kv_heads
        (4, 64, 2)

    Attributes:
        hidden_size: model width; ``num_heads * head_dim``.
        num_heads: query heads H. Not given, or None: as many as make a head 64 wide, or the nearest
            width (by ratio) for which they divide ``hidden_size`` and are a multiple of
            ``num_kv_heads``.
        num_kv_heads: key/value heads Hkv, a divisor of ``num_heads``; None means ``num_heads``.
        causal: a query sees no later token. None means the default of the class.
        num_layers: blocks of the backbone.
        vocab_size: entries of the token embedding.
        max_sequence_length: the length L the module is configured for, in tokens. The
            specification's rates (r_t, w_t, c_t) use it, so they never depend on how long an
            input happens to be. Longer inputs work.
        rope_theta: base of the rotary positions of the backbone, > 1. Angles repeat themselves only
            beyond about 6 * rope_theta tokens; models of long inputs take 1e6 or more.
        gradient_checkpointing: recompute each block in the backward pass.
        kernel: attention kernel of every branch, a name of :mod:`danon.attention.kernels.table`;
            ``auto`` follows the rule stated there. Only ``dense`` has second derivatives.
        attention: registered name of the mechanism that the class configures; empty where it is
            none (:mod:`danon.config.mechanism`).
    """

    attention: ClassVar[str] = ""

    hidden_size: int = 768
    num_heads: int = None  # type: ignore[assignment]  # __post_init__ puts the number here
    num_kv_heads: int | None = None
    causal: bool | None = None
    num_layers: int = 6
    vocab_size: int = 32000
    max_sequence_length: int = 1_000_000
    rope_theta: float = 10_000.0
    gradient_checkpointing: bool = False
    kernel: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields, and fill in the number of heads."""
        heads: object = self.num_heads
        if heads is None:
            object.__setattr__(self, "num_heads", self._fitting_heads())
        super().__post_init__()
        positive = ("hidden_size", "num_heads", "num_layers", "vocab_size", "max_sequence_length")
        for name in positive:
            require(getattr(self, name) >= 1, self, name, ">= 1")
        require(self.rope_theta > 1, self, "rope_theta", "> 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{type(self).__name__}.hidden_size = {self.hidden_size} is not a multiple of "
                f"num_heads = {self.num_heads}"
            )
        kv = self.kv_heads
        require(
            kv >= 1 and self.num_heads % kv == 0,
            self,
            "num_kv_heads",
            f"a divisor of num_heads = {self.num_heads}",
        )

    def _fitting_heads(self) -> int:
        """Return the number of heads that follows from the width."""
        width, step = self.hidden_size, self.num_kv_heads
        step = 1 if step is None else step
        if not all(_matches(x, int) and x >= 1 for x in (width, step)):
            return 1  # the checks that follow refuse them
        require(width % step == 0, self, "num_kv_heads", f"a divisor of hidden_size = {width}")
        fitting = (n for n in range(step, width + 1, step) if width % n == 0)
        return min(fitting, key=lambda n: abs(math.log(width / n / HEAD_WIDTH)))

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def is_causal(self) -> bool:
        """True if a query sees no later token."""
        return bool(self.causal)

    @classmethod
    def tuned(cls, goal: str, *, source: Path | None = None, **fields: Any) -> Self:
        """Return the configuration that a study found best (``danon tune``).

        Args:
            goal: ``speed``, ``memory``, ``quality`` or ``balanced``.
            source: folder of the files that ``danon tune`` writes; None for those of danon.
            **fields: what else differs from the defaults.

        Raises:
            ConfigError: there is none; says which there are.
        """
        from danon.tuned.settings import settings_for

        if not cls.attention:
            raise ConfigError(f"{cls.__name__} is of no attention that could be tuned")
        try:
            settings = settings_for(cls.attention, goal, source)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return cls.from_dict({**settings, **fields})

    def shared(self) -> dict[str, Any]:
        """Return the fields of :class:`AttentionConfig` that a mechanism takes over from a shape.

        All but the length: the mechanism's own default makes one module of all lengths.
        """
        names = {f.name for f in dataclasses.fields(AttentionConfig)} - {"max_sequence_length"}
        return {name: getattr(self, name) for name in names}


DIRECT_SIZES = ("leaf_size", "rate", "window")
"""Fields that give a size directly; None: by the formula of the specification."""


def length_dependent(alpha: float, length: int, largest: int) -> float:
    """Return min(alpha * ln L, largest), the specification's form of a length-dependent size.

    Args:
        alpha: factor of ln L.
        length: L in tokens.
        largest: upper bound.
    """
    return min(alpha * math.log(max(length, 2)), largest)


def _describe(hint: object) -> str:
    """Return a hint in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) is not None:
        return " or ".join(_describe(a) for a in get_args(hint))
    if hint is type(None):
        return "None"
    return {int: "an integer", float: "a number", bool: "True or False"}.get(hint, str(hint))  # type: ignore[call-overload, no-any-return]
