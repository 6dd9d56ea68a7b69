"""Selection of the suites to run: all, those named, and those in files of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

from danon.attention import registry
from danon.bench import suite as suites
from danon.bench.suite import Suite
from danon.processes.suite_modules import comes_with_danon, import_suites

__all__ = ["select_suites"]


def select_suites(
    chosen: Iterable[str], note: Callable[[str], object], default: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the names of the suites to run, in the order of listing.

    Args:
        chosen: names, or ``file.py:Class`` / ``module:Class`` of a suite, or ``file.py:function``
            of an extra metric, which selects its suite. Empty: the default.
        note: function that takes the reason why a suite of an installed package is left out.
        default: names of suites; those of installed packages run beside them. Empty: all suites.

    Raises:
        ValueError: a name is unknown or of a suite that is left out, or a target cannot be loaded.
    """
    left_out = import_suites()
    selected = {_load(target) if ":" in target else _named(target, left_out) for target in chosen}
    for reason in left_out.values():
        note(reason)
    if not selected and (selected := set(default)):
        selected |= {n for n in suites.names() if not comes_with_danon(suites.get(n))}
    return tuple(name for name in suites.names() if not selected or name in selected)


def _named(name: str, left_out: Mapping[str, str]) -> str:
    """Return the name of a registered suite."""
    if name in left_out and name not in suites.names():
        raise ValueError(left_out[name])
    return suites.get(name).name


def _load(target: str) -> str:
    """Import a target, and return the name of its suite or of the suite of its metric."""
    module, attribute = registry.import_target(target, "suite")
    value = getattr(module, attribute, None)
    if inspect.isclass(value) and issubclass(value, Suite):
        return suites.register(value).name
    belongs_to = getattr(value, "suite", None)
    if isinstance(belongs_to, str):
        return belongs_to
    raise ValueError(
        f"suite {target!r}: {attribute} is neither a danon.bench.suite.Suite nor a function below "
        "@extra_metric"
    )
