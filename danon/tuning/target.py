"""Kinds of study: the class that each one subclasses, and the registry behind ``--kind``.

A kind of study is one file. Danon's own are the modules of :mod:`danon.tuning.targets`; an
installed package names its module in the entry point group ``danon.studies``. The file's name, or
the entry point's, is the name of the kind. A module is imported when its kind is used; listing the
names imports none.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, TypeVar

from danon.console.reasons import located
from danon.runs.entry_points import entry_points, package_of
from danon.tuned.search_space import Space
from danon.tuning import targets

__all__ = ["GROUP", "TuningTarget", "get", "names", "own_names", "register", "unusable"]

GROUP = "danon.studies"
"""Entry point group of the kinds that installed packages add."""


class TuningTarget(ABC):
    """One kind of study: the space to search, and the figures of a choice.

    A choice is one value for each range of the space. Every figure is measured beside the default
    choice, in the same process.

    Args:
        attention: registered name of the attention.
        length: tokens of a sequence.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: the attention has nothing to tune, or cannot run here; says why.

    Attributes:
        description: what is chosen, in a phrase.
        reference: what a choice is measured beside, in a phrase.
        error_meaning: what the figure ``error`` counts, in a phrase.
        objectives: the objectives that the figures cover, of
            :data:`danon.tuning.objective.FIGURES`.
        default_length: tokens of a sequence where the user names none.
        default_dtype: type of the numbers where the user names none.
        space: the ranges, and the default choice.
        starts: choices to measure first, after the default.

    Example:
        A file ``batch.py`` in :mod:`danon.tuning.targets` is ``danon tune --kind batch``::

            from danon.tuned.search_space import Categorical, Space
            from danon.tuning.target import TuningTarget, register


            @register("batch")
            class BatchTarget(TuningTarget):
                description = "sequences in a batch"
                reference = "one sequence"
                error_meaning = "none"
                objectives = ("speed", "memory")

                def __init__(self, attention, length, dtype, device):
                    self.space = Space({"batch": Categorical((1, 2, 4))}, {"batch": 1})

                def steps(self, choice, seed):
                    yield {"time_ratio": 1.0, "memory_ratio": float(choice["batch"])}
    """

    description: ClassVar[str]
    reference: ClassVar[str]
    error_meaning: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]
    default_length: ClassVar[int] = 16384
    default_dtype: ClassVar[str] = "bfloat16"
    space: Space
    starts: tuple[Mapping[str, Any], ...] = ()

    @abstractmethod
    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        """Prepare to measure choices; see the arguments of the class."""

    @abstractmethod
    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        """Yield figures of a choice, cheap ones first; each step adds some.

        Args:
            choice: a value for each range of the space.
            seed: seed of what is random in the measurement.

        Yields:
            Figures by name. ``time_ratio`` (with ``_low`` and ``_high``), ``memory_ratio`` and
            ``parameters_ratio`` are ratios to the default choice. ``error`` and
            ``error_default`` are shares from 0 to 1.

        Raises:
            ValueError: the choice cannot be built, or computes something else than it should.
        """

    def settings(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """Return the complete settings that a choice stands for, as they are written to a file.

        Args:
            choice: a value for each range of the space.
        """
        return self.space.settings(choice)


_TABLE: dict[str, type[TuningTarget]] = {}
_T = TypeVar("_T", bound=type[TuningTarget])


def register(name: str) -> Callable[[_T], _T]:
    """Return a class decorator that makes a class the kind of study ``name``.

    Args:
        name: name of the class's file, or of its entry point.

    Raises:
        ValueError: another class has the name, or it cannot be part of a file's name.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"kind of study {name!r}: a name has letters, digits and '_' only")

    def add(cls: _T) -> _T:
        other = _TABLE.get(name)
        if other is not None and other.__module__ != cls.__module__:
            raise ValueError(f"kind of study {name!r} is already registered: {other!r}")
        _TABLE[name] = cls
        return cls

    return add


def own_names() -> tuple[str, ...]:
    """Return the names of danon's own kinds, without importing one."""
    return tuple(module.name for module in pkgutil.iter_modules(targets.__path__))


def names() -> tuple[str, ...]:
    """Return the names of all kinds, without importing one: danon's, then those of packages."""
    return tuple(dict.fromkeys((*own_names(), *_entry_points())))


def unusable() -> dict[str, str]:
    """Import all kinds, and return by name why some cannot be used."""
    reasons = {}
    for name in names():
        try:
            get(name)
        except ValueError as error:
            reasons[name] = str(error)
    for name, point in _entry_points().items():
        if name in own_names():
            reasons[name] = f"{_package(point)} has no effect: danon has a kind of this name"
    return reasons


def get(name: str) -> type[TuningTarget]:
    """Return the class of a kind, importing its module if need be.

    Args:
        name: one of :func:`names`.

    Raises:
        ValueError: there is no such kind, or its module cannot be imported; says why.
    """
    if name in _TABLE:
        return _TABLE[name]
    packages = _entry_points()
    if name in own_names():
        source = f"danon/tuning/targets/{name}.py"
        load: Callable[[], object] = partial(importlib.import_module, f"{targets.__name__}.{name}")
    elif name in packages:
        source, load = _package(packages[name]), packages[name].load
    else:
        raise ValueError(f"--kind {name!r}: must be one of {', '.join(names())}")
    try:
        loaded = load()
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise ValueError(f"--kind {name!r}: {source} does not import: {located(error)}") from error
    if isinstance(loaded, type) and issubclass(loaded, TuningTarget):
        register(name)(loaded)
    if name not in _TABLE:
        raise ValueError(f"--kind {name!r}: {source} registers no TuningTarget under this name")
    return _TABLE[name]


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(GROUP)}


def _package(point: EntryPoint) -> str:
    """Return where an entry point comes from, in words."""
    return f"{point.value} of the package {package_of(point)}"
