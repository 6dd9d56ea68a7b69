"""One sequence on many processes: each has a part of its tokens, forward and backward exactly.

    parallel = SequenceParallel(model)                     # under torchrun, the same on every rank
    logits = parallel(parallel.cut(input_ids))             # this rank's part of the logits
    losses = F.cross_entropy(logits.flatten(0, 1), parallel.cut(labels).flatten(), reduction="none")
    loss = parallel.mean(losses) + parallel.auxiliary_loss()
    loss.backward()
    parallel.sum_gradients()
    optimizer.step()

Queries stay, keys and values come. The norms, projections and the feed-forward network need their
own tokens only; the attention fetches what else it needs, and its gradients go back the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from danon.attention.base import BaseAttention
from danon.attention.keyed_draws import DrawKey, number_attentions
from danon.attention.sequence_shard import Drawing, Range, SequenceShard, Wanted
from danon.distributed.process_group import Group, Traffic, sum_gradients
from danon.distributed.row_exchange import RowPlan, fetch_rows
from danon.models.backbone import Backbone

__all__ = ["SequenceParallel"]


class SequenceParallel(nn.Module):
    """A causal model that computes one part of its sequences on each process.

    Every process has the whole model, with equal weights. Padding stands at the end of sequences.

    - The loss is a mean over the tokens of all processes: :meth:`mean`. It is the same number
      everywhere, as :meth:`auxiliary_loss` is.
    - Its backward pass gives each process the gradient of its own tokens. The gradient of the loss
      is their *sum*: call :meth:`sum_gradients` after the last backward pass of a step. What takes
      means over processes instead, such as DDP, needs the loss times the number of processes.
    - Every process must run the same passes in the same order, and its loss must depend on its
      output.

    Args:
        module: the model; a causal configuration.
        group: the processes that share a sequence; None: all of them. A plain process is alone.

    Example::

        >>> import torch
        >>> from danon import create_msra_model
        >>> from danon.distributed.sequence_parallel import SequenceParallel
        >>> model = create_msra_model(hidden_size=64, num_layers=1, vocab_size=50, task="lm")
        >>> parallel = SequenceParallel(model)
        >>> input_ids = torch.randint(50, (1, 100))
        >>> parallel(parallel.cut(input_ids)).shape  # of this process alone
        torch.Size([1, 100, 50])

    Raises:
        ValueError: a model that is bidirectional or a classifier, or an attention that takes whole
            sequences only.

    Attributes:
        module: the model.
        traffic: bytes and messages that this process has sent to others.
    """

    def __init__(self, module: Backbone, group: dist.ProcessGroup | None = None) -> None:
        """Check the model and keep it."""
        super().__init__()
        if not module.config.is_causal:
            raise ValueError(
                "the model is bidirectional: sequences can be cut only for a causal one "
                "(task='lm', or causal=True)"
            )
        if module.task == "classifier":
            raise ValueError(
                "task = 'classifier': must be 'encoder' or 'lm', which answer by token"
            )
        for attention in number_attentions(module):
            assert isinstance(attention, BaseAttention)
            if type(attention).attend_shard is BaseAttention.attend_shard:
                raise ValueError(f"{type(attention).__name__} takes whole sequences only")
            if attention.head_share is not None:
                raise ValueError("the heads of the model are spread over processes already")
        self.module, self._group = module, Group.of(group)

    @property
    def traffic(self) -> Traffic:
        """Bytes and messages that this process has sent to others."""
        return self._group.traffic

    def cut(self, x: Tensor) -> Tensor:
        """Return this process's part of a tensor that each process has whole.

        The first processes have a token more where the length is not a multiple of them.

        Args:
            x: (B, N) or (B, N, ...): input_ids, attention_mask, labels.

        Raises:
            ValueError: fewer tokens than processes.
        """
        if x.dim() < 2 or x.shape[1] < self._group.size:
            raise ValueError(
                f"the tensor has shape {tuple(x.shape)}: must be (B, N), with a token for each of "
                f"{self._group.size} ranks"
            )
        return x.tensor_split(self._group.size, 1)[self._group.rank]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model on this process's part of the sequences.

        Args:
            input_ids: (B, n), the part of process r behind that of r - 1. Parts may differ in
                length, and need at least one token.
            attention_mask: (B, n), 1 or True for real tokens, 0 or False for padding, which may
                only stand at the end of the whole sequences; None: all are real.

        Returns:
            Hidden states (B, n, hidden_size), or logits (B, n, vocab_size) of an ``lm``; zeros at
            padding.

        Raises:
            ValueError: wrong input on any process, on all of them; padding before a real token.
        """
        shard = self._agree(input_ids, attention_mask)
        out: Tensor = self.module(input_ids, attention_mask, shard=shard)
        return out

    def mean(self, losses: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean of the losses of all processes' tokens, the same number on each.

        Args:
            losses: of this process's tokens, of any shape.
            counted: bool of that shape, which losses count; None: all. Nothing counted gives zero.
        """
        counted = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
        own = torch.stack((torch.where(counted, losses, 0.0).sum(), counted.sum().to(losses)))
        total, count = self._group.total(own).unbind()
        return total / count.detach().clamp_min(1)

    def auxiliary_loss(self) -> Tensor:
        """Return the auxiliary loss of the last forward pass, the same number on each process."""
        return self.module.auxiliary_loss()

    def sum_gradients(self) -> None:
        """Replace the gradients of the parameters by their sums over the processes."""
        sum_gradients(self.module.parameters(), self._group)

    def generate(self, *_: object, **__: object) -> NoReturn:
        """Refuse: a stream is of one process."""
        self._refuse("generate")

    def step(self, *_: object, **__: object) -> NoReturn:
        """Refuse: a stream is of one process."""
        self._refuse("step")

    def init_state(self, *_: object, **__: object) -> NoReturn:
        """Refuse: a stream is of one process."""
        self._refuse("init_state")

    def _refuse(self, name: str) -> NoReturn:
        raise ValueError(
            f"SequenceParallel has no {name}: tokens come one after the other, on one process; "
            f"call {name} of the model itself, .module"
        )

    def _agree(self, input_ids: Tensor, attention_mask: Tensor | None) -> ShardOfGroup:
        """Return the part that this process has, after a check of the input on all processes."""
        group = self._group
        refused, real, seed = None, [0], 0
        try:
            self.module.check_inputs(input_ids, attention_mask)
            real = _real_tokens(input_ids, attention_mask)
        except ValueError as error:  # raised once the others know of it
            refused = error
        if self.training and group.rank == 0:
            seed = int(torch.randint(1 << 62, ()))
        shape = (0, 0) if refused else input_ids.shape
        told = group.gather((refused is not None, *shape, seed), input_ids.device)
        if refused is not None:
            raise refused
        if bad := [rank for rank, row in enumerate(told) if row[0]]:
            raise ValueError(f"rank {bad[0]} of {group.size} was given wrong input: see its error")
        if len(batches := {row[1] for row in told}) > 1:
            raise ValueError(
                f"input_ids has a batch of {len(input_ids)} here, and {sorted(batches)} on all "
                "ranks: must be the same"
            )
        edges = tuple(accumulate((row[2] for row in told), initial=0))
        by_rank = group.gather(real, input_ids.device)
        lengths = [sum(counts) for counts in zip(*by_rank, strict=True)]
        for rank, counts in enumerate(by_rank):
            first, last = edges[rank], edges[rank + 1]
            if counts != [min(max(length, first), last) - first for length in lengths]:
                raise ValueError(
                    f"attention_mask: ranks after {rank}, which has padding, have real tokens "
                    f"{AT_THE_END}"
                )
        padded = min(lengths) < edges[-1]
        return ShardOfGroup(edges, lengths if padded else None, group, told[0][3])


AT_THE_END = "behind padding: sequences that are cut can have padding at their end only"


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Return the real tokens of each row (B,), which must be its first ones."""
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    real = attention_mask != 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError(f"attention_mask has real tokens {AT_THE_END}")
    return real.sum(1).tolist()


class ShardOfGroup(SequenceShard):
    """A part of a sequence whose other parts the processes of a group have.

    Args:
        edges: as in :class:`~danon.attention.sequence_shard.SequenceShard`.
        lengths: likewise.
        group: the processes.
        seed: of the draws of attentions without a key, the same everywhere.
    """

    def __init__(
        self, edges: Sequence[int], lengths: Sequence[int] | None, group: Group, seed: int
    ) -> None:
        """Keep the places and the group."""
        super().__init__(edges, group.rank, lengths)
        self._group, self._seed = group, seed
        self._fetched: list[_Fetched] | None = None

    @contextmanager
    def one_attention(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """See :meth:`SequenceShard.one_attention`."""
        if self._fetched is not None:  # of a part of the attention that is at work
            yield lambda out: out
            return
        self._fetched = []
        try:
            yield self._tied
        finally:
            self._fetched = None

    def _tied(self, out: Tensor) -> Tensor:
        rows = [x for fetched in self._fetched or () for x in fetched.rows if x.requires_grad]
        if not (rows and out.requires_grad):
            return out
        tied: Tensor = _Tied.apply(out, *rows)  # type: ignore[no-untyped-call]
        return tied

    def fetch(
        self, tensors: Sequence[Tensor], wanted: Wanted, edges: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """Return rows of all processes; see :meth:`SequenceShard.fetch`.

        What an attention has fetched already is not fetched again.
        """
        edges = self.edges if edges is None else tuple(edges)
        ranges = tuple(tuple(wanted(*bounds)) for bounds in pairwise(self.edges))
        known = self._fetched or ()
        for fetched in known:
            same = len(fetched.tensors) == len(tensors) and all(
                x is y for x, y in zip(fetched.tensors, tensors, strict=True)
            )
            if same and (fetched.edges, fetched.ranges) == (edges, ranges):
                return fetched.rows
        plan = RowPlan(edges, ranges, self.rank)
        rows = fetch_rows(tensors, plan, self._group)
        if self._fetched is not None:
            self._fetched.append(_Fetched(tuple(tensors), edges, ranges, rows))
        return rows

    def total(self, x: Tensor) -> Tensor:
        """Return a sum over the processes; see :meth:`SequenceShard.total`."""
        return self._group.total(x)

    def draw_key(self, attention: Drawing) -> DrawKey:
        """Return an attention's own key, or one that all processes have."""
        if attention.draw_key is not None:
            return attention.draw_key
        word = random.Random(f"{self._seed} {attention.draw_stream}").getrandbits(63)
        device = next(attention.parameters()).device
        return DrawKey(torch.tensor(word, dtype=torch.int64, device=device), None)


class _Fetched(NamedTuple):
    """Rows that an attention has fetched, and of which tensors and processes they are."""

    tensors: tuple[Tensor, ...]
    edges: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]
    rows: tuple[Tensor, ...]


class _Tied(torch.autograd.Function):
    """Its first input; the others get a gradient of zeros.

    A process may fetch rows that its own queries do not use. Without a gradient of its own it would
    not take part in the exchange of the others' gradients, and they would wait for it.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *rows: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)
