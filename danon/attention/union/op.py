"""One softmax over a union of key sets, through existing kernels, with its exact backward.

    o_i = sum_e softmax_e(q_i.k_e * scale + b_ie) v_e

The entries e of a query come in calls, each one run of a kernel over tiles of queries and keys.
Outputs are merged by their log-sum-exps. The backward hands each kernel the *merged* output and
log-sum-exp, which is what makes its local softmax the global one (as ring attention does).

Compiled code sees the whole union as one operator, ``danon::union``, and its backward as another:
kernels on strided views, written in place, are nothing that a compiler could improve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from danon.attention.tensor_checks import refuse_transforms
from danon.attention.union import merge
from danon.attention.union.dense_union import differentiable_gradients
from danon.attention.union.first_order import without_second
from danon.attention.union.merge import Watch
from danon.attention.union.plan import BranchCall, FlatPlan, ScaledBias, Source, UnionInputs

__all__ = ["BranchCall", "ScaledBias", "Source", "observe_branches", "observer", "union"]

NO_SECOND = (
    "second derivatives through attention kernels: there are none; build the attention with "
    "kernel='dense', which has them (not compiled), or differentiate its oracle(q, k, v, mask)"
)

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def observe_branches(watch: Watch | None) -> Iterator[None]:
    """Report the softmax mass of every union computed inside, in this thread.

    Args:
        watch: called with the names of the branches and their share of each query's softmax
            (branches, X, N) float32 or wider, without gradients: ones in sum over the branches, or
            zeros for padding and a query that sees nothing. None: nobody is told, as in compiled
            code.
    """
    if torch.compiler.is_compiling():
        yield
        return
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def observer() -> Watch | None:
    """Return who observes now; nobody in compiled code, which cannot look."""
    return None if torch.compiler.is_compiling() else _watch.get()


def union(
    q: Tensor,
    sources: Sequence[Source],
    calls: Sequence[BranchCall],
    shifts: Sequence[Tensor] = (),
    *,
    scale: float,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend to all entries of all calls under one softmax.

    Args:
        q: (X, N, D), X = batch * query heads.
        sources: keys and values the calls refer to.
        calls: what is visible.
        shifts: (X, N) logit biases per query that calls refer to.
        scale: factor of q.k.
        kernel: a name of :mod:`danon.attention.kernels.table`, or ``auto``.

    Returns:
        Output (X, N, D) in the dtype of q and log-sum-exp (X, N) float32 (float64 for float64),
        both differentiable: once, and with kernel ``dense`` (not compiled) any times. A query
        without a visible entry gets zeros and HIDDEN.

    Raises:
        ValueError: inside a transform of ``torch.func``.
    """
    flat = [x for s in sources for x in (s.k, s.v, s.bias)]
    refuse_transforms()
    if torch.compiler.is_compiling():
        return _compiled(q, flat, calls, shifts, scale, kernel)
    out, lse = _Union.apply(  # type: ignore[no-untyped-call]
        tuple(calls), scale, kernel, len(shifts), q, *shifts, *flat
    )
    return out, lse


def _inputs(
    q: Tensor,
    tensors: Sequence[Tensor | None],
    n_shifts: int,
    calls: Sequence[BranchCall],
    scale: float,
    kernel: str,
) -> UnionInputs:
    """Sort ``tensors`` into shifts, which are all there, and the tensors of the sources."""
    shifts = [x for x in tensors[:n_shifts] if x is not None]
    return UnionInputs(q, shifts, tensors[n_shifts:], calls, scale, kernel)


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        calls: tuple[BranchCall, ...],
        scale: float,
        kernel: str,
        n_shifts: int,
        q: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _inputs(q, tensors, n_shifts, calls, scale, kernel)
        result, lse = merge.forward(inputs, observer())
        ctx.save_for_backward(q, result, lse, *tensors)
        ctx.plan = calls, scale, kernel, n_shifts
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, out, lse, *tensors = ctx.saved_tensors
        calls, scale, kernel, n_shifts = ctx.plan
        inputs = _inputs(q, tensors, n_shifts, calls, scale, kernel)
        refuse_transforms(grad, grad_lse)
        again = torch.is_grad_enabled()  # somebody may differentiate the gradients, too
        if again and kernel == "dense":
            grads = differentiable_gradients(inputs, grad, grad_lse)
            return None, None, None, None, *grads
        with torch.no_grad():
            grads = merge.backward(inputs, out, lse, grad, grad_lse, ctx.needs_input_grad[5:])
        if again:
            grads = without_second(grads, (grad, grad_lse, q, *tensors), NO_SECOND)
        return None, None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise NotImplementedError(
            "forward-mode derivatives through attention kernels: there are none; use "
            "torch.autograd.grad, or differentiate the attention's oracle(q, k, v, mask)"
        )


def _compiled(
    q: Tensor,
    flat: Sequence[Tensor | None],
    calls: Sequence[BranchCall],
    shifts: Sequence[Tensor],
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Compute the union by an operator that a compiler does not look into."""
    present = [x is not None for x in flat]
    tensors = [q, *shifts, *(x for x in flat if x is not None)]
    plan = FlatPlan.of(calls, scale)
    out, lse = _union_op(tensors, plan.tensors, present, plan.integers, plan.floats, kernel)
    return out, lse


# An operator of PyTorch takes tensors, numbers and lists of them, no dataclass: so a plan is taken
# apart for the two below. ``tensors`` are q, the shifts and those tensors of the sources that are
# ``present``, all with gradients; ``fixed``, ``integers`` and ``floats`` are a FlatPlan.


def _unflatten(
    tensors: Sequence[Tensor], present: Sequence[bool], plan: FlatPlan, kernel: str
) -> UnionInputs:
    """Rebuild the inputs of a union from the operator's arguments."""
    n_shifts = len(tensors) - 1 - sum(present)
    rest = iter(tensors[1 + n_shifts :])
    flat = [next(rest) if there else None for there in present]
    return _inputs(
        tensors[0], [*tensors[1 : 1 + n_shifts], *flat], n_shifts, plan.calls(), plan.scale, kernel
    )


@torch.library.custom_op("danon::union", mutates_args=())
def _union_op(
    tensors: Sequence[Tensor],
    fixed: Sequence[Tensor],
    present: Sequence[bool],
    integers: Sequence[int],
    floats: Sequence[float],
    kernel: str,
) -> tuple[Tensor, Tensor]:
    plan = FlatPlan(list(fixed), list(integers), list(floats))
    return merge.forward(_unflatten(tensors, present, plan, kernel), None)


@_union_op.register_fake
def _(
    tensors: Sequence[Tensor],
    fixed: Sequence[Tensor],
    present: Sequence[bool],
    integers: Sequence[int],
    floats: Sequence[float],
    kernel: str,
) -> tuple[Tensor, Tensor]:
    q = tensors[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("danon::union_backward", mutates_args=())
def _union_backward_op(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    saved: Sequence[Tensor],
    need: Sequence[bool],
    present: Sequence[bool],
    integers: Sequence[int],
    floats: Sequence[float],
    kernel: str,
) -> list[Tensor]:
    out, lse, tensors, fixed = _saved(saved, need)
    inputs = _unflatten(tensors, present, FlatPlan(fixed, list(integers), list(floats)), kernel)
    rest = iter(need[1:])
    needs = [next(rest) for _ in inputs.shifts] + [there and next(rest) for there in present]
    grads = merge.backward(inputs, out, lse, grad, grad_lse, needs)
    result = []
    for needed, x in zip((need[0], *needs), grads, strict=True):
        if needed:
            assert x is not None
            result.append(x.contiguous())
    return result


@_union_backward_op.register_fake
def _(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    saved: Sequence[Tensor],
    need: Sequence[bool],
    present: Sequence[bool],
    integers: Sequence[int],
    floats: Sequence[float],
    kernel: str,
) -> list[Tensor]:
    _, _, tensors, _ = _saved(saved, need)
    return [x.new_empty(x.shape) for x, needed in zip(tensors, need, strict=True) if needed]


def _saved(
    saved: Sequence[Tensor], need: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Split what the forward pass saved: output, log-sum-exp, tensors, fixed tensors.

    Args:
        saved: all of them in one list.
        need: a bool for each of the tensors.
    """
    out, lse, *rest = saved
    return out, lse, rest[: len(need)], rest[len(need) :]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, fixed, *ctx.plan = inputs
    ctx.save_for_backward(*output, *tensors, *fixed)
    ctx.set_materialize_grads(False)


def _compiled_backward(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
) -> tuple[list[Tensor | None] | None, ...]:
    need = list(ctx.needs_input_grad[0])
    saved = list(ctx.saved_tensors)
    fixed = len(saved) - 2 - len(need)
    made = iter(_union_backward_op(grad, grad_lse, saved, need, *ctx.plan))
    grads = [next(made) if needed else None for needed in need]
    return grads, [None] * fixed, None, None, None, None


def _refuse_second(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(NO_SECOND)


_union_op.register_autograd(_compiled_backward, setup_context=_save)
_union_backward_op.register_autograd(_refuse_second)
