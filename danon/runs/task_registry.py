"""The one table of tasks: a task registered here has a title in every table and message.

Example:
    >>> from danon.runs import task_registry
    >>> task_registry.find("recall", "mqar").title
    'multi-query associative recall (Arora et al. 2023)'

Readers of recorded runs need titles without torch, so the table lies below the tasks.
It imports what registers in it by name, as it does with installed packages.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from danon.runs.entry_points import entry_points, package_of

__all__ = ["GROUP", "TaskRecord", "discover", "find", "names", "records", "register"]

GROUP = "danon.tasks"
"""Group of entry points by which an installed package adds tasks."""
BUILT_IN = ("danon.data.tasks", "danon.data.corpora", "danon.data.passkey")
"""Packages and modules of ours that register tasks; none of them imports torch for it."""

_log = logging.getLogger(__name__)
_TABLE: dict[tuple[str, str], TaskRecord] = {}


@dataclass(frozen=True)
class TaskRecord:
    """One task, as tables and messages name it.

    Attributes:
        suite: the suite whose cases have this task: ``recall``, ``language`` or ``pretrained``.
        name: the task in a case.
        title: a few words for tables, with the paper.
        question: what an example asks, in a sentence.
        factory: class that draws examples; None where the suite reads text.
    """

    suite: str
    name: str
    title: str
    question: str = ""
    factory: type | None = None


def register(record: TaskRecord) -> None:
    """Add a task to the table.

    Args:
        record: replaces the record of the same class that was imported again.

    Raises:
        ValueError: another task has the name.
    """
    registered = _TABLE.get((record.suite, record.name))
    if registered is not None and _origin(registered) != _origin(record):
        raise ValueError(
            f"task {record.name!r} of {record.suite} is already registered: {_origin(registered)}; "
            f"give {_origin(record)} another name"
        )
    _TABLE[record.suite, record.name] = record


def find(suite: str, name: str) -> TaskRecord | None:
    """Return the record of a task; None if nothing that is installed has it.

    Args:
        suite: suite of the case.
        name: task of the case.
    """
    if (suite, name) not in _TABLE:
        discover()
    return _TABLE.get((suite, name))


def records(suite: str | None = None) -> tuple[TaskRecord, ...]:
    """Return the records of a suite in order of registration.

    Args:
        suite: name of the suite; None for all suites.
    """
    discover()
    return tuple(record for record in _TABLE.values() if suite in (None, record.suite))


def names(suite: str | None = None) -> tuple[str, ...]:
    """Return the names of the tasks of a suite, sorted.

    Args:
        suite: name of the suite; None for all suites.
    """
    return tuple(sorted({record.name for record in records(suite)}))


@cache
def discover() -> None:
    """Import the tasks that come with danon, then those of installed packages, once.

    A package whose entry point fails is named in a warning, and the other tasks stay usable.
    """
    for module in _built_in():
        importlib.import_module(module)
    for point in entry_points(GROUP):
        package = package_of(point)
        try:
            point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001  foreign code may raise anything
            reason = f"{type(error).__name__}: {error}"
            _log.warning("task %r of %s does not load: %s", point.name, package, reason)
            continue
        if point.name not in {record.name for record in _TABLE.values()}:
            _log.warning("task %r of %s: %s registers no such task", point.name, package, point)


def _built_in() -> Iterator[str]:
    for name in BUILT_IN:
        yield name
        module = importlib.import_module(name)
        for part in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
            yield part.name


def _origin(record: TaskRecord) -> str:
    """Return what tells a task from another one, and not from itself imported again."""
    if record.factory is None:
        return repr(record.title)
    return f"{record.factory.__module__}.{record.factory.__qualname__}"
