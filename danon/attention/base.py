"""The contract that every attention fulfils: ours, the baselines', and a user's own.

Dimension suffixes used throughout ``danon``: B batch, H query heads, G key/value heads
(G divides H), N tokens, D head width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from danon.attention.effective_matrix import EffectiveAttention, value_weights
from danon.attention.head_share import HeadShare
from danon.attention.kernels import table
from danon.attention.keyed_draws import DrawKey
from danon.attention.sequence_shard import SequenceShard
from danon.config import AttentionConfig
from danon.tuned.search_space import Space

__all__ = ["BaseAttention", "check_inputs", "check_mask", "made_on", "without_autocast"]

_Out = TypeVar("_Out")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BaseAttention(nn.Module):
    """A drop-in for scaled dot-product attention, and what the suites ask of one.

    A subclass needs ``forward`` and a constructor that takes one
    :class:`~danon.config.AttentionConfig`; everything else has a default.

    Example::

        >>> import torch
        >>> from danon import BaseAttention
        >>> from danon.config import AttentionConfig
        >>> class Dense(BaseAttention):
        ...     def __init__(self, config):
        ...         super().__init__()
        ...         self.setup_attention(config)
        ...
        ...     def forward(self, q, k, v, mask=None):
        ...         logits = self.compute_attention(q, k)
        ...         if mask is not None:
        ...             logits = logits.masked_fill(mask[:, None, None] == 0, -1e9)
        ...         return torch.softmax(logits, dim=-1) @ v
        >>> attention = Dense(AttentionConfig(hidden_size=128, num_heads=2, causal=True))
        >>> q, k, v = torch.randn(3, 1, 2, 100, 64)
        >>> attention(q, k, v).shape
        torch.Size([1, 2, 100, 64])

    Attributes:
        description: short text for the tables, sizes included: ``exact``, ``window 256 + 64
            sinks``, ``low rank`` ... Figures of equal configuration and description count as of one
            configuration.
        oracle_kind: ``definition`` if :meth:`oracle` is one, else ``self in float64``.
        causal_capable: True if a causal configuration hides every later token; the suites hold it
            to that.
        pools_tokens: True if the mechanism pools tokens, so that a token's weight does not show
            which tokens were read.
        tuned_length: tokens that its settings were tuned for; 0: they are for any length.
        config: the configuration, once :meth:`setup_attention` has run.
        draw_key: key of the random numbers of a training step
            (:mod:`danon.attention.keyed_draws`); None: they come from torch's generator.
        draw_stream: number of the attention in its model, once a key was set.
        head_share: which heads it has, once :meth:`take_heads` has run; None: all.
    """

    description: str = "not stated"
    oracle_kind: ClassVar[str] = "self in float64"
    causal_capable: ClassVar[bool] = True
    pools_tokens: ClassVar[bool] = False
    tuned_length: ClassVar[int] = 0

    config: AttentionConfig
    draw_key: DrawKey | None = None
    draw_stream: int | None = None
    head_share: HeadShare | None = None
    _auxiliary: Tensor | None = None

    def setup_attention(self, config: AttentionConfig) -> None:
        """Keep the configuration (the specification's extension point).

        Args:
            config: shape, causality and kernel.

        Raises:
            ValueError: ``config.kernel`` names no kernel; the message lists them.
        """
        if config.kernel not in ("auto", *table.names()):
            raise ValueError(
                f"unknown kernel {config.kernel!r}; known: auto, {', '.join(table.names())}"
            )
        self.config = config

    def compute_attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Return dense logits ``q k^T / sqrt(D)`` (B, H, N, N), later tokens hidden when causal.

        Specification 1.2. For short inputs: the matrix is materialised.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, N, D).
        """
        k_BHND = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits: Tensor = q @ k_BHND.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.config.is_causal:
            rows, cols = logits.shape[-2:]
            later = torch.ones(rows, cols, dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        return logits

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with every query.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, N, D).
            v: values (B, G, N, D).
            mask: padding (B, N); True or 1 marks a real token, False or 0 padding, which is no part
                of its sequence. Real tokens get what they get without padding, wherever it stands;
                :func:`danon.attention.padding.right_padded` ensures that.

        Returns:
            (B, H, N, D) in the dtype of ``q``; padding gets zeros.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def attend_shard(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """Attend with the queries of a part of a sequence, whose other parts other processes have.

        Args:
            q: queries of the part (B, H, n, D).
            k: keys of the part (B, G, n, D); zeros at padding, as in q and v.
            v: values of the part (B, G, n, D).
            shard: which tokens these are, and the way to the others.

        Returns:
            (B, H, n, D), what :meth:`forward` gives these queries in the whole sequence; the
            auxiliary loss is that of the whole, too.

        Raises:
            ValueError: the attention cannot do it, or is bidirectional.
        """
        raise ValueError(f"{type(self).__name__} takes whole sequences only")

    def take_heads(self, share: HeadShare) -> None:
        """Compute only some of the heads from now on; other processes compute the others.

        The parameters stay whole. Their gradients are of these heads: the sum over the parts is
        that of the whole.

        Args:
            share: which part of the heads.

        Raises:
            ValueError: the attention cannot do it, or its heads cannot be divided so.
        """
        raise ValueError(f"{type(self).__name__} cannot do with a part of its heads")

    def auxiliary_loss(self) -> Tensor:
        """Return the loss that the last forward pass adds to that of training, weighted.

        Read it between the forward and the backward pass. See :meth:`set_auxiliary_loss`.

        Returns:
            A scalar. Zero for an attention without such a loss, before the first forward pass, and
            after one in evaluation mode or without gradients.
        """
        if self._auxiliary is not None:
            return self._auxiliary
        # Not new_zeros of a parameter: sharded, it would make a sharded scalar.
        parameter = next(self.parameters(), torch.zeros((), dtype=torch.float32))
        return torch.zeros((), dtype=parameter.dtype, device=parameter.device)

    @property
    def wants_auxiliary(self) -> bool:
        """True if this forward pass should compute its auxiliary loss: it is one of training."""
        return self.training and torch.is_grad_enabled()

    def set_auxiliary_loss(self, loss: Tensor | None) -> None:
        """Replace what :meth:`auxiliary_loss` returns; every forward pass calls it once.

        Args:
            loss: a scalar with its graph, already weighted; None for none.
        """
        # Gradient checkpointing repeats the forward pass inside the backward pass: the loss of the
        # first run is the one that was added, and the graph of the second is nobody's.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._auxiliary = loss

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last forward pass: a graph can be neither copied nor saved."""
        return {n: x for n, x in self.__dict__.items() if n not in ("_auxiliary", "draw_key")}

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Self:
        """Build the instance that the suites measure.

        Args:
            shape: widths, heads, causality, length in tokens.
            **settings: settings of a choice from :meth:`search_space`; none: the defaults.
        """
        return cls(shape, **settings)

    @classmethod
    def search_space(cls) -> Space | None:
        """Return the settings of :meth:`build` that a study may choose; None: nothing to tune."""
        return None

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        """Build the instance that the quality suites train: the largest within a budget.

        An attention without such a size, dense or recurrent, is what :meth:`build` makes.

        Args:
            shape: as in :meth:`build`; the average is over its ``max_sequence_length`` tokens.
            entries: entries that a query sees on average, about, at most.

        Raises:
            NotImplementedError: its size is fixed, and no fair one to compare; says why.
        """
        return cls.build(shape)

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
        """Return why a case cannot run here (a missing package, no CUDA ...), or None if it can.

        Args:
            shape: as in :meth:`build`.
            length: tokens N.
            dtype: of q, k and v.
            device: of q, k and v.
            backward: True if gradients are computed too.
        """
        return None

    def oracle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute the same result in float64, from the definition where there is one.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, N, D).
            v: values (B, G, N, D).
            mask: padding (B, N), as in :meth:`forward`.
            rows: query positions to compute, (R,) int64; None computes all.

        Returns:
            (B, H, R, D) float64, differentiable in q, k, v.
        """
        exact = copy.deepcopy(self).double()
        out: Tensor = exact(q.double(), k.double(), v.double(), mask)
        return out if rows is None else out[:, :, rows]

    def undecided_rows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor
    ) -> Tensor:
        """Find rows in which rounding decides a discrete choice, so that no oracle can judge.

        There are none, unless an attention selects by score.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, N, D).
            v: values (B, G, N, D).
            mask: padding (B, N), as in :meth:`forward`.
            rows: query positions (R,).

        Returns:
            (R,) bool.
        """
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)

    def effective_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
    ) -> EffectiveAttention:
        """Return the effective attention matrix of some queries, by the oracle.

        The weights are the oracle's gradient in v: all of the output where that is linear in v and
        keeps the columns of v apart. A token with weight counts as seen as itself, unless the class
        ``pools_tokens``.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, N, D).
            v: values (B, G, N, D).
            rows: query positions (R,).
        """
        weights = value_weights(lambda x: self.oracle(q, k, x, None, rows), v, q.shape[1])
        return EffectiveAttention(weights, None if self.pools_tokens else weights != 0)

    def visible_pairs(self, length: int) -> int | None:
        """Count the (query, entry) pairs of one head in a forward pass.

        Args:
            length: tokens N.

        Returns:
            Pairs; the most there can be, if the number depends on the keys. None where it has no
            meaning.
        """
        return None

    def counted_pairs(self, k: Tensor) -> float | None:
        """Count the (query, entry) pairs of one head over given keys, on average.

        Args:
            k: keys (B, G, N, D).
        """
        return self.visible_pairs(k.shape[-2])


def without_autocast(forward: Callable[..., _Out]) -> Callable[..., _Out]:
    """Run a forward(self, q, ...) that chooses the precision of every step itself; a decorator.

    Inputs are checked outside of it, and it does nothing where autocast is off: compiled code that
    is left by an error leaves its autocast regions open, and for an open one torch keeps the first
    cast of every weight, which later training under autocast then reads for ever.
    """

    @functools.wraps(forward)
    def run(self: BaseAttention, q: Tensor, *args: object, **kwargs: object) -> _Out:
        device = q.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return forward(self, q, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return forward(self, q, *args, **kwargs)

    return run


def made_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that makes new tensors on a device.

    Nothing is entered where they are made on it anyway: inside a device's context, torch runs
    Python code for every operation.

    Args:
        device: where to make them.
    """
    return nullcontext() if device == torch.get_default_device() else device


def check_inputs(
    config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> None:
    """Reject wrong shapes, dtypes and devices with an error that names what is allowed.

    Args:
        config: shape that the tensors must have.
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        mask: padding (B, N) or None.

    Raises:
        ValueError: naming the tensor, what it is and what it must be.
    """
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}: must be (B, H, N, D)")
    B, H, N, D = q.shape
    if H != config.num_heads or D != config.head_dim:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: must be (B, {config.num_heads}, N, {config.head_dim}) "
            "as configured"
        )
    if N == 0 or B == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}: B and N must be at least 1")
    want = (B, config.kv_heads, N, D)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != want:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {want} to go with q")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}: must be {q.dtype} on {q.device} like q"
            )
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q is {q.dtype}: must be one of {', '.join(map(str, FLOAT_DTYPES))}")
    if mask is not None:
        if tuple(mask.shape) != (B, N):
            raise ValueError(f"mask has shape {tuple(mask.shape)}: must be (B, N) = {(B, N)}")
        if mask.device != q.device:
            raise ValueError(f"mask is on {mask.device}: must be on {q.device} like q")
        check_mask("mask", mask)


def check_mask(name: str, mask: Tensor) -> None:
    """Reject a padding mask with other values than 0 and 1, such as an additive one.

    Compiled code cannot look at values: there the error is a ``RuntimeError`` of torch, at run
    time, which on a GPU ends the process.

    Args:
        name: of the argument, for the error.
        mask: of any shape.

    Raises:
        ValueError: naming the first other value.
    """
    allowed = (
        "must be bool, or 1 for a real token and 0 for padding (of an additive mask: mask == 0)"
    )
    if mask.dtype == torch.bool:
        return
    other = (mask != 0) & (mask != 1)
    if torch.compiler.is_compiling():
        torch._assert_async(~other.any(), f"{name} holds other values than 0 and 1: {allowed}")
    elif not mask.is_meta and bool(other.any()):
        raise ValueError(f"{name} holds {mask[other][0].item()}: {allowed}")
