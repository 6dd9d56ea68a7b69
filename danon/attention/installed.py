"""Attentions that installed packages bring: the entry points ``danon.attentions``.

A package whose ``pyproject.toml`` says::

    [project.entry-points."danon.attentions"]
    mine = "my_package.attention:MyAttention"

adds ``mine`` to every suite. What cannot be loaded is left out and said, for it may be a package
that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

from danon.attention import registry
from danon.console.reasons import located
from danon.processes.interruption import Interruption
from danon.runs.entry_points import entry_points, package_of

__all__ = ["GROUP", "load_installed", "versions"]

GROUP = "danon.attentions"
_LOADED: dict[str, EntryPoint] = {}
"""Entry points behind names that this process has registered."""


def load_installed(load: Callable[[str, str], str] = registry.load) -> dict[str, str]:
    """Register the attentions of installed packages, each under the name of its entry point.

    Args:
        load: imports ``module:Class`` and registers the class under a name.

    Returns:
        Why an attention is left out, by its name.
    """
    left_out: dict[str, str] = {}
    for point in entry_points(GROUP):
        if point.name in _LOADED and point == _LOADED[point.name]:
            continue
        if reason := _refusal(point, load):
            which = f"attention {point.name!r} of the installed package {package_of(point)}"
            left_out[point.name] = f"{which} is left out: {reason}"
        else:
            _LOADED[point.name] = point
    return left_out


def versions() -> dict[str, str]:
    """Return the package, with its version, behind each attention that was loaded."""
    return {name: package_of(point) for name, point in _LOADED.items()}


def _refusal(point: EntryPoint, load: Callable[[str, str], str]) -> str:
    """Load an entry point; return why that is not possible, or nothing."""
    if point.name in registry.names():
        taken = registry.get(point.name)
        return f"the name is taken by {taken.__module__}.{taken.__qualname__}"
    try:
        load(f"{point.module}:{point.attr}", point.name)
    except Interruption:
        raise
    except BaseException as error:  # noqa: BLE001  importing it may raise anything
        registry.remove(point.name)  # it may be refused for what it does to the process
        return str(error) if isinstance(error, ValueError) else located(error)
    return ""
