"""The attentions that commands list: danon's, the baselines, those of installed packages."""

from __future__ import annotations

import sys
from collections.abc import Callable

from danon import tuned
from danon.attention import discovery, registry
from danon.attention.base import BaseAttention
from danon.processes.interpreter import bundle

__all__ = ["load_attentions"]


def load_attentions(
    note: Callable[[str], object], *, with_tuned: bool = False
) -> dict[str, type[BaseAttention]]:
    """Return all attentions by name, in the order of registration.

    Args:
        note: hears why an attention of an installed package is left out.
        with_tuned: include settings that studies found, such as ``msra-balanced``.
    """
    if str(bundle()) not in sys.path:
        sys.path.insert(0, str(bundle()))
    discovery.discover((), (), note=note)
    return {
        name: registry.get(name)
        for name in registry.names()
        if with_tuned or tuned.known_row(name) is None
    }
