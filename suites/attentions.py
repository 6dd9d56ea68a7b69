"""Which attentions take part, and whether a user's own keeps the contract."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import torch

import danon.attention
from danon.attention import registry, variants
from danon.attention.base import BaseAttention
from danon.config import AttentionConfig
from danon.measure.case import Case
from danon.measure.correctness import check_causal
from suites.inputs import text_qkv
from suites.interruption import Interruption
from suites.profiles import HEAD_DIM, HEADS
from suites.reasons import located, one_line

__all__ = [
    "REFERENCE",
    "build",
    "check_contract",
    "claims_causal",
    "configuration",
    "gather",
    "one_line",
    "oracle_kind",
    "shape_of",
]

REFERENCE = "sdpa"
_TINY = 48


def gather(
    targets: Iterable[str], only: Iterable[str], load: Callable[[str], str] = registry.load
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names to measure, the reference first, and those of them that the user brought.

    Args:
        targets: registered names, or ``file.py:Class`` / ``module:Class`` to add.
        only: registered names to keep; none keeps all. The reference and the user's own stay.
        load: makes an attention of a target.

    Raises:
        ValueError: an unknown name, a target that cannot be loaded, two of one name, or a file in
            results/tuned that is none of ``danon tune``; says why.
    """
    for module in pkgutil.iter_modules(danon.attention.__path__, "danon.attention."):
        importlib.import_module(module.name)
    importlib.import_module("baselines")
    own: dict[str, str] = {}
    named = []
    for target in targets:
        if ":" not in target:
            named.append(target)
            continue
        name = target.rpartition(":")[2]
        if own.get(name) == target:
            raise ValueError(f"attention {target!r} is given twice")
        if name in own:
            raise ValueError(
                f"attentions {own[name]!r} and {target!r} are both called {name!r}: rename a class"
            )
        own[_loaded(target, load)] = target
    variants.register()  # of one's own, too
    for target in named:
        registry.get(target)
    wanted = list(only)
    for name in wanted:
        registry.get(name)
    kept = [n for n in registry.names() if not wanted or n in wanted or n in own]
    return (REFERENCE, *(n for n in kept if n != REFERENCE)), tuple(own)


def _loaded(target: str, load: Callable[[str], str]) -> str:
    """The name of a target; its module may raise anything while it is imported."""
    try:
        return load(target)
    except (ValueError, Interruption):
        raise
    except BaseException as error:
        raise ValueError(f"attention {target!r} does not import: {located(error)}") from error


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


def oracle_kind(module: BaseAttention) -> str:
    """What the oracle is: a class that has one of its own need not say that it is a definition.

    One that has none cannot say so.
    """
    if type(module).oracle is BaseAttention.oracle:
        return BaseAttention.oracle_kind
    stated = module.oracle_kind
    return "definition" if stated == BaseAttention.oracle_kind else stated


def check_contract(name: str, dtypes: Iterable[str], device: str) -> None:
    """Run an attention on a few tokens before anything is measured.

    Raises:
        ValueError: what it broke, in one line: it raises; wrong shape or dtype; values that are
            not finite; its configuration is causal but the output depends on later tokens.
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
    """What an attention breaks of the contract; empty if nothing. Raises whatever it raises."""
    dtype, place = getattr(torch, case.dtype), torch.device(case.device)
    if registry.get(case.attention).unavailable(
        shape_of(case), length=_TINY, dtype=dtype, device=place, backward=False
    ):
        return ""
    module = build(case)
    q, k, v = (x.to(place, dtype) for x in text_qkv(1, HEADS, _TINY, HEAD_DIM))
    with torch.no_grad():
        out = module(q, k, v)
    if not isinstance(out, torch.Tensor) or out.shape != q.shape or out.dtype != dtype:
        got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out)
        return f"returned {got}: must be {tuple(q.shape)} {dtype}, like q"
    if not bool(torch.isfinite(out).all()):
        return "returned values that are not finite"
    if getattr(module, "config", None) is None:
        return "has no config: its constructor must call self.setup_attention(config)"
    for said in (type(module).semantics, module.semantics):
        if not isinstance(said, str):
            return f"has semantics = {said!r}: must be a str"
    if claims_causal(module) and (leak := check_causal(module, q, k, v)):
        return (
            f"was built with causal=True but is {leak}; if it cannot be causal, set its own "
            "config to causal=False and say so in semantics"
        )
    return ""
