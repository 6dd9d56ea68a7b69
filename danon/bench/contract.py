"""The contract of an attention, checked on a few tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from danon.attention import registry
from danon.bench.shapes import HEAD_DIM, HEADS, build_for, claims_causal, config_for
from danon.console.reasons import located
from danon.data.qkv import text_qkv
from danon.measure.causality import check_causal
from danon.processes.interruption import Interruption
from danon.runs.case import Case

__all__ = ["check_contract"]

_TINY = 48


def check_contract(name: str, dtypes: Iterable[str], device: str) -> None:
    """Run an attention on a few tokens before anything is measured.

    Args:
        name: registered name.
        dtypes: names of torch dtypes.
        device: cpu or cuda.

    Raises:
        ValueError: the attention raises, returns a wrong shape or dtype or values that are not
            finite, or depends on later tokens although its configuration is causal.
    """
    for dtype in dtypes:
        case = Case("contract", name, _TINY, dtype, "forward", device, 1, HEADS, HEAD_DIM)
        try:
            breach = _breach(case)
        except Interruption:
            raise
        except BaseException as error:
            hint = "; parameters are float32: cast them to q.dtype in forward"
            raise ValueError(
                f"attention {name!r} raised on {_TINY} {dtype} tokens: "
                f"{located(error, registry.get(name))}{'' if dtype == 'float32' else hint}"
            ) from error
        if breach:
            raise ValueError(f"attention {name!r} {breach}")


def _breach(case: Case) -> str:
    """Return the broken part of the contract, or empty; pass on what the attention raises."""
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    if registry.get(case.attention).unavailable(
        config_for(case), length=_TINY, dtype=dtype, device=device, backward=False
    ):
        return ""
    module = build_for(case)
    q, k, v = (x.to(device, dtype) for x in text_qkv(1, HEADS, _TINY, HEAD_DIM))
    with torch.no_grad():
        out = module(q, k, v)
    if not isinstance(out, torch.Tensor) or out.shape != q.shape or out.dtype != dtype:
        got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out)
        return f"returned {got}: must be {tuple(q.shape)} {dtype}, like q"
    if not bool(torch.isfinite(out).all()):
        return "returned values that are not finite"
    if getattr(module, "config", None) is None:
        return "has no config: its constructor must call self.setup_attention(config)"
    descriptions: tuple[object, ...] = (type(module).description, module.description)
    for description in descriptions:
        if not isinstance(description, str):
            return f"has description = {description!r}: must be a str"
    if claims_causal(module) and (leak := check_causal(module, q, k, v)):
        return (
            f"was built with causal=True but is {leak}; if it cannot be causal, set its own "
            "config to causal=False and say so in description"
        )
    return ""
