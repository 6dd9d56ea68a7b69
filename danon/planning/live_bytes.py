"""The bytes that live while code runs on fake tensors, which have shapes and no memory.

with fake_devices(), LiveBytes() as live:
    model(ids)
    print(live.peak)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danon.attention.union.merge import CHUNK_BYTES
from danon.attention.union.plan import ABSENT, SPARE, FlatCall

__all__ = ["LiveBytes", "fake_devices"]

FLOAT32 = 4
"""Bytes of a number."""


@contextlib.contextmanager
def fake_devices() -> Iterator[None]:
    """Make tensors without memory on the CPU, and let our attentions run on them.

    Uncompiled they ask what values tensors have, which fake tensors cannot say. So inside, torch
    says that it compiles: a private flag of torch, set here alone.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.compiler._is_compiling_flag = before


class LiveBytes(TorchDispatchMode):
    """A mode that follows the storages which operators make, until they are released.

    Attributes:
        now: bytes that live now.
        peak: most bytes that lived at once since the last :meth:`restart`.
        plans: what becomes of the plans of unions, row numbers and biases. ``saved``: the backward
            pass gets them, as in compiled code. Uncompiled code does otherwise under checkpointing:
            the first forward pass keeps them (``kept``), the repeated one lets them go
            (``dropped``).
        kept: the plans that a first forward pass keeps.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.plans: Literal["saved", "kept", "dropped"] = "saved"
        self.kept: list[Tensor] = []
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> Self:
        """Begin to follow storages."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def restart(self) -> int:
        """Return the peak, and begin a new one."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run an operator and follow what it makes."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        inside = _inside(func, args)
        self.peak = max(self.peak, self.now + inside)
        if self.plans != "saved" and str(func).startswith("danon.union."):
            plan = args[1]
            if self.plans == "kept":
                self.kept += plan
            else:
                for tensor in plan:
                    self._forget(tensor.untyped_storage())
        return out

    def _forget(self, storage: torch.UntypedStorage) -> None:
        if self._known.pop(storage._cdata, None) is not None:
            self.now -= storage.nbytes()

    def _follow(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at in self._known:
            return
        self.now += size
        self._known[at] = weakref.ref(storage, partial(self._released, at, size))

    def _released(self, at: int, size: int, _: object) -> None:
        if self._known.pop(at, None) is not None:
            self.now -= size


def _inside(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that live inside an operator beside its arguments and results.

    Only those of the union (:mod:`danon.attention.union.merge`) are as long as the input.
    """
    name = str(func)
    if name.startswith("danon.union."):
        (q, *_), fixed, _, integers = args[:4]
        return (_wide(q) if q.element_size() < FLOAT32 else 0) + _bias(q, fixed, integers)
    if name.startswith("danon.union_backward."):
        return _inside_backward(*args[:6])
    return 0


def _inside_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    saved: Sequence[Tensor],
    need: Sequence[bool],
    present: Sequence[bool],
    integers: Sequence[int],
) -> int:
    """Return the bytes inside the backward pass of a union, by its arguments.

    They are gradients in float32, copies with spare columns where those are needed, and a bias.
    """
    out, lse, *rest = saved
    tensors, fixed = rest[: len(need)], rest[len(need) :]
    q, first = tensors[0], len(need) - sum(present)  # shifts are between q and the sources
    of_source = [number % 3 for number, there in enumerate(present) if there]
    sources = list(zip(of_source, tensors[first:], need[first:], strict=True))
    whole = [q, *(x for kind, x, _ in sources if kind < 2)]
    wide = sum(map(_wide, whole))
    inside = lse.nbytes + (wide if q.element_size() < FLOAT32 else 0) + _bias(q, fixed, integers)
    if grad_lse is None and not any(need[1:first]) and not any(n for i, _, n in sources if i == 2):
        return inside + (0 if grad is not None and grad.is_contiguous() else out.nbytes)
    share = SPARE / q.shape[-1]
    return inside + int(share * wide + (1 + share) * (sum(x.nbytes for x in whole) + 2 * q.nbytes))


def _bias(q: Tensor, fixed: Sequence[Tensor], integers: Sequence[int]) -> int:
    """Return the bytes of the largest bias of the calls of a plan, in float32.

    A call runs on some of its tiles at a time, at least on one (``_chunks`` of the union).
    """
    width, largest = len(FlatCall._fields), 0
    for at in range(0, len(integers), width):
        call = FlatCall(*integers[at : at + width])
        if call.bias != ABSENT or call.profile_scale != ABSENT:
            keys = call.k_length
            if call.k_rows != ABSENT:
                keys = fixed[call.k_rows].shape[2] * call.k_start
            tile = FLOAT32 * q.shape[0] * call.q_length * keys
            tiles = min(call.q_count, max(1, CHUNK_BYTES // tile))
            largest = max(largest, tile * tiles)
    return largest


def _wide(x: Tensor) -> int:
    """Return the bytes of a tensor in float32, or wider if it is."""
    return x.numel() * max(FLOAT32, x.element_size())
