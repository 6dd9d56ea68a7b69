"""Which attentions take part: registered ones, and those of the user."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable

import danon.attention
from danon.attention import registry, tuned_variants
from danon.attention.registry import REFERENCE
from danon.console.reasons import located
from danon.processes.interruption import Interruption

__all__ = ["discover"]


def discover(
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
    tuned_variants.register()  # of one's own, too
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
