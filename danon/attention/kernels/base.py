"""The interface of a kernel, and helpers that several kernels share."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["HIDDEN", "Kernel", "SavedForward", "hide", "register"]

HIDDEN = -1e30
"""Bias of an entry that must not be seen: finite, so that no kernel meets inf - inf."""


def hide(seen: Tensor) -> Tensor:
    """Return the bias that hides what is not seen: float32 zeros and HIDDEN, shaped like ``seen``.

    From two numbers ``torch.where`` makes the default dtype, in which HIDDEN may be -inf.
    """
    zero = torch.zeros((), dtype=torch.float32, device=seen.device)
    return torch.where(seen, zero, HIDDEN)


aten = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class SavedForward:
    """A call of a kernel, with the result that its gradients are computed from.

    ``out`` and ``lse`` are of the whole union, not of this call alone: they make the softmax of the
    call a part of the one over all branches.

    Attributes:
        q: queries (T, H, C, D).
        k: keys (T, G, L, D).
        v: values (T, G, L, D).
        out: merged output (T, H, C, D).
        lse: merged natural log-sum-exp (T, H, C), less the offset and shift of the call.
        bias: logit bias (1|T, 1|H, 1|C, L) or None.
        causal: query c sees keys up to c only; C == L.
        scale: factor of q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    bias: Tensor | None
    causal: bool
    scale: float


class Kernel(ABC):
    """A backend that computes one branch of a union, and the branch's gradients.

    A subclass defines :meth:`forward` and :meth:`backward` and states in attributes what it takes.
    Decorated with :func:`register` in a file of this folder it is found by name.

    Attributes:
        name: the name in a configuration's ``kernel``.
        device: device type it runs on; None: any.
        dtypes: dtypes of q, k and v that it takes.
        takes_bias: True if it takes a logit bias.
        rounds_bias: True if a logit bias is rounded to the dtype of q.
        grouped: True if k and v may have fewer heads than q; if not, the union repeats them.
        head_dims: (multiple, most) of the head dimension D.
    """

    name: ClassVar[str]
    device: ClassVar[str | None]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    takes_bias: ClassVar[bool] = True
    rounds_bias: ClassVar[bool] = False
    grouped: ClassVar[bool] = True
    head_dims: ClassVar[tuple[int, int]] = (1, 1 << 16)

    def missing(self) -> str | None:
        """Return why this kernel cannot run on this machine at all, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def refuses(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, bias: bool
    ) -> str | None:
        """Return why this kernel cannot run a call, or None.

        Args:
            device: of q, k and v.
            dtype: of q, k and v.
            head_dim: D.
            bias: True if the call has a logit bias.
        """
        if reason := self.missing():
            return reason
        if self.device is not None and device.type != self.device:
            return f"runs on {self.device}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        if bias and not self.takes_bias:
            return "takes no logit bias"
        multiple, most = self.head_dims
        if head_dim % multiple or head_dim > most:
            return f"takes head dimensions up to {most} in steps of {multiple}, not {head_dim}"
        return None

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one branch.

        Args:
            q: queries (T, H, C, D).
            k: keys (T, G, L, D).
            v: values (T, G, L, D).
            bias: logit bias (1|T, 1|H, 1|C, L) or None.
            causal: query c sees keys up to c only; C == L.
            scale: factor of q.k.

        Returns:
            Output (T, H, C, D) like q, and natural log-sum-exp (T, H, C) float32 or wider.
        """

    @abstractmethod
    def backward(self, grad: Tensor, saved: SavedForward) -> Grads:
        """Compute gradients of q, k and v.

        Args:
            grad: gradient of the merged output (T, H, C, D).
            saved: the call and the merged result.

        Returns:
            Gradients, shaped like q, k and v.
        """


REGISTERED: dict[str, Kernel] = {}
"""Kernels by name, in the order of their files."""
_K = TypeVar("_K", bound=type[Kernel])


def register(kernel: _K) -> _K:
    """Register a kernel class under its ``name``; a class decorator.

    Args:
        kernel: the class; built without arguments.

    Returns:
        The class itself.

    Raises:
        ValueError: another kernel has the name.
    """
    if kernel.name in REGISTERED:
        raise ValueError(f"kernel {kernel.name!r} is registered already")
    REGISTERED[kernel.name] = kernel()
    return kernel


class _Package(Kernel):
    """A kernel from an optional package."""

    device = "cuda"
    head_dims = (8, 256)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF
    takes_bias = False
    package: ClassVar[str]

    def missing(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return f"package {self.package} is not installed (pip install danon[cuda])"
        return super().missing()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the bias as CUTLASS wants it: dtype of q, full size, rows from 16 elements on."""
    if bias is None:
        return None
    T, H, C, _ = q.shape
    L = k.shape[2]
    full = torch.empty(T, H, C, L + -L % 16, dtype=q.dtype, device=q.device)[..., :L]
    return full.copy_(bias.clamp_min(torch.finfo(q.dtype).min / 2))


def _hidden(lse: Tensor, q: Tensor) -> Tensor:
    """Restore HIDDEN where the clamped bias of :func:`_aligned` left a row without an entry."""
    return lse.masked_fill(lse < torch.finfo(q.dtype).min / 4, HIDDEN)


def _no_dropout_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return seed and offset of a dropout that does not happen."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return zero, zero
