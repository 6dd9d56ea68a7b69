"""The layer of a Hugging Face cache for DANON attention: it keeps a stream state and no keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from danon.attention.stream_state import Group, StreamState
from danon.attention.streaming import StreamingAttention

__all__ = ["StreamLayer", "cache_layer_of", "claim"]

TAG = "_danon_stream"
NO_REWIND = (
    "a danon stream state cannot go back: crop, assisted and prompt-lookup decoding are not "
    "possible; copy.deepcopy the cache before the tokens that may be taken back"
)


class StreamLayer(CacheLayerMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A cache layer that holds a :class:`~danon.attention.stream_state.StreamState`.

    ``update`` returns the new keys and values alone. The keys carry a tag by which the attention
    function, which is given nothing else, finds the state.

    Args:
        before: cache layer whose attention runs before this one in the model; None for the first.

    Attributes:
        state: state after the tokens that were read; None before the first.
        length: number of tokens that were read.
        claimed: True while the attention of this layer is about to cache keys.
        pending: True between caching keys and attending with them.
        closed: True if tokens were read with gradients, of which a state keeps nothing.
    """

    def __init__(self, before: StreamLayer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.before = before
        self.state: StreamState | None = None
        self.length = 0
        self.claimed = self.pending = self.closed = False

    @property
    def nbytes(self) -> int:
        """Number of bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tag the new keys for the attention function.

        Args:
            key_states: (B, G, n, D).
            value_states: (B, G, n, D).
            args: not used.
            kwargs: not used.

        Returns:
            The new keys, tagged, and values, in the same shapes.

        Raises:
            ValueError: the tokens cannot continue this cache; says why.
        """
        if self.pending:
            raise ValueError(
                "the keys that the model cached before never reached danon attention: a model that "
                "changes its keys after caching them cannot be served with a cache; use_cache=False"
            )
        if not self.claimed:
            raise ValueError(
                f"this cache holds a danon state of {self.length} tokens and no keys, which "
                "another attention cannot continue: begin a new cache"
            )
        if self.closed:
            raise ValueError(
                "this cache was begun with gradients, of which a stream state has none: fill and "
                "continue caches under torch.no_grad()"
            )
        self.claimed, self.pending = False, True
        keys = key_states.view_as(key_states)  # a new object: the tag stays off the model's own
        setattr(keys, TAG, self)
        return keys, value_states

    def step(
        self,
        attention: StreamingAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cached: list[int] | None = None,
    ) -> Tensor:
        """Attend with the next tokens and keep the state after them.

        Args:
            attention: attention of the layer.
            q: (B, H, n, D).
            k: (B, G, n, D).
            v: (B, G, n, D).
            mask: (B, n), nonzero for real tokens; None if all are real.
            cached: number of real tokens before these in each row, by the model's mask.

        Returns:
            (B, H, n, D).

        Raises:
            ValueError: the attention's ``step`` refuses the tokens; an earlier step failed between
                layers; or the mask hides tokens that the state has read, or the reverse. The state
                stays as it was.
        """
        n = q.shape[2]
        if self.before is not None and self.before.length != self.length + n:
            raise ValueError(
                f"layers of this cache have read {self.before.length} and {self.length + n} "
                "tokens, since an earlier step failed between them: begin a new cache"
            )
        state = self.state
        if state is None:
            state = attention.init_state(q.shape[0], dtype=q.dtype, device=q.device)
        elif cached is not None and cached != list(state.lengths):
            raise ValueError(
                f"attention_mask has {cached} real tokens before these, the cache has "
                f"read {list(state.lengths)}: a stream state cannot hide them later; give every "
                "call the same mask, longer by its new tokens"
            )
        out, self.state = attention.step(q, k, v, state, mask)
        self.length += n
        return out

    def skip(self, n: int) -> None:
        """Count tokens that were attended to with gradients, and keep nothing of them.

        Args:
            n: number of the tokens.

        Raises:
            ValueError: these tokens would have to continue a state.
        """
        if self.length:
            raise ValueError(
                "a stream state has no gradients: continue a cache under torch.no_grad()"
            )
        self.closed, self.length = True, n

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the state begins with its first tokens."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of a mask and its offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens that were read."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self.length = None, 0
        self.claimed = self.pending = self.closed = False

    def offload(self) -> None:
        """Refuse: the state stays on its device."""
        raise ValueError("a danon stream state is not offloaded: it is small and stays in place")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a state cannot forget its last tokens."""
        raise ValueError(NO_REWIND)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of the batch with these numbers (rows,)."""
        self._keep(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._keep(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows of the batch that ``indices`` would keep of a tensor of keys."""
        if isinstance(indices, Tensor):
            indices = indices.cpu()
        self._keep(lambda rows: rows[indices])

    def _keep(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep the rows of the batch that a function chooses from their numbers.

        Raises:
            ValueError: it chooses no rows.
        """
        if self.state is None:
            return
        rows = choose(torch.arange(len(self.state.lengths)))
        if rows.dim() != 1 or not len(rows):
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} chosen of a cache: must be one or more, (rows,)"
            )
        self.state = _select(self.state, rows.tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the layer and share its state, which is a value."""
        copy = type(self)()
        memo[id(self)] = copy
        copy.__dict__.update(
            self.__dict__
        )  # states are values: both copies may continue from this one
        copy.before = memo.get(id(self.before))  # deepcopy goes through the layers in order
        return copy


def claim(cache: Cache, index: int) -> None:
    """Make a layer of a cache a :class:`StreamLayer`, and let it take the next keys.

    Args:
        cache: a ``DynamicCache``, empty or of DANON layers.
        index: number of the layer.

    Raises:
        ValueError: a cache of another kind, or one filled by another attention.
    """
    if cache.offloading:
        raise ValueError("danon attention keeps no keys to offload: use a plain DynamicCache")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, StreamLayer):
        layer.claimed = True
        return
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"layer {index} of the cache is a {type(layer).__name__}: danon attention keeps a state"
            " of its own and needs a DynamicCache, without sliding windows"
        )
    if layer.get_seq_length():
        raise ValueError(
            f"layer {index} of the cache holds {layer.get_seq_length()} keys of another attention, "
            "which danon attention cannot continue: begin a new cache"
        )
    before = cache.layers[index - 1] if index else None
    claimed = StreamLayer(before if isinstance(before, StreamLayer) else None)
    claimed.claimed = True
    cache.layers[index] = claimed


def cache_layer_of(key: Tensor) -> StreamLayer | None:
    """Return the cache layer that tagged these keys; None without a cache.

    Args:
        key: (B, G, n, D).

    Raises:
        ValueError: another layer has attended to them.
    """
    stream = getattr(key, TAG, None)
    if not isinstance(stream, StreamLayer):
        return None
    if not stream.pending:
        raise ValueError("attention layers that share keys cannot be served with a cache")
    stream.pending = False
    return stream


def _select(state: StreamState, rows: list[int]) -> StreamState:
    """Return the state whose sequence i is sequence ``rows[i]`` of this one."""
    heads = state.config["num_kv_heads"] or state.config["num_heads"]
    groups = []
    for group in state.groups:
        members = [(i, group.rows.index(row)) for i, row in enumerate(rows) if row in group.rows]
        if members:
            picked = group.pick([member for _, member in members], heads)
            groups.append(Group(tuple(i for i, _ in members), group.length, picked.parts))
    return dataclasses.replace(state, groups=tuple(groups))
