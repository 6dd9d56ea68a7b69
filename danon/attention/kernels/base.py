"""What a kernel has to offer, and what several of them need."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["HIDDEN", "Kernel", "hide", "register"]

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


class Kernel(ABC):
    name: ClassVar[str]
    device: ClassVar[str | None]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    takes_bias: ClassVar[bool] = True
    rounds_bias: ClassVar[bool] = False
    """Whether a logit bias is rounded to the dtype of q."""
    grouped: ClassVar[bool] = True
    """Whether k and v may have fewer heads than q; if not, the union repeats them."""
    head_dims: ClassVar[tuple[int, int]] = (1, 1 << 16)
    """The head dimension is a multiple of the first and at most the second."""

    def missing(self) -> str | None:
        """Why this kernel cannot run on this machine at all, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def refuses(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, bias: bool
    ) -> str | None:
        """Why this kernel cannot run this call, or None."""
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
        """Returns (output like q, natural log-sum-exp (T, H, C) float)."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Grads:
        """Gradients of q, k, v, given the merged ``out`` and ``lse``."""


REGISTERED: dict[str, Kernel] = {}
"""Kernels by name, in the order of their files."""
_K = TypeVar("_K", bound=type[Kernel])


def register(kind: _K) -> _K:
    """Class decorator: make a kernel one that a configuration can name.

    Raises:
        ValueError: another kernel has the name.
    """
    if kind.name in REGISTERED:
        raise ValueError(f"kernel {kind.name!r} is registered already")
    REGISTERED[kind.name] = kind()
    return kind


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
    """The bias as CUTLASS wants it: dtype of q, full size, rows that start on 16 elements."""
    if bias is None:
        return None
    T, H, C, _ = q.shape
    L = k.shape[2]
    full = torch.empty(T, H, C, L + -L % 16, dtype=q.dtype, device=q.device)[..., :L]
    return full.copy_(bias.clamp_min(torch.finfo(q.dtype).min / 2))


def _hidden(lse: Tensor, q: Tensor) -> Tensor:
    """HIDDEN again where the clamped bias of :func:`_aligned` left a row without an entry."""
    return lse.masked_fill(lse < torch.finfo(q.dtype).min / 4, HIDDEN)


def _no_dropout_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed and offset of a dropout that does not happen."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return zero, zero
