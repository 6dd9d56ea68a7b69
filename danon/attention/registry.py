"""The one table of attentions: a name registered here appears in every suite."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from torch import nn

from danon.attention.base import BaseAttention
from danon.runs.case import REFERENCE

__all__ = [
    "REFERENCE",
    "get",
    "import_target",
    "load",
    "make_importable",
    "names",
    "register",
    "remove",
]

_TABLE: dict[str, type[BaseAttention]] = {}
_VERSIONS: dict[str, tuple[int, int]] = {}
"""Time of the last change and size of each imported file."""
_T = TypeVar("_T", bound=type[BaseAttention])


def register(name: str) -> Callable[[_T], _T]:
    """Register a class under ``name`` for every suite; a class decorator.

    Args:
        name: letters, digits, ``_``, ``-`` and ``.`` only.

    Returns:
        A decorator that returns the class itself.

    Raises:
        ValueError: the name is taken by another class, or cannot stand in a path.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"attention {name!r}: a name has letters, digits, '_', '-' and '.' only")

    def add(cls: _T) -> _T:
        taken = _TABLE.get(name)
        if taken is not None and _source(taken) != _source(cls):
            raise ValueError(
                f"attention {name!r} is already registered: {taken!r}; give {cls!r} another name"
            )
        _TABLE[name] = cls
        return cls

    return add


def _source(cls: type) -> tuple[str, str]:
    """Return what tells a class from another one, but not from itself imported again."""
    return cls.__module__, cls.__qualname__


def remove(name: str) -> None:
    """Take a name back, if it is registered."""
    _TABLE.pop(name, None)


def names() -> tuple[str, ...]:
    """Return registered names, in order of registration."""
    return tuple(_TABLE)


def get(name: str) -> type[BaseAttention]:
    """Return the class behind a name.

    Args:
        name: a registered name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    try:
        return _TABLE[name]
    except KeyError:
        raise ValueError(f"unknown attention {name!r}; known: {', '.join(_TABLE)}") from None


def make_importable(target: str) -> None:
    """Make the folder of a target the last one on the path of imports, where :func:`load` looks.

    Args:
        target: ``path/to/file.py:Class`` or ``package.module:Class``.
    """
    source = target.rpartition(":")[0]
    folder = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def load(target: str, name: str = "") -> str:
    """Import ``path/to/file.py:Class`` or ``package.module:Class`` and register the class.

    A file may import its neighbours, a module those of the current folder: that folder becomes the
    last one on the path, so that nothing in it hides the standard library or a package.

    Args:
        target: where the class is.
        name: to register it under; empty takes the name of the class. A named one comes from an
            installed package, and the path stays as it is.

    Returns:
        The name it is registered under.

    Raises:
        ValueError: the target cannot be imported or is no attention class; says why.
    """
    module, attr = import_target(target, "attention", importable=bool(name))
    cls = getattr(module, attr, None)
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        classes = [
            n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, nn.Module)
        ]
        raise ValueError(
            f"attention {target!r}: {attr} is not an nn.Module class; found: {classes}"
        )
    if not issubclass(cls, BaseAttention):
        raise ValueError(
            f"attention {target!r}: {attr} must subclass danon.BaseAttention (forward(q, k, v, "
            "mask=None), constructor taking one config)"
        )
    if not _takes_one_config(cls):
        raise ValueError(
            f"attention {target!r}: {attr} must have a constructor that one config suffices for "
            "(__init__(self, config)), or a classmethod build(config)"
        )
    register(name or attr)(cls)
    return name or attr


def import_target(target: str, what: str, *, importable: bool = False) -> tuple[ModuleType, str]:
    """Import the module of ``path/to/file.py:Name`` or ``package.module:Name``.

    Args:
        target: the module, and a name in it.
        what: the kind of thing that the name stands for, for messages.
        importable: the module is of an installed package, and the path of imports stays as it is.

    Returns:
        The module, and the name.

    Raises:
        ValueError: it cannot be imported; says why.
    """
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise ValueError(f"{what} {target!r}: must be a registered name or 'file.py:Class'")
    path = Path(source).resolve()
    if source.endswith(".py") and not path.is_file():
        raise ValueError(f"{what} {target!r}: no such file {path}")
    if not importable:
        make_importable(target)
    try:
        module = _imported(path) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise ValueError(f"{what} {target!r} does not import: {error!r} ({where})") from error
    return module, name


def _imported(path: Path) -> ModuleType:
    """Import a file, once until it changes: its classes share what it holds."""
    name, version = f"danon_user_{path.stem}", (path.stat().st_mtime_ns, path.stat().st_size)
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ != str(path):  # one of the same name elsewhere
        name += f"_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
        loaded = sys.modules.get(name)
    if loaded is not None and _VERSIONS.get(name) == version:
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look classes up here
    spec.loader.exec_module(module)
    _VERSIONS[name] = version
    return module


def _takes_one_config(cls: type[BaseAttention]) -> bool:
    """Return True if :meth:`BaseAttention.build` can call the constructor."""
    if inspect.getattr_static(cls, "build") is not inspect.getattr_static(BaseAttention, "build"):
        return True
    try:
        inspect.signature(cls).bind(None)
    except TypeError:
        return False
    return cls.__init__ is not nn.Module.__init__  # whose signature takes anything
