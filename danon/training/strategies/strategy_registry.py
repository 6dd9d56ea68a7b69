"""The strategies by name; every file of this folder registers one."""

from __future__ import annotations

import importlib
import pkgutil

from danon.training import strategies
from danon.training.strategies.base import REGISTERED, Strategy

__all__ = ["get", "names"]


def names() -> tuple[str, ...]:
    """Return the names of all strategies, also of those whose package is not installed."""
    for module in pkgutil.iter_modules(strategies.__path__, f"{strategies.__name__}."):
        if module.name != __name__:
            importlib.import_module(module.name)
    return tuple(sorted(REGISTERED))


def get(name: str) -> type[Strategy]:
    """Return a strategy.

    Args:
        name: registered name.

    Raises:
        ValueError: no strategy has that name; lists those there are.
    """
    known = names()
    if name not in known:
        raise ValueError(f"strategy = {name!r}: must be one of {', '.join(known)}")
    return REGISTERED[name]
