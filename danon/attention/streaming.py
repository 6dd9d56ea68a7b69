"""Streaming: attention over a sequence that arrives in chunks, with a bounded state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from danon.attention.base import BaseAttention, check_inputs, without_autocast
from danon.attention.stream_state import Group, StateTensor, StreamState, compact

__all__ = ["StreamingAttention"]


class StreamingAttention(BaseAttention):
    """An attention that can also be fed in chunks, for inference.

    Feeding a sequence in any chunks gives what ``forward`` gives on the whole. A subclass defines
    :meth:`init_parts` and :meth:`step_parts`.

    Example::

        >>> import torch
        >>> from danon import MSRA
        >>> from danon.config import MSRAConfig
        >>> attention = MSRA(MSRAConfig(hidden_size=128, num_heads=2, causal=True))
        >>> q, k, v = torch.randn(3, 1, 2, 100, 64)
        >>> state = attention.init_state(batch=1)
        >>> for a, b in ((0, 60), (60, 100)):
        ...     out, state = attention.step(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state)
        >>> state.lengths
        (100,)

    Attributes:
        streams: False in a subclass whose own kernel takes whole sequences only.
    """

    streams: ClassVar[bool] = True

    def init_state(
        self,
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StreamState:
        """Return the state before the first token.

        Args:
            batch: sequences that step together, of whatever lengths.
            dtype: of q, k and v; None takes that of the parameters (float32 without any).
            device: of q, k and v; None takes that of the parameters (the CPU without any).

        Raises:
            ValueError: batch below 1, or a configuration that is not causal.
        """
        if not self.streams:
            raise ValueError(f"{type(self).__name__} takes whole sequences only")
        if batch < 1:
            raise ValueError(f"batch = {batch}: must be at least 1")
        if not self.config.is_causal:
            raise ValueError(
                f"{type(self).__name__} is not causal: a stream cannot see later tokens"
            )
        like = next(self.parameters(), torch.zeros((), dtype=torch.float32))
        c = self.config
        empty = torch.empty(
            batch * c.kv_heads,
            0,
            c.head_dim,
            dtype=dtype or like.dtype,
            device=device or like.device,
        )
        group = Group(tuple(range(batch)), 0, self.init_parts(empty))
        return StreamState(type(self).__name__, c.to_dict(), empty.dtype, empty.device, (group,))

    @torch.no_grad()
    @without_autocast
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: StreamState, mask: Tensor | None = None
    ) -> tuple[Tensor, StreamState]:
        """Attend with the next tokens of each sequence.

        Args:
            q: queries (B, H, n, D) for n >= 1 new tokens.
            k: keys (B, G, n, D).
            v: values (B, G, n, D).
            state: from :meth:`init_state` or a step before; it is left as it is.
            mask: (B, n), 1 or True for tokens that there are. The others are no part of their
                sequence, which so may be longer or shorter than its neighbours; they get zeros.

        Returns:
            (B, H, n, D) in the dtype of q, without gradients; and the state after these tokens.

        Raises:
            ValueError: wrong shapes, or a state of another attention, batch, dtype or device.
        """
        check_inputs(self.config, q, k, v, mask)
        self.check_state(state, q)
        H, D, heads = q.shape[1], q.shape[3], k.shape[1]
        if mask is None and len(state.groups) == 1:  # all step together, nothing to sort out
            (group,) = state.groups
            q_, k_, v_ = (x.reshape(-1, x.shape[2], D).contiguous() for x in (q, k, v))
            out, parts = self.step_parts(q_, k_, v_, group.length, group.parts)
            after = Group(group.rows, group.length + q.shape[2], compact(parts))
            return out.view(q.shape), self._after(state, (after,))
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask != 0
        places = [row.nonzero().flatten() for row in real.to(q.device)]
        out = torch.zeros_like(q)
        groups: list[Group] = []
        for group in state.groups:
            by_count: dict[int, list[int]] = {}
            for member, row in enumerate(group.rows):
                by_count.setdefault(len(places[row]), []).append(member)
            for count, members in by_count.items():
                chosen = group.pick(members, heads)
                if count == 0:
                    groups.append(chosen)
                    continue
                q_, k_, v_ = (
                    torch.stack([x[row, :, places[row]] for row in chosen.rows]).view(-1, count, D)
                    for x in (q, k, v)
                )
                got, parts = self.step_parts(q_, k_, v_, chosen.length, chosen.parts)
                for row, rows in zip(chosen.rows, got.view(-1, H, count, D), strict=True):
                    out[row, :, places[row]] = rows
                groups.append(Group(chosen.rows, chosen.length + count, compact(parts)))
        return out, self._after(state, groups)

    def absorb(self, q: Tensor, k: Tensor, v: Tensor, state: StreamState) -> StreamState:
        """Return the state after tokens whose outputs are not needed.

        Args:
            q: queries (B, H, n, D) for n >= 1 new tokens.
            k: keys (B, G, n, D).
            v: values (B, G, n, D).
            state: as in :meth:`step`.
        """
        return self.step(q, k, v, state)[1]

    @abstractmethod
    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        """Return the parts of an empty state.

        Args:
            empty: (X, 0, D), X = batch * key/value heads, of the dtype and device of the keys.

        Returns:
            Name -> part.
        """

    @abstractmethod
    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        """Attend with tokens [start, start + n) of sequences of one length.

        Args:
            q: queries (batch * H, n, D), contiguous.
            k: keys (batch * G, n, D), contiguous.
            v: values (batch * G, n, D), contiguous.
            start: place of the first token.
            parts: the state, which must not be changed.

        Returns:
            (batch * H, n, D) and the new parts.
        """

    def _after(self, state: StreamState, groups: Iterable[Group]) -> StreamState:
        """Return the state with other groups."""
        return StreamState(state.owner, state.config, state.dtype, state.device, tuple(groups))

    def check_state(self, state: StreamState, q: Tensor) -> None:
        """Reject a state that is not of this attention, or not for these queries.

        Args:
            state: to be checked.
            q: queries (B, H, n, D).

        Raises:
            ValueError: naming what differs.
        """
        if not isinstance(state, StreamState):
            raise ValueError(f"state is a {type(state).__name__}: must be what init_state returns")
        if state.owner != type(self).__name__:
            raise ValueError(f"state is of {state.owner}: must be of {type(self).__name__}")
        differ = [f for f, x in state.config.items() if getattr(self.config, f, None) != x]
        if differ:
            theirs = ", ".join(f"{f} = {state.config[f]!r}" for f in differ)
            ours = ", ".join(f"{f} = {getattr(self.config, f, None)!r}" for f in differ)
            raise ValueError(f"state is of a configuration with {theirs}: must have {ours}")
        batch = len(state.lengths)
        if batch != q.shape[0]:
            raise ValueError(f"q has batch {q.shape[0]}: must be {batch} like the state")
        if (state.dtype, state.device) != (q.dtype, q.device):
            raise ValueError(
                f"q is {q.dtype} on {q.device}: must be {state.dtype} on {state.device} "
                "like the state"
            )
