"""Configuration of a hybrid of the three mechanisms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from danon import tuned
from danon.config.base import AttentionConfig, ConfigError, require
from danon.config.dala import DALAConfig
from danon.config.mechanism import mechanism
from danon.config.msra import MSRAConfig
from danon.config.ucsa import UCSAConfig

__all__ = ["MEMBERS", "SuperHybridConfig", "mechanism_of"]

MEMBERS: dict[str, type[AttentionConfig]] = {
    config.attention: config for config in (MSRAConfig, DALAConfig, UCSAConfig)
}
"""Mechanisms that a hybrid can have, in the order of its default components."""

if TYPE_CHECKING:
    Components = dict[str, dict[str, Any]]
    Pattern = tuple[str, ...]
else:  # the base class checks plain types; what is inside is checked here
    Components, Pattern = dict, tuple

ALIASES = {
    "levels": "num_levels",
    "max_length": "max_sequence_length",
    "sparsity": "sparsity_factor",
}
"""Names in the specification's attention_config of fields of a component."""


def mechanism_of(component: str) -> str:
    """Return the mechanism of a component: ``msra`` of ``msra-balanced``.

    Args:
        component: a mechanism, or one with tuned settings.
    """
    return component.partition("-")[0]


@mechanism(
    "super-hybrid", section=4, colors=("#946200", "#f0c24b"), combines=True, aliases=("hybrid",)
)
@dataclass(frozen=True, kw_only=True)
class SuperHybridConfig(AttentionConfig):
    """Configuration of a hybrid (:class:`danon.attention.hybrid.layer.SuperHybrid`).

    Example::

        >>> from danon.config import SuperHybridConfig
        >>> parts = {"msra": {"window": 256, "weight": 3.0}, "ucsa": {"weight": 1.0}}
        >>> config = SuperHybridConfig(mode="blend", components=parts, causal=True)
        >>> config.weights
        {'msra': 0.75, 'ucsa': 0.25}
        >>> config.member("msra").window
        256

    Attributes:
        mode: ``select``: one mechanism, chosen from recorded measurements; ``blend``: the weighted
            sum of all outputs; ``layers``: a pattern of mechanisms over the depth.
        components: the mechanisms that take part, and fields of their configurations that differ
            from what this one implies: ``{"msra": {"window": 256}, "ucsa": {}}``. With the settings
            that a study found best it is ``msra-balanced`` (results/tuned), whose fields are filled
            in. A ``weight`` > 0, for all or for none, is the share that the blend starts from (else
            equal shares).
        num_levels: coarse scales of MSRA, >= 1.
        sparsity_factor: bound on the share of the far leaf blocks that a query of UCSA refines, in
            (0, 1].
        compression_ratio: nodes of a level of UCSA per node of the level below, in (0, 0.5].
        enable_all_optimizations: all that saves memory and changes no result: gradient
            checkpointing in the model, MSRA's ``memory_efficient``.
        advanced_features: the learned parts that look at the query: MSRA's scale weights, DALA's
            router, blend weights per query. False: uniform scales, no router, one weight per
            mechanism; fewer parameters and less time.
        fusion_strategy: ``adaptive``: the weights of the blend are learned; ``fixed``: they stay
            what ``components`` says.
        temperature: T of w = softmax(beta / T), in select and blend (specification 4.1).
        accuracy_weight: alpha_1 of beta = alpha_1 accuracy + alpha_2 speed + alpha_3 memory, >= 0.
        speed_weight: alpha_2 of beta, >= 0.
        memory_weight: alpha_3 of beta, >= 0.
        error_budget: largest relative error against dense attention that select accepts.
        time_budget: longest forward pass of one layer that select accepts, seconds per sequence.
        memory_budget: largest peak of a forward pass of one layer that select accepts, bytes per
            sequence.
        measurements: source of select's figures: a folder that ``danon bench`` recorded, a folder
            of such folders, or a table of :func:`danon.attention.hybrid.measurements.tabulate`.
            None: the table that comes with the package.
        select_length: the length that select chooses for, tokens. None: ``max_sequence_length`` if
            causal, since a stream does not know how long it gets and no later token may change
            what earlier ones give; else the length of the input.
        select_dtype: the dtype whose records decide, whatever the dtype of the input: a model must
            not become another one in lower precision.
        diversity_weight: lambda_1 of the blend's loss terms (specification 4.2), >= 0.
        regularization_weight: lambda_2 of the loss terms, >= 0.
        pattern: mechanisms of the layers, from the first on and over again: ``("msra", "ucsa")``.
            Empty: the components in turn.
    """

    mode: Literal["select", "blend", "layers"] = "select"
    components: Components = field(
        default_factory=lambda: {name: {} for name in MEMBERS}, hash=False
    )
    num_levels: int = 3
    sparsity_factor: float = 1.0
    compression_ratio: float = 0.25
    enable_all_optimizations: bool = False
    advanced_features: bool = True
    fusion_strategy: Literal["adaptive", "fixed"] = "adaptive"
    temperature: float = 1.0
    accuracy_weight: float = 1.0
    speed_weight: float = 1.0
    memory_weight: float = 1.0
    error_budget: float | None = None
    time_budget: float | None = None
    memory_budget: int | None = None
    measurements: str | None = None
    select_length: int | None = None
    select_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    diversity_weight: float = 0.01
    regularization_weight: float = 0.01
    pattern: Pattern = ()

    def __post_init__(self) -> None:
        """Check the fields, and those of the components."""
        self._check_contents(self.components, self.pattern)
        super().__post_init__()
        require(self.num_levels >= 1, self, "num_levels", ">= 1")
        require(0 < self.sparsity_factor <= 1, self, "sparsity_factor", "in (0, 1]")
        require(0 < self.compression_ratio <= 0.5, self, "compression_ratio", "in (0, 0.5]")
        require(self.temperature > 0, self, "temperature", "> 0")
        alphas = ("accuracy_weight", "speed_weight", "memory_weight")
        for name in (*alphas, "diversity_weight", "regularization_weight"):
            require(getattr(self, name) >= 0, self, name, ">= 0")
        if not any(getattr(self, name) for name in alphas):
            raise ConfigError(f"{type(self).__name__}: one of {', '.join(alphas)} must be > 0")
        for name in ("error_budget", "time_budget", "memory_budget", "select_length"):
            value = getattr(self, name)
            require(value is None or value > 0, self, name, "> 0 or None")
        for name in self.components:
            self.member(name)

    def _check_contents(self, components: object, pattern: object) -> None:
        """Check what lies inside ``components`` and ``pattern``, and copy them."""
        config, mechanisms = type(self).__name__, ", ".join(map(repr, MEMBERS))
        whole = isinstance(components, Mapping) and len(components) > 0
        require(whole, self, "components", f"a dictionary with keys of {mechanisms}")
        assert isinstance(components, Mapping)
        all_fields = {f.name for f in dataclasses.fields(AttentionConfig)}
        shared = all_fields - {"kernel", "max_sequence_length"}
        settings = {}
        for name, fields in components.items():
            allowed = f"a dictionary with keys of {mechanisms}, or one of these with tuned settings"
            require(
                isinstance(name, str) and mechanism_of(name) in MEMBERS, self, "components", allowed
            )
            field = f"{config}.components[{name!r}]"
            if not isinstance(fields, Mapping):
                raise ConfigError(f"{field} = {fields!r}: must be a dictionary of fields")
            stored = bool(fields.keys() - {"weight"})
            settings[name] = {} if name in MEMBERS else _tuned(name, field, stored=stored)
            if both := sorted(shared & set(fields)):
                raise ConfigError(f"{field} sets {', '.join(both)}: the whole hybrid shares that")
            weight = fields.get("weight", 1.0)
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise ConfigError(f"{field}['weight'] = {weight!r}: must be a number > 0")
        weighed = [name for name, fields in components.items() if "weight" in fields]
        if weighed and len(weighed) < len(components):
            raise ConfigError(
                f"{config}.components weighs {', '.join(weighed)} only: must weigh all or none"
            )
        names = pattern if isinstance(pattern, tuple | list) else (None,)  # JSON has lists only
        require(
            all(name in components for name in names),
            self,
            "pattern",
            f"a tuple of components: of {', '.join(map(repr, components))}",
        )
        copied = {name: settings[name] | dict(fields) for name, fields in components.items()}
        object.__setattr__(self, "components", copied)
        object.__setattr__(self, "pattern", tuple(names))

    def member(self, name: str) -> AttentionConfig:
        """Return the configuration of a component.

        Args:
            name: a key of ``components``.

        Raises:
            ConfigError: a field that the mechanism does not have, or a value that is not allowed.
        """
        fields = {k: v for k, v in self.components[name].items() if k != "weight"}
        implied: dict[str, dict[str, Any]] = {
            "msra": {
                "num_levels": self.num_levels,
                "memory_efficient": self.enable_all_optimizations,
                "feature_fusion": "adaptive" if self.advanced_features else "uniform",
            },
            "dala": {"use_adaptive_router": self.advanced_features},
            "ucsa": {
                "sparsity_factor": self.sparsity_factor,
                "compression_ratio": self.compression_ratio,
            },
        }
        shared = self.shared() | {"max_sequence_length": self.max_sequence_length}
        mechanism = mechanism_of(name)
        made = MEMBERS[mechanism].from_dict(shared | implied[mechanism] | fields)
        if made.is_causal != self.is_causal:
            raise ConfigError(
                f"{type(self).__name__}.components[{name!r}] is {'' if made.is_causal else 'not '}"
                f"causal: must be like the hybrid, whose causal = {self.causal!r}"
            )
        return made

    @property
    def weights(self) -> dict[str, float]:
        """The shares that the blend starts from; they sum to one."""
        raw = {name: fields.get("weight", 1.0) for name, fields in self.components.items()}
        return {name: weight / sum(raw.values()) for name, weight in raw.items()}

    def mechanism(self, layer: int) -> str:
        """Return the component of a layer, in mode ``layers``.

        Args:
            layer: number of the layer, from 0.
        """
        pattern = self.pattern or tuple(self.components)
        return pattern[layer % len(pattern)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the fields, or from the specification's ``attention_config``.

        The latter has ``"type": "hybrid"``; its components may say ``levels``, ``max_length`` and
        ``sparsity``, and it is a blend unless it gives another ``mode``.

        Args:
            values: field -> value.

        Raises:
            ConfigError: an unknown field, a value that is not allowed, or another type.
        """
        if "type" not in values:
            return super().from_dict(values)
        if values["type"] != "hybrid":
            raise ConfigError(f"type = {values['type']!r}: must be 'hybrid' for a {cls.__name__}")
        fields = {"mode": "blend"} | {k: v for k, v in values.items() if k != "type"}
        components = fields.get("components")
        if isinstance(components, Mapping):
            fields["components"] = {
                name: {ALIASES.get(k, k): v for k, v in given.items()}
                if isinstance(given, Mapping)
                else given
                for name, given in components.items()
            }
        return super().from_dict(fields)


def _tuned(name: str, field: str, *, stored: bool) -> dict[str, Any]:
    """Return the settings behind the name of a component.

    Args:
        name: of the component.
        field: the field, for the error.
        stored: it has fields: those of a saved model suffice where the study is gone.

    Raises:
        ConfigError: there are none; says which there are.
    """
    try:
        rows = tuned.rows(mechanism_of(name))
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error
    if name not in rows and stored and name.partition("-")[2] in tuned.GOALS:
        return {}
    if name not in rows:
        there = ", ".join(f"{row.name} ({', '.join(row.goals)})" for row in rows.values())
        raise ConfigError(
            f"{field}: no study has found such settings; there are: {there or 'none'}"
        )
    return dict(rows[name].settings)
