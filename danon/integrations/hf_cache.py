"""What a Hugging Face cache keeps of a DANON attention layer: a stream state, and no keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from danon.attention.streaming import Group, StreamingAttention, StreamState

__all__ = ["StreamLayer", "claim", "taken"]

TAG = "_danon_stream"
NO_REWIND = (
    "a danon stream state cannot go back: crop, assisted and prompt-lookup decoding are not "
    "possible; copy.deepcopy the cache before the tokens that may be taken back"
)


class StreamLayer(CacheLayerMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A cache layer that holds a :class:`~danon.attention.streaming.StreamState`.

    ``update`` hands out the new keys and values alone, tagged, so that the attention function,
    which is given nothing else, finds its state.
    """

    def __init__(self, before: StreamLayer | None = None) -> None:
        """``before`` is the cache layer whose attention runs before this one in the model."""
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.before = before
        self.state: StreamState | None = None
        self.length = 0
        self.claimed = self.pending = self.closed = False

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
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
        """Attend with the next tokens and keep the state after them; see the attention's ``step``.

        Args:
            cached: of each row, how many tokens before these the model's mask calls real.

        Raises:
            ValueError: besides, if an earlier step failed after some layers; nothing is kept then.
                Or the mask hides tokens that the state has read, or the reverse.
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
        """Count n tokens that were attended to with gradients, and keep nothing of them.

        Raises:
            ValueError: there is a state, which these tokens would have to continue.
        """
        if self.length:
            raise ValueError(
                "a stream state has no gradients: continue a cache under torch.no_grad()"
            )
        self.closed, self.length = True, n

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the state begins with its first tokens."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.length = None, 0
        self.claimed = self.pending = self.closed = False

    def offload(self) -> None:
        raise ValueError("a danon stream state is not offloaded: it is small and stays in place")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(NO_REWIND)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._keep(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._keep(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows of the batch that ``indices`` would keep of a tensor of keys."""
        if isinstance(indices, Tensor):
            indices = indices.cpu()
        self._keep(lambda rows: rows[indices])

    def _keep(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep the rows of the batch that are chosen from their numbers.

        Raises:
            ValueError: what is chosen is no batch.
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
        copy = type(self)()
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)  # states are values: both may go on from this one
        copy.before = memo.get(id(self.before))  # deepcopy goes through the layers in order
        return copy


def claim(cache: Cache, index: int) -> None:
    """Make layer ``index`` of a cache a :class:`StreamLayer`, and let it take the next keys.

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


def taken(key: Tensor) -> StreamLayer | None:
    """The cache layer that handed out these keys; None without a cache.

    Raises:
        ValueError: they were attended to before.
    """
    stream = getattr(key, TAG, None)
    if not isinstance(stream, StreamLayer):
        return None
    if not stream.pending:
        raise ValueError("attention layers that share keys cannot be served with a cache")
    stream.pending = False
    return stream


def _select(state: StreamState, rows: list[int]) -> StreamState:
    """The state whose sequence i is sequence rows[i] of this one."""
    heads = state.config["num_kv_heads"] or state.config["num_heads"]
    groups = []
    for group in state.groups:
        members = [(i, group.rows.index(row)) for i, row in enumerate(rows) if row in group.rows]
        if members:
            picked = group.pick([member for _, member in members], heads)
            groups.append(Group(tuple(i for i, _ in members), group.length, picked.parts))
    return dataclasses.replace(state, groups=tuple(groups))
