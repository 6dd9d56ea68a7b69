"""The attentions that take part: danon's, those of installed packages, and those of the user."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable

import danon.attention
from danon.attention import installed, registry, tuned_variants
from danon.attention.registry import REFERENCE
from danon.console.reasons import located
from danon.processes.interruption import Interruption

__all__ = ["discover"]

_log = logging.getLogger(__name__)


def discover(
    targets: Iterable[str],
    only: Iterable[str],
    load: Callable[..., str] = registry.load,
    note: Callable[[str], object] = _log.warning,
    default: Iterable[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names to measure, the reference first, and those of them that the user brought.

    Args:
        targets: registered names, or ``file.py:Class`` / ``module:Class`` to add.
        only: registered names to keep; none keeps all. The reference and the user's own stay.
        load: makes an attention of a target; of an installed package's also takes its name.
        note: hears why an attention of an installed package is left out.
        default: registered names to keep where ``only`` is empty, beside those of the targets, of
            installed packages, and settings tuned for the user's own. Empty: all names.

    Raises:
        ValueError: an unknown name, a target that cannot be loaded, an installed package's
            attention that is asked for and cannot be loaded, two of one name, or a file in
            results/tuned that is none of ``danon tune``; says why.
    """
    for module in pkgutil.iter_modules(danon.attention.__path__, "danon.attention."):
        importlib.import_module(module.name)
    importlib.import_module("baselines")
    brought: dict[str, str] = {}
    named = []
    for target in targets:
        if ":" not in target:
            named.append(target)
            continue
        name = target.rpartition(":")[2]
        if brought.get(name) == target:
            raise ValueError(f"attention {target!r} is given twice")
        if name in brought:
            raise ValueError(
                f"attentions {brought[name]!r} and {target!r} are both called {name!r}: "
                "rename a class"
            )
        brought[_loaded(target, load)] = target
    left_out = installed.load_installed(load)  # the user's own first: their names are typed
    tuned_variants.register()  # of one's own, too
    selected = list(only)
    for name in (*named, *selected):
        if name in left_out and name not in registry.names():
            raise ValueError(left_out[name])
        registry.get(name)
    for reason in left_out.values():
        note(reason)
    if not selected and (selected := list(default)):
        selected += (*named, *installed.versions())
        tuned = (n for n in registry.names() if n.startswith(tuple(f"{own}-" for own in brought)))
        selected += tuned
    kept = [n for n in registry.names() if not selected or n in selected or n in brought]
    return (REFERENCE, *(n for n in kept if n != REFERENCE)), tuple(brought)


def _loaded(target: str, load: Callable[[str], str]) -> str:
    """Load a target; its module may raise anything while it is imported."""
    try:
        return load(target)
    except (ValueError, Interruption):
        raise
    except BaseException as error:
        raise ValueError(f"attention {target!r} does not import: {located(error)}") from error
