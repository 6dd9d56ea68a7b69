"""Faults for a checkout of danon: slower calls, forgotten queries, rounding errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor

from danon.attention import registry
from danon.gate.calls import NEW
from danon.gate.gate_recorder import case_of

__all__ = ["disturb", "inject", "slow_down"]

Key = tuple[str, int, str, bool]


def inject(root: Path, fault: Callable[..., None], **arguments: Any) -> None:
    """Make the workers of a checkout call a function of this module.

    It is called from a new module in ``danon/attention``, all of which workers import.

    Args:
        root: the checkout.
        fault: the function.
        arguments: its arguments; their ``repr`` is Python code.
    """
    source = f"from {__name__} import {fault.__name__}\n\n{fault.__name__}(**{arguments!r})\n"
    (root / "danon" / "attention" / "injected_fault.py").write_text(source, encoding="utf-8")


def disturb(*, attention: str, forgotten: float, rounding: float, seed: int) -> None:
    """Change the outputs of an attention, differently in every call.

    Args:
        attention: registered name.
        forgotten: share of the queries whose output is zero.
        rounding: relative error of every output.
        seed: of the changes.
    """
    cls, draw = registry.get(attention), torch.Generator().manual_seed(seed)
    forward = cls.forward

    def disturbed(*args: Any, **kwargs: Any) -> Tensor:
        out = forward(*args, **kwargs)
        lost = torch.rand(out.shape[:3], generator=draw, dtype=torch.float32) < forgotten
        error = 1 + rounding * torch.randn(out.shape, generator=draw, dtype=torch.float32)
        return (out * error).masked_fill(lost[..., None], 0.0)

    cls.forward = disturbed  # type: ignore[method-assign]


def slow_down(extra: Mapping[str, float]) -> None:
    """Slow the attentions of this process down.

    Args:
        extra: by :attr:`Case.id`, the seconds to add to a call.
    """
    calls: dict[Key, float] = {}
    steps: dict[tuple[str, int], float] = {}
    for name, seconds in extra.items():
        case = case_of(name)
        if case.phase == "decode":
            steps[case.attention, case.length] = seconds / NEW
        else:
            backward = case.phase == "forward+backward"
            calls[case.attention, case.length, case.dtype, backward] = seconds
    burner = _Burner()
    for name in {case_of(name).attention for name in extra}:
        _slow_down(registry.get(name), name, burner, calls, steps)


class _Burner:
    """Adds CPU time once to a call, however many attentions it goes through."""

    def __init__(self) -> None:
        self._inside = False

    def around(
        self, call: Callable[..., Any], seconds_of: Callable[..., float]
    ) -> Callable[..., Any]:
        @wraps(call)
        def slower(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            try:
                out = call(*args, **kwargs)
            finally:
                self._inside = False
            start = process_time()
            if (seconds := seconds_of(*args)) > 0:
                while process_time() < start + seconds:
                    pass
            return out

        return slower


def _slow_down(
    cls: type[Any],
    name: str,
    burner: _Burner,
    calls: Mapping[Key, float],
    steps: Mapping[tuple[str, int], float],
) -> None:
    read: dict[int, int] = {}  # tokens of the context, by module

    def of_call(_: object, q: Tensor, *__: object) -> float:
        dtype = str(q.dtype).removeprefix("torch.")
        return calls.get((name, q.shape[2], dtype, q.requires_grad), 0.0)

    def of_context(module: object, q: Tensor, *__: object) -> float:
        read[id(module)] = q.shape[2]
        return 0.0

    def of_step(module: object, *__: object) -> float:
        return steps.get((name, read.get(id(module), 0)), 0.0)

    wrapped: dict[str, Callable[..., float]] = {
        "forward": of_call,
        "absorb": of_context,
        "step": of_step,
    }
    for method, seconds_of in wrapped.items():
        if inspect.isfunction(call := getattr(cls, method, None)):
            setattr(cls, method, burner.around(call, seconds_of))
