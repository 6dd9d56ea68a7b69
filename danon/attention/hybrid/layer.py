"""Super hybrid: one of the mechanisms by measurement, all of them blended, or one per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, Self

import torch
from torch import Tensor, nn

from danon import tuned
from danon.attention.base import without_autocast
from danon.attention.dala.layer import DALA
from danon.attention.effective_matrix import EffectiveAttention
from danon.attention.head_share import HeadShare, narrowed
from danon.attention.hybrid.blend import label_branches, loss_terms, weighted_sum
from danon.attention.hybrid.measurements import load
from danon.attention.hybrid.mechanism_selection import Selection, select_mechanism
from danon.attention.msra.layer import MSRA
from danon.attention.padding import on_shard, right_padded
from danon.attention.registry import register
from danon.attention.sequence_shard import SequenceShard
from danon.attention.stream_state import StateTensor
from danon.attention.streaming import StreamingAttention
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.attention.ucsa.layer import UCSA
from danon.attention.union.tiles import constant
from danon.config import AttentionConfig, ConfigError, DALAConfig, MSRAConfig, UCSAConfig
from danon.config.hybrid import MEMBERS, SuperHybridConfig, mechanism_of
from danon.tuned.search_space import Categorical, Space

__all__ = ["SuperHybrid", "mechanism_of_layer"]

ABSENT = "none"
"""Choice for a mechanism that takes no part."""


def _mechanism(config: AttentionConfig) -> StreamingAttention:
    """Build the mechanism that a configuration is of."""
    if isinstance(config, MSRAConfig):
        return MSRA(config)
    if isinstance(config, DALAConfig):
        return DALA(config)
    assert isinstance(config, UCSAConfig)
    return UCSA(config)


def mechanism_of_layer(config: SuperHybridConfig, layer: int) -> StreamingAttention:
    """Build a layer's attention: its mechanism in mode ``layers``, else a SuperHybrid."""
    if config.mode == "layers":
        return _mechanism(config.member(config.mechanism(layer)))
    return SuperHybrid(config)


@register("super-hybrid")
class SuperHybrid(StreamingAttention):
    """MSRA, DALA and UCSA as one attention (specification 4).

    - select: runs one of them, the one that
      :func:`~danon.attention.hybrid.mechanism_selection.select_mechanism` finds best in recorded
      measurements.
      :meth:`choice` says which, with what scores, and from which records.
      A causal module chooses for a configured length (see ``SuperHybridConfig.select_length``), so
      its streams, which do not know how long they get, run what the whole sequence would. A
      stream keeps to the mechanism that it began with. A bidirectional module without
      ``select_length`` chooses for the length of the input, padding included.
    - blend: o = sum_i w_i o_i with w = softmax(beta / T) and beta_i = b_i + g_i . q per query. b
      starts where w is the configured shares, g at zero. Loss terms (specification 4.2):
      L_div = log M - H(mean of w over an example), which keeps every mechanism in use and still
      lets each query decide; L_reg = mean of (beta - starting beta)^2, which keeps the weights from
      hardening. A blend of one is that mechanism, without weights.

    The modules of the mechanisms are in ``members``, by name.
    """

    oracle_kind = "definition"
    start: Tensor

    def __init__(self, config: SuperHybridConfig) -> None:
        """Build the mechanisms; in mode select also read the measurements.

        Raises:
            ConfigError: mode ``layers``, which is a matter of the model.
            ValueError: measurements that cannot be read.
        """
        super().__init__()
        if config.mode == "layers":
            raise ConfigError(
                "SuperHybridConfig.mode = 'layers': one attention is of one layer; "
                "create_super_hybrid_model builds all of them"
            )
        self.setup_attention(config)
        self.cfg = config
        self.members = nn.ModuleDict({n: _mechanism(config.member(n)) for n in config.components})
        self._terms: tuple[Tensor, Tensor] | None = None
        if config.mode == "select":
            self.description = f"one of {', '.join(self.members)} by measurement"
            self._runs = load(config.measurements)
            self._choices: dict[tuple[int, str, str], Selection] = {}
            return
        if len(self.members) == 1:  # there is nothing to weigh
            (self.description,) = (self._member(name).description for name in self.members)
            return
        self.description = f"weighted sum of {', '.join(self.members)}"
        start = torch.tensor([config.temperature * math.log(w) for w in config.weights.values()])
        self.register_buffer("start", start, persistent=False)
        if config.fusion_strategy == "adaptive":
            self.beta = nn.Parameter(start.clone())
            if config.advanced_features:
                self.gate = nn.Parameter(torch.zeros(len(start), config.head_dim))

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Self:
        """Build the one that selects, for the length of the shape; or as the settings say."""
        fields = settings or {"select_length": shape.max_sequence_length}
        return cls(SuperHybridConfig(**shape.shared() | fields))

    @classmethod
    def search_space(cls) -> Space:
        """Return the ranges of a study: for each mechanism default or tuned settings, or none.

        Without any it is the one that selects. Sizes of the mechanisms are their own studies':
        among them all sixty trials find nothing (docs/log.md).
        """
        variants: dict[str, dict[str, Any]] = {name: {} for name in MEMBERS} | {
            f"{row.name}@{row.digest}": dict(row.settings)
            for name in MEMBERS
            for row in tuned.rows(name).values()
        }

        def settings(choice: Mapping[str, Any]) -> dict[str, Any]:
            fields = {n: variants[choice[n]] for n in MEMBERS if choice[n] != ABSENT}
            return {"mode": "blend", "components": fields} if fields else {}

        return Space(
            {
                n: Categorical((ABSENT, *(k for k in variants if mechanism_of(k) == n)))
                for n in MEMBERS
            },
            dict.fromkeys(MEMBERS, ABSENT),
            settings,
        )

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        """Refuse: it runs mechanisms as they are."""
        raise NotImplementedError("runs one of the mechanisms as it is: see theirs")

    @classmethod
    def unavailable(
        cls,
        shape: AttentionConfig,
        *,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        """Return why no mechanism can be selected for a case, or None."""
        try:
            made = cls.build(shape)
            if made.cfg.mode == "select":
                made.choice(length, device)
        except ValueError as error:
            return str(error)
        return None

    def choice(
        self,
        length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Selection:
        """Return the mechanism that mode select runs, with its scores and records.

        Args:
            length: tokens; None for the length that the module is configured for. An input of a
                causal module, or of one with ``select_length``, is not asked for its length.
            device: whose records decide.
            dtype: whose records decide; None for ``select_dtype``, as in a forward pass.

        Raises:
            ValueError: no records to go by, nothing within the budgets, or not in mode select.
        """
        c = self.cfg
        if c.mode != "select":
            raise ValueError(f"mode = {c.mode!r}: only 'select' chooses")
        if length is None:
            length = c.select_length or c.max_sequence_length
        if length < 1:
            raise ValueError(f"length = {length}: must be at least 1")
        device_type = torch.device(device).type
        by = c.select_dtype if dtype is None else str(dtype).removeprefix("torch.")
        key = length, device_type, by
        if key not in self._choices:
            self._choices[key] = select_mechanism(c, self._runs, length, device_type, by)
        return self._choices[key]

    @constant
    def _selected(self, length: int, device: torch.device) -> str:
        """Return the name of the mechanism for inputs of that length."""
        fixed = self.cfg.is_causal or self.cfg.select_length is not None
        return self.choice(None if fixed else length, device).name

    def _in_use(self, length: int, device: torch.device) -> list[str]:
        if self.cfg.mode == "select":
            return [self._selected(length, device)]
        return list(self.members)

    def _member(self, name: str) -> StreamingAttention:
        member = self.members[name]
        assert isinstance(member, StreamingAttention)
        return member

    @right_padded
    @without_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with the mechanisms in use; see :meth:`BaseAttention.forward`."""
        refuse_transforms()
        refuse_meta("q", q)
        N = index(q.shape[2])  # a compiler, too, makes its plan for this length
        total = None if self.head_share is None else self.head_share.total

        def attend(member: StreamingAttention) -> Tensor:
            out: Tensor = member(q, k, v, mask)
            return out

        return self._weighed(q, N, mask, total, attend)

    @on_shard
    @without_autocast
    def attend_shard(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """Attend with a part of a sequence; see :meth:`BaseAttention.attend_shard`."""
        mask = shard.real(shard.start, shard.stop, q.device)

        def attend(member: StreamingAttention) -> Tensor:
            return member.attend_shard(q, k, v, shard)

        return self._weighed(q, shard.length, mask, shard.total, attend)

    def take_heads(self, share: HeadShare) -> None:
        """Compute only some of the heads; see :meth:`BaseAttention.take_heads`."""
        self.config = narrowed(self.config, share.parts)  # cfg, which selects, stays the whole's
        self.head_share = share
        for name in self.members:
            self._member(name).take_heads(share)

    def _weighed(
        self,
        q: Tensor,
        length: int,
        mask: Tensor | None,
        total: Callable[[Tensor], Tensor] | None,
        attend: Callable[[StreamingAttention], Tensor],
    ) -> Tensor:
        """Return the output of the mechanism in use, or the weighted sum of several.

        Args:
            q: queries (B, H, n, D).
            length: tokens of the whole sequence.
            mask: padding (B, n), or None.
            total: see :func:`~danon.attention.hybrid.blend.loss_terms`.
            attend: returns the output of a mechanism.
        """
        names = self._in_use(length, q.device)
        for name in self.members:
            if name not in names:
                self._member(name).set_auxiliary_loss(None)
        if len(names) == 1:
            with label_branches(names[0], None):
                return attend(self._member(names[0]))
        beta, w = self._weights(q)
        wanted = torch.is_grad_enabled()
        self._terms = loss_terms(beta, w, self.start, mask, total) if wanted else None
        parts = []
        for name, share in zip(names, w.unbind(-1), strict=True):
            with label_branches(name, share.reshape(-1, q.shape[2])):
                parts.append(attend(self._member(name)))
        return weighted_sum(parts, w).to(q.dtype)

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        """Return the parts of an empty state of all mechanisms in use."""
        return {
            f"{name}.{part}": x
            for name in self._in_use(self.cfg.max_sequence_length, empty.device)
            for part, x in self._member(name).init_parts(empty).items()
        }

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        """Attend with the next tokens, by the mechanisms that the parts are of."""
        by_member: dict[
            str, dict[str, StateTensor]
        ] = {}  # the stream says itself which mechanisms it is of
        for key, x in parts.items():
            name, _, part = key.partition(".")
            by_member.setdefault(name, {})[part] = x
        shares: Sequence[Tensor | None] = [None]
        if len(by_member) > 1:
            _, w = self._weights(q)
            shares = w.unbind(-1)
        outs: list[Tensor] = []
        after: dict[str, StateTensor] = {}
        for name, share in zip(by_member, shares, strict=True):
            with label_branches(name, share):
                out, new = self._member(name).step_parts(q, k, v, start, by_member[name])
            outs.append(out)
            after |= {f"{name}.{part}": x for part, x in new.items()}
        return (outs[0] if len(outs) == 1 else weighted_sum(outs, w).to(q.dtype)), after

    def _weights(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return beta and w = softmax(beta / T) of queries (..., D): (..., M), at least float32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        beta = getattr(self, "beta", self.start).to(wide).expand(*q.shape[:-1], -1)
        if hasattr(self, "gate"):
            beta = beta + q.to(wide) @ self.gate.to(wide).T
        return beta, (beta / self.cfg.temperature).softmax(-1)

    def auxiliary_loss(self) -> Tensor:
        """Return lambda_1 L_div + lambda_2 L_reg and the members' losses, all of the last pass.

        The former two (specification 4.2) are zero where no weights are learned: in mode select,
        with one mechanism, or with ``fusion_strategy`` fixed.

        Raises:
            ValueError: a blend that has had no forward pass with gradients.
        """
        parameter = next(self.parameters())
        total = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        for name in self.members:
            total = total + self._member(name).auxiliary_loss().to(total)
        if not hasattr(self, "beta"):
            return total
        diversity, regularization = self.loss_terms()
        c = self.cfg
        return total + c.diversity_weight * diversity + c.regularization_weight * regularization

    def loss_terms(self) -> tuple[Tensor, Tensor]:
        """Return L_div and L_reg of a blend's last forward pass; see :meth:`auxiliary_loss`."""
        if self._terms is None:
            raise ValueError(
                "no loss terms: there was no forward pass with gradients that weighed mechanisms"
            )
        return self._terms

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the graph of the last forward pass, which can be neither copied nor saved."""
        return {**super().__getstate__(), "_terms": None}

    def visible_pairs(self, length: int) -> int | None:
        """Sum the pairs of the mechanisms in use; None if one has none."""
        names = self._in_use(length, next(self.parameters()).device)
        by_member = [self._member(name).visible_pairs(length) for name in names]
        counted = [pairs for pairs in by_member if pairs is not None]
        return sum(counted) if len(counted) == len(by_member) else None

    def counted_pairs(self, k: Tensor) -> float | None:
        """Sum the pairs of the mechanisms in use over these keys; None if one has none."""
        by_member = [self._member(n).counted_pairs(k) for n in self._in_use(k.shape[-2], k.device)]
        counted = [pairs for pairs in by_member if pairs is not None]
        return sum(counted) if len(counted) == len(by_member) else None

    def oracle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute from the oracles of the mechanisms: the selected one's, or the weighted sum."""
        names = self._in_use(q.shape[2], q.device)
        parts = [self._member(name).oracle(q, k, v, mask, rows) for name in names]
        if len(names) == 1:
            return parts[0]
        if mask is not None:
            q = torch.where((mask != 0)[:, None, :, None], q, 0.0)
        _, w = self._weights((q if rows is None else q[:, :, rows]).double())
        return weighted_sum(parts, w)

    def effective_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
    ) -> EffectiveAttention:
        """Return the selected matrix, or the weighted sum; seen is what any mechanism sees."""
        names = self._in_use(q.shape[2], q.device)
        parts = [self._member(name).effective_attention(q, k, v, rows) for name in names]
        if len(names) == 1:
            return parts[0]
        with torch.no_grad():
            _, w = self._weights(q[:, :, rows].double())
            exact = [part.exact for part in parts if part.exact is not None]
            return EffectiveAttention(
                weighted_sum([part.weights for part in parts], w), torch.stack(exact).any(0)
            )

    def undecided_rows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor
    ) -> Tensor:
        """Return bool (R,): rows in which rounding decides a choice of a mechanism in use."""
        names = self._in_use(q.shape[2], q.device)
        by_member = [self._member(name).undecided_rows(q, k, v, mask, rows) for name in names]
        return torch.stack(by_member).any(0)
