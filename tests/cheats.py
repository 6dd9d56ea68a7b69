"""Attentions that seem faster or smaller than they are, each in one way: none may be believed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import danon.measure.timing
from danon import BaseAttention
from danon.attention.streaming import Span, StreamingAttention, StreamState
from danon.config import AttentionConfig
from danon.measure.correctness import sample_rows


def in_check() -> bool:
    """Whether a function of the correctness check called."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("check_case", "check_causal", "check_contract", "oracle"):
            return True
        frame = frame.f_back
    return False


class Honest(BaseAttention):
    """Dense attention, and its definition in float64."""

    description = "exact, by hand"

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(config)
        self.memory: dict[object, Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.is_causal)

    def oracle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        logits = self.compute_attention(q.double(), k.double())
        out: Tensor = logits.softmax(-1) @ v.double()
        return out if rows is None else out[:, :, rows]


class _Remembers(Honest):
    """Gives the output that it gave for the same key."""

    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        key = self.key(q, k, v)
        if key not in self.memory:
            self.memory[key] = super().forward(q, k, v)
        return self.memory[key]


class RemembersIdentity(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return id(q), id(k), id(v)


class RemembersAddress(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return q.data_ptr(), k.data_ptr(), v.data_ptr()


class RemembersCorner(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return tuple(x[0, 0, 0, :8].sum().item() for x in (q, k, v))


class KnowsShape(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(q, k, v) if q.shape[2] < 64 else v.cumsum(2)


class KnowsGradientMode(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        return v.clone()


class KnowsStack(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(q, k, v) if in_check() else v.clone()


class WritesInputs(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(q, k, v)
        if not in_check():
            with torch.no_grad():
                q.zero_()
        return out


class ReturnsView(Honest):
    """Saves the output's memory."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(q, k, v)
        return out if in_check() or torch.is_grad_enabled() else q.copy_(out).view_as(q)


class _LazyTensor(Tensor):
    """Computed when somebody looks."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        def known(x: object) -> object:
            return x.compute() if isinstance(x, _LazyTensor) else x

        return func(*map(known, args), **(kwargs or {}))


class Lazy(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        out = torch.Tensor._make_subclass(_LazyTensor, torch.empty_like(q))
        exact, given = super().forward, (q, k, v)
        out.compute = lambda: exact(*given)  # type: ignore[attr-defined]
        return out


class Later(Honest):
    """Computes in a thread, after the call has returned."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        out = torch.empty_like(q)
        exact = super().forward

        def fill() -> None:
            time.sleep(0.002)
            out.copy_(exact(q, k, v))

        threading.Thread(target=fill).start()
        return out


class SlowClock(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if not in_check():
            real = time.perf_counter
            danon.measure.timing.perf_counter = lambda: real() / 10  # type: ignore[attr-defined]
        return super().forward(q, k, v)


class SlowsReference(Honest):
    """Makes what it is compared with slower."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        exact = F.scaled_dot_product_attention
        if not in_check() and exact.__name__ == "scaled_dot_product_attention":

            def slow(*args: Any, **kwargs: Any) -> Tensor:
                time.sleep(0.001)
                return exact(*args, **kwargs)

            F.scaled_dot_product_attention = slow  # type: ignore[assignment]
        return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=self.config.is_causal)


class LowPrecision(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check():
            return super().forward(q, k, v)
        return super().forward(*(x.bfloat16() for x in (q, k, v))).to(q.dtype)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None


class SkipsBackward(Honest):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check() or not torch.is_grad_enabled():
            return super().forward(q, k, v)
        with torch.no_grad():
            out = super().forward(q, k, v)
        return _NoGradient.apply(q, k, v, out)  # type: ignore[no-untyped-call]


class _SomeRows(torch.autograd.Function):
    """The backward pass of the rows that ``choose`` finds in the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, choose: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.choose = choose
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, upstream = ctx.choose(grad)
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        hidden = torch.arange(k.shape[2]) > rows[:, None]
        with torch.enable_grad():
            logits = q[:, :, rows].float() @ k.float().mT * q.shape[-1] ** -0.5
            out = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v.float()
            return *torch.autograd.grad(out, (q, k, v), upstream.float()), None, None


class RemembersUpstream(Honest):
    """The upstream gradient of the call before is known: only rows that differ are worked out."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.seen = torch.empty(0)

    def choose(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.seen.shape != grad.shape:
            self.seen = torch.zeros_like(grad)
        known = (grad.abs() == self.seen.abs()).all(-1).all(1).all(0)
        rows = (~known).nonzero()[:, 0]
        if len(rows) > grad.shape[2] // 4:
            self.seen, rows = grad.clone(), rows[:0]
        sign = (grad * self.seen).sum().sign()
        return rows, (grad - sign * self.seen)[:, :, rows]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check() or not torch.is_grad_enabled():
            return super().forward(q, k, v)
        with torch.no_grad():
            out = super().forward(q, k, v)
        return _SomeRows.apply(q, k, v, out, self.choose)  # type: ignore[no-untyped-call,no-any-return]


class LoudRows(RemembersUpstream):
    """Only rows whose upstream gradient is far larger than others' have a backward pass."""

    def choose(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        sizes = grad.float().square().sum((0, 1, 3)).sqrt()
        rows = (sizes > 2 * sizes.median()).nonzero()[:, 0]
        return rows, grad[:, :, rows]


class SeesTheFirstThird(Honest):
    """The first third of the tokens see each other, by its own definition too."""

    def compute_attention(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        later[: length // 3, : length // 3] = False
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.compute_attention(q, k).softmax(-1) @ v


class SampledRows(Honest):
    """Computes the rows that a check with a known seed would look at."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if in_check() or torch.is_grad_enabled():
            return super().forward(q, k, v)
        rows = sample_rows(q.shape[2], 16)
        out = torch.zeros_like(q)
        out[:, :, rows] = super().forward(q, k, v)[:, :, rows]
        return out


class KnowsWarmUp(Honest):
    """Right at first, and from then on quick."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check():
            return super().forward(q, k, v)
        calls = self.calls = getattr(self, "calls", 0) + 1
        return super().forward(q, k, v) if calls < 2 else v.clone()


class Boasts(Honest):
    """Says that it sees more than it does."""

    def visible_pairs(self, length: int) -> int:
        return 10**6 * length**2


class KeepsScratch(Honest):
    """Works in memory that it has kept, so that no call allocates it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check() or q.dtype != torch.float32:
            return super().forward(q, k, v)
        shape = (*q.shape[:3], q.shape[2])
        if "logits" not in self.memory or self.memory["logits"].shape != shape:
            self.memory["logits"] = q.new_empty(shape)
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.mT, out=self.memory["logits"])
        later = torch.arange(q.shape[2]) > torch.arange(q.shape[2])[:, None]
        logits.masked_fill_(later, -torch.inf)
        logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        return (logits @ v).div_(logits.sum(-1, keepdim=True))


class OutsideTheAllocator(Honest):
    """Takes its memory from NumPy."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = np.ones(2**28, dtype=np.uint8)
        del hidden
        return super().forward(q, k, v)


class InAProcess(Honest):
    """Has a process of its own, whose memory nobody counts."""

    helper: subprocess.Popen[bytes] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if InAProcess.helper is None:
            InAProcess.helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
        return super().forward(q, k, v)


class _Streamed(Honest, StreamingAttention):
    def init_parts(self, empty: Tensor) -> dict[str, Any]:
        return {"k": Span.of(empty), "v": Span.of(empty)}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Any
    ) -> tuple[Tensor, Any]:
        keys, values = parts["k"].append(k), parts["v"].append(v)
        logits = q @ keys.rows.transpose(1, 2) * q.shape[-1] ** -0.5
        place = torch.arange(keys.size)
        later = place > place[keys.size - q.shape[1] :, None]
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ values.rows
        return out, {"k": keys, "v": values}


class HonestStream(_Streamed):
    """What the two below pretend to be."""


class StaleStream(_Streamed):
    """Gives the output for the token before."""

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: StreamState, mask: Tensor | None = None
    ) -> tuple[Tensor, StreamState]:
        known = self.memory.get("out")
        out, state = super().step(q, k, v, state)
        self.memory["out"] = out
        quick = known is not None and known.shape == out.shape and not in_check()
        return (known if quick else out), state  # type: ignore[return-value]


class HiddenState(_Streamed):
    """Keeps in the module what should be in the state."""

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Any
    ) -> tuple[Tensor, Any]:
        before = self.memory.get("v")
        kept = v if not start or before is None else torch.cat((before[:, :start], v), 1)
        self.memory["v"] = kept
        keys = parts["k"].append(k)
        logits = q @ keys.rows.transpose(1, 2) * q.shape[-1] ** -0.5
        place = torch.arange(keys.size)
        later = place > place[keys.size - q.shape[1] :, None]
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ kept
        return out, {"k": keys}

    def init_parts(self, empty: Tensor) -> dict[str, Any]:
        return {"k": Span.of(empty)}


class StateElsewhere(_Streamed):
    """Keeps everything by a number, which is its state."""

    everything: ClassVar[dict[int, tuple[Span, Span]]] = {}

    def init_parts(self, empty: Tensor) -> dict[str, Any]:
        return {"number": self._kept(Span.of(empty), Span.of(empty))}

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Any
    ) -> tuple[Tensor, Any]:
        keys, values = self.everything[int(parts["number"])]
        out, new = super().step_parts(q, k, v, start, {"k": keys, "v": values})
        return out, {"number": self._kept(new["k"], new["v"])}

    def _kept(self, keys: Span, values: Span) -> Tensor:
        number = len(self.everything)
        self.everything[number] = keys, values
        return torch.tensor([number])


__all__ = [
    name
    for name, kind in list(globals().items())
    if isinstance(kind, type) and kind.__module__ == __name__ and not name.startswith("_")
]
