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
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from danon.hybrid_config import SuperHybridConfig

__all__ = [
    "AttentionConfig", "Config", "ConfigError", "DALAConfig", "MSRAConfig", "SuperHybridConfig",
    "UCSAConfig", "require",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name != "SuperHybridConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from danon.hybrid_config import SuperHybridConfig  # it imports this module

    return SuperHybridConfig


class ConfigError(ValueError):
    """A configuration value that is not allowed; the message says which and what is."""


def require(ok: bool, config: object, field: str, allowed: str) -> None:
    """Raise a ConfigError that names field, value and what is allowed, unless ok."""
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
class Config:
    """Fields of the types they are declared with, from and to a mapping."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            require(_matches(getattr(self, name), hint), self, name, _describe(hint))
            value = getattr(self, name)
            if isinstance(value, float):
                require(math.isfinite(value), self, name, "finite")

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


HEAD_WIDTH = 64
"""Width of a head where the number of heads is not given; what most models and kernels have."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config):
    """What every attention and every model around it needs to know.

    Attributes:
        hidden_size: model width; ``num_heads * head_dim``.
        num_heads: query heads H. Not given, or None: as many as make a head 64 wide, or the nearest
            width (by ratio) for which they divide ``hidden_size`` and are a multiple of
            ``num_kv_heads``.
        num_kv_heads: key/value heads Hkv, a divisor of ``num_heads``; None means ``num_heads``.
        causal: a query sees no later token. None means the default of the class.
        num_layers: blocks of the backbone.
        vocab_size: entries of the token embedding.
        max_sequence_length: the length L the module is configured for, in tokens. The seed's
            rates (r_t, w_t, c_t) use it, so they never depend on how long an input happens to be.
            Longer inputs work.
        rope_theta: base of the rotary positions of the backbone, > 1. Angles repeat themselves only
            beyond about 6 * rope_theta tokens; models of long inputs take 1e6 or more.
        gradient_checkpointing: recompute each block in the backward pass.
        kernel: attention kernel of every branch, a name of :mod:`danon.attention.kernels`;
            ``auto`` follows the rule stated there. Only ``dense`` has second derivatives.
    """

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
        require(kv >= 1 and self.num_heads % kv == 0, self, "num_kv_heads",
                 f"a divisor of num_heads = {self.num_heads}")  # fmt: skip

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
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def is_causal(self) -> bool:
        return bool(self.causal)

    @classmethod
    def tuned(cls, goal: str, *, source: Path | None = None, **fields: Any) -> Self:
        """The configuration that a study found best (``danon tune``).

        Args:
            goal: ``speed``, ``memory``, ``quality`` or ``balanced``.
            source: folder of the files that ``danon tune`` writes; None for those of danon.
            fields: what else differs from the defaults.

        Raises:
            ConfigError: there is none; says which there are.
        """
        from danon.tuned import settings

        try:
            found = settings(TUNED[cls.__name__], goal, source)
        except KeyError:
            raise ConfigError(f"{cls.__name__} is of no attention that could be tuned") from None
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return cls.from_dict({**found, **fields})

    def shared(self) -> dict[str, Any]:
        """The fields of :class:`AttentionConfig` that a mechanism's default settings go with.

        Not the length: the mechanism's own default makes one module of all lengths.
        """
        names = {f.name for f in dataclasses.fields(AttentionConfig)} - {"max_sequence_length"}
        return {name: getattr(self, name) for name in names}


TUNED = {
    "MSRAConfig": "msra", "DALAConfig": "dala", "UCSAConfig": "ucsa",
    "SuperHybridConfig": "super-hybrid",
}  # fmt: skip
"""Attentions by the class of their configuration."""


def _rate(alpha: float, length: int, largest: int) -> float:
    """min(alpha * ln L, largest): the seed's form of every length-dependent size."""
    return min(alpha * math.log(max(length, 2)), largest)


@dataclass(frozen=True, kw_only=True)
class MSRAConfig(AttentionConfig):
    """Multi-scale recursive attention (:class:`danon.attention.msra.MSRA`).

    Attributes:
        num_levels: coarse scales with parameters of their own; deeper recursion reuses the last.
        window: block length of level 0, in tokens.
        global_tokens: first tokens, visible to every query at full resolution.
        compression_factor: r_max of r = min(compression_alpha * ln L, r_max), rounded (seed 1.3).
        compression_alpha: alpha of the same.
        feature_fusion: ``adaptive``: scale weights w_l = softmax(beta_l) per query (seed 1.1);
            ``uniform``: none.
        bidirectional_flow: both sides of the query at every scale; the opposite of ``causal``.
            None follows ``causal``; without either, bidirectional.
        calibration_factor: temperature of the coarse levels, 0 to 1. Averaging shortens keys and so
            flattens the softmax over nodes; a node's key is scaled by (rms length of the keys under
            it / its own length) ** calibration_factor.
        stability_factor: soft cap of the learned scores: beta becomes tanh(s * beta) / s, so no
            score can weigh more than e^(2/s) against another. 0: no cap.
        memory_efficient: recompute the pooled nodes in the backward pass instead of keeping them.
    """

    num_levels: int = 3
    window: int = 1024
    global_tokens: int = 64
    compression_factor: int = 16
    compression_alpha: float = 2.0
    feature_fusion: Literal["adaptive", "uniform"] = "adaptive"
    bidirectional_flow: bool | None = None
    calibration_factor: float = 0.0
    stability_factor: float = 0.5
    memory_efficient: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_levels >= 1, self, "num_levels", ">= 1")
        require(self.compression_factor >= 2, self, "compression_factor", ">= 2")
        require(self.compression_alpha > 0, self, "compression_alpha", "> 0")
        require(self.global_tokens >= 0, self, "global_tokens", ">= 0")
        require(0 <= self.calibration_factor <= 1, self, "calibration_factor", "in [0, 1]")
        require(self.stability_factor >= 0, self, "stability_factor", ">= 0")
        require(bool(self._rates()), self, "window",
                 "divisible by an integer from 2 to "
                 f"compression_factor = {self.compression_factor}")  # fmt: skip
        require(self.bidirectional_flow is None or self.causal is None
                 or self.bidirectional_flow != self.causal, self, "bidirectional_flow",
                 f"None or {not self.causal}, since causal = {self.causal}")  # fmt: skip

    @property
    def is_causal(self) -> bool:
        return bool(self.causal) or self.bidirectional_flow is False

    @property
    def rate(self) -> int:
        """r_t of seed section 1.3, nodes of one level under a node of the next.

        The nearest integer from 2 to ``compression_factor`` that divides the window.
        """
        rate = _rate(self.compression_alpha, self.max_sequence_length, self.compression_factor)
        return min(self._rates(), key=lambda r: abs(r - rate))

    @property
    def level_width(self) -> int:
        """Nodes of a level in one of its blocks, of which a query sees one to two.

        A quarter of the window, so that levels cost little against it however many there are. All
        of it where a quarter does not do: unless the rate divides it and is 8, 12, 16, ...
        """
        quarter, rest = divmod(self.window, 4)
        fits = not (rest or quarter % self.rate or self.rate % 4) and self.rate > 4
        return quarter if fits else self.window

    def _rates(self) -> list[int]:
        rates = range(2, self.compression_factor + 1)
        return [r for r in rates if self.window >= 1 and self.window % r == 0]


@dataclass(frozen=True, kw_only=True)
class DALAConfig(AttentionConfig):
    """Dynamic adaptive long-range attention (:class:`danon.attention.dala.DALA`).

    Attributes:
        block_size: tokens of a block.
        state_update_frequency: blocks of a period; memory and state are updated once a period, and
            the near window is the query's period and the one before.
        memory_size: important tokens kept, at most.
        importance_threshold: a token is kept only if sigmoid(importance) is larger, in [0, 1).
        global_tokens: first tokens, visible to every query at full resolution.
        window_beta: beta of w = min(window_max, ceil(beta * ln L)), tokens (seed 2.3). Head h
            has w * 2 ** (h mod 4).
        window_max: w_max of the same.
        decay_rate: lambda of the decay exp(-lambda |i - j|), per token (seed 2.2).
        decay: ``renormalized``: the decay is a logit bias; ``literal``: it multiplies after the
            softmax, as the seed writes it.
        adaptive_window: content before a query's period widens or narrows w for that period, by
            a learned factor from 1/8 to 8 for each key/value head (seed 2.3).
        use_adaptive_router: weigh the paths {near, memory, state} per query (seed 2.1).
        router_temperature: tau of the router, > 0.
        router_iterations: agreement updates b += y.a, >= 0.
        load_balance_weight: of the router's load-balance loss in the auxiliary loss, >= 0.
        attention_dropout: probability, while training, that a key is hidden from all queries
            (dropped before the softmax).
    """

    block_size: int = 64
    state_update_frequency: int = 12
    memory_size: int = 512
    importance_threshold: float = 0.5
    global_tokens: int = 64
    window_beta: float = 64.0
    window_max: int = 512
    decay_rate: float = 1e-4
    decay: Literal["renormalized", "literal"] = "renormalized"
    adaptive_window: bool = True
    use_adaptive_router: bool = True
    router_temperature: float = 0.1
    router_iterations: int = 2
    load_balance_weight: float = 0.01
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "state_update_frequency", "memory_size", "window_max"):
            require(getattr(self, name) >= 1, self, name, ">= 1")
        for name in ("global_tokens", "decay_rate", "router_iterations", "load_balance_weight"):
            require(getattr(self, name) >= 0, self, name, ">= 0")
        for name in ("window_beta", "router_temperature"):
            require(getattr(self, name) > 0, self, name, "> 0")
        for name in ("importance_threshold", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")

    @property
    def period(self) -> int:
        """Tokens between two updates of memory and state."""
        return self.block_size * self.state_update_frequency

    @property
    def base_window(self) -> int:
        """w_t of seed section 2.3, in tokens."""
        return math.ceil(_rate(self.window_beta, self.max_sequence_length, self.window_max))


@dataclass(frozen=True, kw_only=True)
class UCSAConfig(AttentionConfig):
    """Unified compressed sparse attention (:class:`danon.attention.ucsa.UCSA`).

    Attributes:
        local_window_size: block length of the local window, tokens; a multiple of ``query_block``
            and of the leaf size. A query sees its own block and the one before.
        global_tokens: first tokens, visible to every query at full resolution.
        compression_ratio: nodes of a level per node of the level below, in (0, 0.5]: 0.25 makes
            every node the mean of four; the fan-out is the integer nearest to its inverse.
        leaf_max: c_max of the leaf size c = min(leaf_alpha * ln L, c_max), tokens, rounded to a
            power of two (seed 3.1).
        leaf_alpha: alpha of the same.
        query_block: queries that share their candidates, which the queries before them chose.
        candidate_blocks: leaf blocks a query may choose from (also the width of the descent).
        selected_blocks: leaf blocks a query refines to single tokens, at most.
        coarse_nodes: what is not refined stays visible as pooled nodes. False: it is not seen,
            which suits models that were not trained with nodes.
        sparsity_factor: bound on the share of the far leaf blocks that a query refines, in (0, 1].
        sparsity_start: s_0 of s_t = s_0 * exp(-lambda t) + s_min (seed 3.2), in [0, 1]: in training
            a query refines that share of the far leaf blocks more than it does in the end; only
            ``candidate_blocks`` bounds the sum. 0: no annealing. t is what
            :func:`danon.attention.ucsa.anneal` says.
        sparsity_decay: lambda of the same, per step of t.
        information_weight: of L_info (seed 3.1) in the auxiliary loss; 0: none.
        information_kl: lambda of KL in L_info.
        error_tolerance: relative pooling error of a node, rms distance of its tokens' keys from
            the node's over their rms length, below which refining it is forbidden (seed 3.3).
        error_alpha: alpha of the error threshold mu + alpha sigma above which a node is refined
            first; None: none is.
        enable_cache: bound what a stream keeps. False: it keeps every token.
        max_cache_size: tokens beyond the local window that a stream keeps at full resolution, a
            whole number of leaves; it keeps as many nodes of each level. An evicted leaf remains as
            a node, an evicted node under its parent.
        cache_strategy: which leaf is evicted: ``lru`` the one whose last refinement is longest
            ago, ``lfu`` the least often refined, ``fifo`` the oldest; the older one of equals.
    """

    local_window_size: int = 256
    global_tokens: int = 64
    compression_ratio: float = 0.25
    leaf_max: int = 16
    leaf_alpha: float = 1.2
    query_block: int = 256
    candidate_blocks: int = 32
    selected_blocks: int = 16
    coarse_nodes: bool = True
    sparsity_factor: float = 1.0
    sparsity_start: float = 0.0
    sparsity_decay: float = 1e-3
    information_weight: float = 0.01
    information_kl: float = 1.0
    error_tolerance: float = 0.001
    error_alpha: float | None = None
    enable_cache: bool = True
    max_cache_size: int = 10_000
    cache_strategy: Literal["lru", "lfu", "fifo"] = "lru"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("leaf_max", "query_block", "selected_blocks"):
            require(getattr(self, name) >= 1, self, name, ">= 1")
        require(self.leaf_alpha > 0, self, "leaf_alpha", "> 0")
        require(self.global_tokens >= 0, self, "global_tokens", ">= 0")
        require(0 < self.compression_ratio <= 0.5, self, "compression_ratio", "in (0, 0.5]")
        require(0 < self.sparsity_factor <= 1, self, "sparsity_factor", "in (0, 1]")
        require(0 <= self.sparsity_start <= 1, self, "sparsity_start", "in [0, 1]")
        require(0 <= self.error_tolerance < 1, self, "error_tolerance", "in [0, 1)")
        for name in ("sparsity_decay", "information_weight", "information_kl"):
            require(getattr(self, name) >= 0, self, name, ">= 0")
        require(self.error_alpha is None or self.error_alpha >= 0, self, "error_alpha",
                 "None or >= 0")  # fmt: skip
        require(self.candidate_blocks >= 2 * self.fanout, self, "candidate_blocks",
                 f">= {2 * self.fanout}, twice the fan-out")  # fmt: skip
        unit = math.lcm(self.leaf, self.query_block)
        require(self.local_window_size >= 1 and self.local_window_size % unit == 0, self,
                 "local_window_size",
                 f"a positive multiple of query_block and leaf size: of {unit}")  # fmt: skip
        require(self.max_cache_size >= self.local_window_size, self, "max_cache_size",
                 f">= local_window_size = {self.local_window_size}, one block")  # fmt: skip

    @property
    def detects_errors(self) -> bool:
        """Whether anything asks for the errors of nodes."""
        return self.error_tolerance > 0 or self.error_alpha is not None

    @property
    def fanout(self) -> int:
        """Children of a node."""
        return round(1 / self.compression_ratio)

    @property
    def leaf(self) -> int:
        """c_t of seed section 3.1: tokens of a leaf block, a power of two."""
        rate = _rate(self.leaf_alpha, self.max_sequence_length, self.leaf_max)
        return 1 << max(0, int(math.log2(max(rate, 1))))


def _describe(hint: object) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) is not None:
        return " or ".join(_describe(a) for a in get_args(hint))
    if hint is type(None):
        return "None"
    return {int: "an integer", float: "a number", bool: "True or False"}.get(hint, str(hint))  # type: ignore[call-overload, no-any-return]
