"""An attention built for one case, with its inputs and the calls that instruments make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from danon.attention.base import BaseAttention
from danon.bench.shapes import build_for, oracle_kind
from danon.data.qkv import Triple, text_qkv
from danon.measure.correctness import Oracle, Subject
from danon.runs.case import Case

__all__ = ["Workload"]


class Workload:
    """An attention built for one case, and its inputs.

    Example:
        ``Workload(case).call()()`` runs a forward pass of the case's attention.

    Args:
        case: attention, length in tokens, dtype, phase, device and shape.
        module: the attention to call; None: the one built for the case.

    Attributes:
        case: the case.
        device: torch device of the case.
        module: the attention, in evaluation mode.
        parameters: trained parameters by name.
        q: queries (B, H, N, D), in the dtype and on the device of the case; so are k and v.
    """

    def __init__(self, case: Case, module: BaseAttention | None = None) -> None:
        self.case = case
        self.device = torch.device(case.device)
        self.module = build_for(case) if module is None else module
        self.parameters = _trained(self.module)
        dtype = getattr(torch, case.dtype)
        self.q, self.k, self.v = _inputs(
            case.batch, case.heads, case.length, case.head_dim, dtype, self.device
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output of the attention, (B, H, N, D).

        Args:
            q: queries (B, H, N, D).
            k: keys (B, H, N, D).
            v: values (B, H, N, D).
        """
        out: Tensor = self.module(q, k, v)
        return out

    def call(self) -> Callable[[], object]:
        """Return the call to time: forward, or forward and backward to q, k, v and parameters."""
        if self.case.phase == "forward":
            return self._forward
        inputs = self.leaves()
        wrt = [*inputs, *self.parameters.values()]
        grad = torch.randn(self.q.shape, generator=torch.Generator().manual_seed(0)).to(self.q)

        def both() -> object:
            return torch.autograd.grad(self.attend(*inputs), wrt, grad, allow_unused=True)

        return both

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as leaves that require gradients."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v

    def subject(self) -> Subject:
        """Return the attention beside its oracle, for the correctness check."""
        module = self.module
        if type(module).oracle is BaseAttention.oracle:
            # The default oracle is a float64 copy; this one exposes its parameters.
            exact = copy.deepcopy(module).double()

            def oracle(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
                out: Tensor = exact(q.double(), k.double(), v.double())
                return out[:, :, rows]

            oracle_parameters = _trained(exact)
        else:

            def oracle(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
                return module.oracle(q, k, v, None, rows)

            oracle_parameters = self.parameters

        margin: Callable[..., Tensor] | None = getattr(module, "undecided_rows", None)
        undecided = None if margin is None else _without_mask(margin)
        return Subject(
            self.attend, oracle, oracle_kind(module), self.parameters, oracle_parameters, undecided
        )

    def _forward(self) -> object:
        with torch.no_grad():
            return self.attend(self.q, self.k, self.v)


def _without_mask(margin: Callable[..., Tensor]) -> Oracle:
    return lambda q, k, v, rows: margin(q, k, v, None, rows)


def _trained(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@lru_cache(maxsize=1)
def _inputs(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Triple:
    q, k, v = (x.to(device, dtype) for x in text_qkv(batch, heads, length, head_dim))
    return q, k, v
