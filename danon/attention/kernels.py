"""The table of attention kernels that a union of branches can run on.

A kernel computes one branch and its log-sum-exp, and the branch's gradients from the *merged*
output and log-sum-exp. All are other people's kernels; ``dense`` is the readable reference.

Shapes: q (T, H, C, D), k and v (T, G, L, D), bias float (1|T, 1|H, 1|C, L) or None,
lse (T, H, C). T is a batch of tiles. ``causal`` is used with C == L only.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["HIDDEN", "Kernel", "available", "choose", "hide", "keeps_bias", "names"]

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
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        """Gradients of q, k, v, given the merged ``out`` and ``lse``."""


class Dense(Kernel):
    """Plain matrices, any device and dtype: the reference, and the only one for odd cases."""

    name, device = "dense", None
    dtypes = (torch.float64, torch.float32, *HALF)
    grouped = False

    @staticmethod
    def _logits(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
        s = (q @ k.transpose(-1, -2)).to(_accumulator(q.dtype)) * scale
        if bias is not None:
            s = s + bias
        if causal:
            later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
            s = s.masked_fill(later, HIDDEN)
        return s

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        s = self._logits(q, k, bias, causal, scale)
        lse = s.logsumexp(-1)
        return (s - lse[..., None]).exp().to(v.dtype) @ v, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        p = (self._logits(q, k, bias, causal, scale) - lse[..., None]).exp()
        delta = (grad * out).sum(-1, keepdim=True, dtype=p.dtype)
        ds = (p * ((grad @ v.transpose(-1, -2)).to(p.dtype) - delta) * scale).to(q.dtype)
        return ds @ k, ds.transpose(-1, -2) @ q, p.to(v.dtype).transpose(-1, -2) @ grad


class CPUFlash(Kernel):
    """PyTorch's native flash attention for CPUs."""

    name, device = "cpu-flash", "cpu"
    dtypes = (torch.float64, torch.float32, *HALF)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        # The kernel reads lse with the layout its own forward writes: heads innermost.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        return dq, dk, dv


class CUDAFlash(Kernel):
    """FlashAttention-2 as PyTorch ships it."""

    name, device = "cuda-flash", "cuda"
    head_dims = (8, 256)
    dtypes = HALF
    takes_bias = False
    grouped = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        unused = _no_dropout_state(q.device)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
            *unused, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class CUDAEfficient(Kernel):
    """Memory-efficient attention (CUTLASS) as PyTorch ships it; takes a bias."""

    name, device = "cuda-efficient", "cuda"
    rounds_bias = True
    head_dims = (8, 1 << 16)
    dtypes = (torch.float32, *HALF)
    grouped = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, _aligned(bias, q, k), True, 0.0, causal, scale=scale
        )
        return out, _hidden(lse[:, :, : q.shape[2]], q)  # rows are rounded up to 32

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        rows = -lse.shape[2] % 32
        lse = torch.nn.functional.pad(lse, (0, rows), value=torch.inf).contiguous()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, _aligned(bias, q, k), out, lse, *_no_dropout_state(q.device), 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class CUDACuDNN(Kernel):
    """cuDNN's fused attention as PyTorch ships it."""

    name, device = "cuda-cudnn", "cuda"
    head_dims = (8, 256)
    dtypes = HALF
    takes_bias = False
    grouped = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.view(q.shape[:3])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.contiguous()[..., None], *_no_dropout_state(q.device), None,
            None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


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


class FlashAttn(_Package):
    """The flash-attn package."""

    name, package = "flash-attn", "flash_attn"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward as run

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = run(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
        return out.transpose(1, 2), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward as run

        grad, q, k, v, out = (x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run(grad, q, k, v, out, lse.contiguous(), dq, dk, dv, 0.0, scale, causal, -1, -1, 0.0,
            None, False)  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class XFormers(_Package):
    """xformers' memory-efficient attention; takes a bias."""

    name, package = "xformers", "xformers"
    dtypes = (torch.float32, *HALF)
    takes_bias = rounds_bias = True
    grouped = False

    @staticmethod
    def _bias(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> object:
        if not causal:
            return _aligned(bias, q, k)
        from xformers.ops.fmha.attn_bias import (
            LowerTriangularMask,
            LowerTriangularMaskWithTensorBias,
        )

        if bias is None:
            return LowerTriangularMask()
        return LowerTriangularMaskWithTensorBias(_aligned(bias, q, k))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad as run

        made = self._bias(q, k, bias, causal)
        out, lse = run(*(x.transpose(1, 2) for x in (q, k, v)), made, 0.0, scale)
        return out.transpose(1, 2), _hidden(lse[:, :, : q.shape[2]], q)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        from xformers.ops.fmha import memory_efficient_attention_backward as run

        made = self._bias(q, k, bias, causal)
        grad, out, q, k, v = (x.transpose(1, 2) for x in (grad, out, q, k, v))
        dq, dk, dv = run(grad, out, lse, q, k, v, made, 0.0, scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Flex(Kernel):
    """FlexAttention; its backward is autograd's, fed with the branch's share of the merged result.

    CUDA only: on a CPU PyTorch's FlexAttention has no backward.
    """

    name, device = "flex", "cuda"
    dtypes = (torch.float32, *HALF)
    grouped = False

    @staticmethod
    def _run(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import AuxRequest

        full = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

        def score(s: Tensor, t: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if full is not None:
                s = s + full[t, h, i, j]
            return torch.where(j <= i, s, HIDDEN) if causal else s

        mod = score if causal or full is not None else None
        out, aux = _flex(compiled=q.is_cuda)(
            q, k, v, score_mod=mod, scale=scale, return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._run(q, k, v, bias, causal, scale)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        bias: Tensor | None, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        with torch.enable_grad():
            leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
            part, part_lse = self._run(leaves[0], leaves[1], leaves[2], bias, causal, scale)
        share = (part_lse.detach() - lse).exp()
        delta = (grad * out).sum(-1, dtype=share.dtype)
        d_lse = share * ((grad * part.detach()).sum(-1, dtype=share.dtype) - delta)
        d_part = (share[..., None] * grad).to(part.dtype)
        dq, dk, dv = torch.autograd.grad((part, part_lse), leaves, (d_part, d_lse))
        return dq, dk, dv


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as module

    plain: Callable[..., Any] = module.flex_attention
    return torch.compile(plain, dynamic=True) if compiled else plain


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


_TABLE: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        CPUFlash(), CUDAFlash(), CUDAEfficient(), CUDACuDNN(), FlashAttn(), XFormers(), Flex(),
        Dense(),
    )
}  # fmt: skip
_AUTO = ("cpu-flash", "cuda-flash", "cuda-efficient", "dense")


def names() -> tuple[str, ...]:
    """Every kernel, whether it can run here or not."""
    return tuple(_TABLE)


def available() -> dict[str, str | None]:
    """Kernel name -> None if it can run on this machine, else the reason why not."""
    return {name: kernel.missing() for name, kernel in _TABLE.items()}


@functools.lru_cache(maxsize=256)
def choose(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, bias: bool
) -> Kernel:
    """The kernel for a call.

    Args:
        name: a kernel, or ``auto``: the first of cpu-flash, cuda-flash, cuda-efficient, dense that
            takes this device, dtype, head dimension and bias. So float64 on CUDA is dense; a biased
            branch on CUDA is cuda-efficient.

    Raises:
        ValueError: an unknown name, or a kernel that cannot run this call; nothing else is tried.
    """
    if name == "auto":
        for candidate in _AUTO:
            if _TABLE[candidate].refuses(device, dtype, head_dim, bias) is None:
                return _TABLE[candidate]
    if name not in _TABLE:
        raise ValueError(f"unknown kernel {name!r}; known: auto, {', '.join(_TABLE)}")
    if reason := _TABLE[name].refuses(device, dtype, head_dim, bias):
        able = [n for n, k in _TABLE.items() if k.refuses(device, dtype, head_dim, bias) is None]
        raise ValueError(
            f"kernel {name!r} cannot run this call: {reason}; these can: {', '.join(able)}"
        )
    return _TABLE[name]


def keeps_bias(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel for a call takes a logit bias and adds it in float32 or wider."""
    if name in _TABLE and _TABLE[name].refuses(device, dtype, head_dim, True) is not None:
        return False
    return not choose(name, device, dtype, head_dim, True).rounds_bias or dtype not in HALF
