"""Which attentions take part, and whether a user's own keeps the contract."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

import torch

import danon.attention
from danon.attention import registry, variants
from danon.attention.base import BaseAttention
from danon.config import AttentionConfig
from danon.measure.case import Case
from danon.measure.correctness import check_causal
from suites.inputs import text_qkv
from suites.profiles import HEAD_DIM, HEADS

__all__ = [
    "REFERENCE",
    "build",
    "check_contract",
    "claims_causal",
    "configuration",
    "gather",
    "one_line",
    "shape_of",
]

REFERENCE = "sdpa"
_TINY = 48


def gather(targets: Iterable[str], only: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names to measure, the reference first, and those of them that the user brought.

    Args:
        targets: registered names, or ``file.py:Class`` / ``module:Class`` to add.
        only: registered names to keep; none keeps all. The reference and the user's own stay.

    Raises:
        ValueError: an unknown name, a target that cannot be loaded, or a file in results/tuned
            that is none of ``danon tune``; says why.
    """
    for module in pkgutil.iter_modules(danon.attention.__path__, "danon.attention."):
        importlib.import_module(module.name)
    importlib.import_module("baselines")
    own, named = [], []
    for target in targets:
        if ":" in target:
            own.append(registry.load(target))
        else:
            named.append(target)
    variants.register()  # of one's own, too
    for target in named:
        registry.get(target)
    wanted = list(only)
    for name in wanted:
        registry.get(name)
    kept = [n for n in registry.names() if not wanted or n in wanted or n in own]
    return (REFERENCE, *(n for n in kept if n != REFERENCE)), tuple(dict.fromkeys(own))


def shape_of(case: Case) -> AttentionConfig:
    """The configuration that a case is built with: made for the length it measures."""
    return AttentionConfig(
        hidden_size=case.heads * case.head_dim,
        num_heads=case.heads,
        causal=case.causal,
        max_sequence_length=max(case.length, 1),
    )


def build(case: Case) -> BaseAttention:
    """The attention of a case in evaluation mode; its parameters are float32 and the same always.

    An attention casts parameters to the dtype of q itself, as mixed-precision training does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = registry.get(case.attention).build(shape_of(case))
    return module.eval().to(case.device)


def configuration(
    attention: str, module: BaseAttention, entries: int | None = None
) -> dict[str, Any]:
    """Return every setting of a measured attention, for the record.

    The configuration of a baseline, or of a user's class, may hold none of its sizes. What a study
    chose for it, and the size it was asked for, stand beside it then: figures of one configuration
    can be told from those of another.

    Args:
        attention: registered name.
        module: that was measured.
        entries: that ``sized`` was asked for; None if it was built with its default settings.
    """
    kind = registry.get(attention)
    settings = {**variants.settings(kind), **module.config.to_dict()}
    resized = kind.sized.__func__ is not BaseAttention.sized.__func__ and not kind.tuned_for
    return {**settings, "entries": entries} if entries is not None and resized else settings


def claims_causal(module: BaseAttention) -> bool:
    """Whether no output may depend on a later token: configured so, and the class is able to."""
    return module.config.is_causal and module.causal_capable


def check_contract(name: str, dtypes: Iterable[str], device: str) -> None:
    """Run an attention on a few tokens before anything is measured.

    Raises:
        ValueError: what it broke, in one line: it raises; wrong shape or dtype; values that are
            not finite; its configuration is causal but the output depends on later tokens.
    """
    for dtype_name in dtypes:
        case = Case("contract", name, _TINY, dtype_name, "forward", device, 1, HEADS, HEAD_DIM)
        dtype = getattr(torch, dtype_name)
        place = torch.device(device)
        try:
            if registry.get(name).unavailable(
                shape_of(case), length=_TINY, dtype=dtype, device=place, backward=False
            ):
                continue
            module = build(case)
            q, k, v = (x.to(place, dtype) for x in text_qkv(1, HEADS, _TINY, HEAD_DIM))
            with torch.no_grad():
                out = module(q, k, v)
        except Exception as error:
            hint = ""
            if dtype != torch.float32:
                hint = "; parameters are float32: cast them to q.dtype in forward"
            raise ValueError(
                f"attention {name!r} raised on {_TINY} {dtype_name} tokens: {one_line(error)}{hint}"
            ) from error
        if not isinstance(out, torch.Tensor) or out.shape != q.shape or out.dtype != dtype:
            got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out)
            raise ValueError(
                f"attention {name!r} returned {got}: must be {tuple(q.shape)} {dtype}, like q"
            )
        if not bool(torch.isfinite(out).all()):
            raise ValueError(f"attention {name!r} returned values that are not finite")
        if getattr(module, "config", None) is None:
            raise ValueError(
                f"attention {name!r} has no config: its constructor must call "
                "self.setup_attention(config)"
            )
        if claims_causal(module) and (leak := check_causal(module, q, k, v)):
            raise ValueError(
                f"attention {name!r} was built with causal=True but is {leak}; if it cannot be "
                "causal, set its own config to causal=False and say so in semantics"
            )


def one_line(error: BaseException) -> str:
    """Type and message, on one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
