"""Functions and classes that code has replaced: of torch, the clocks and the instruments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

import torch

from danon.measure.interpreter_settings import PACKAGE_FOLDERS
from danon.measure.process_setting import Setting, list_names

__all__ = ["PATCHED_FUNCTIONS"]

OWN_PACKAGES = ("danon", "suites", "baselines")
"""Packages whose modules nothing that is measured may patch."""
LIBRARIES = ("torch", "torch.nn.functional", "torch.autograd", "torch.cuda", "time", "math")
"""Modules besides."""
_CLASSES: dict[str, type] = {"torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}


class _Functions:
    """The functions and classes of the guarded modules, compared by identity.

    Attributes:
        owners: name of a module or class -> its attributes.
    """

    def __init__(self) -> None:
        self.owners = _guarded_attributes()

    def __eq__(self, other: object) -> bool:
        """Compare only what was there before: new functions are no patch."""
        return isinstance(other, _Functions) and not list(self.patched(other))

    __hash__ = None  # type: ignore[assignment]

    def patched(self, other: _Functions) -> Iterator[tuple[str, str]]:
        """Yield the module or class and the attribute of whatever ``other`` has replaced."""
        changed = {
            owner: now
            for owner, before in self.owners.items()
            if not _identical(before, now := other.owners.get(owner, {}))
        }
        if not changed:
            return
        functions = {
            id(value)
            for owner, before in self.owners.items()
            for value in before.values()
            if _is_guarded(owner, value)
        }
        for owner, now in changed.items():
            before = self.owners[owner]
            for attribute, value in before.items():
                new = now.get(attribute)
                if new is value or not _is_guarded(owner, value):
                    continue
                # A guarded function in the place of another is no package's wrapper.
                if id(new) in functions or not _of_package(new):
                    yield owner, attribute
            for attribute in now.keys() - before.keys():  # hides a method that it inherits
                if owner in _CLASSES and hasattr(
                    super(_CLASSES[owner], _CLASSES[owner]), attribute
                ):
                    yield owner, attribute


def _guarded_attributes() -> dict[str, dict[str, Any]]:
    """Return the attributes of all guarded modules and classes."""
    modules = {name: sys.modules[name] for name in LIBRARIES}
    modules |= {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in OWN_PACKAGES and isinstance(module, ModuleType)
    }
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    return attributes | {name: dict(vars(cls)) for name, cls in _CLASSES.items()}


def _identical(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether all values are the same objects."""
    return first.keys() == second.keys() and all(map(is_, first.values(), second.values()))


def _is_guarded(owner: str, value: Any) -> bool:
    """Return whether an attribute is a function or a class, or belongs to a guarded class."""
    return (
        owner in _CLASSES
        or isinstance(value, FunctionType | type)
        or type(value).__name__.startswith("builtin_")
    )


def _of_package(value: Any) -> bool:
    """Return whether an installed package defines it: some wrap functions of torch, and late."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(PACKAGE_FOLDERS)
    module = sys.modules.get(value.__module__) if isinstance(value, type) else None
    return str(getattr(module, "__file__", "")).startswith(PACKAGE_FOLDERS)


def _describe(before: _Functions, now: _Functions) -> str:
    return f"{list_names(['.'.join(names) for names in before.patched(now)])} replaced"


def _restore(value: _Functions) -> None:
    for owner, attribute in list(value.patched(_Functions())):
        target = _CLASSES.get(owner) or sys.modules[owner]
        if attribute in value.owners[owner]:
            setattr(target, attribute, value.owners[owner][attribute])
        else:
            delattr(target, attribute)


PATCHED_FUNCTIONS = Setting("functions", _Functions, _restore, _describe)
