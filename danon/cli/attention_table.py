"""The attentions that commands list: danon's, the baselines, those of installed packages."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

from danon import tuned
from danon.attention import discovery, registry
from danon.attention.base import BaseAttention
from danon.processes.interpreter import bundle

__all__ = ["load_attentions", "without_library_logs"]


@contextlib.contextmanager
def without_library_logs() -> Iterator[None]:
    """Keep the warnings of other packages about themselves out of a listing.

    The listing gives the reason for whatever cannot be used.
    """
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def load_attentions(note: Callable[[str], object]) -> dict[str, type[BaseAttention]]:
    """Return all attentions by name, without those that only have tuned settings.

    Args:
        note: hears why an attention of an installed package is left out.
    """
    if str(bundle()) not in sys.path:
        sys.path.insert(0, str(bundle()))
    discovery.discover((), (), note=note)
    return {name: registry.get(name) for name in registry.names() if tuned.known_row(name) is None}
