"""Notice when the code that is measured replaces the code that measures, or the clock.

    integrity = Integrity.take(*MEASURING)   # before foreign code is imported
    ...
    integrity.replaced()                                    # ["time.perf_counter"]

A guard against shortcuts and accidents, not against an attacker: Python code in one process can
reach everything.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Self

import torch

__all__ = ["MEASURING", "Integrity"]

MEASURING = ("danon.bench", "danon.data", "danon.evaluation", "danon.measure", "suites")
"""Packages that a bench measures with."""

_LIBRARIES = (time, random, secrets, torch, torch.autograd, torch.nn.functional, torch.profiler)
_CLASSES = (torch.Tensor, random.SystemRandom)
_REPLACED_BY_LIBRARIES = {"torch.manual_seed"}  # transformers wraps it; nothing is timed by it
_UNEQUAL_CLOCKS = 0.05
"""Share by which two clocks of one machine may differ over a second and more."""
_TICK_S = 0.1
Owner = ModuleType | type


class Integrity:
    """The functions and classes that measure, as they were at one moment.

    Args:
        owners: modules and classes whose functions must stay.
    """

    def __init__(self, owners: list[Owner]) -> None:
        """Remember the functions of the owners, and start both clocks."""
        self._functions = [(owner, dict(_functions(owner))) for owner in owners]
        self._clock, self._other_clock = time.perf_counter, os.times
        self._start = self._clock(), self._other_clock().elapsed

    @classmethod
    def take(cls, *packages: str) -> Self:
        """Remember the instruments.

        Args:
            packages: packages whose loaded modules must stay as they are. The clock, random
                numbers and the first level of torch are always among them.
        """
        modules = [
            module
            for name, module in sorted(sys.modules.items())
            if any(name == package or name.startswith(f"{package}.") for package in packages)
        ]
        classes = [
            value
            for module in modules
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        return cls([*_LIBRARIES, *_CLASSES, *modules, *classes])

    def replaced(self) -> list[str]:
        """Return the names of replaced functions, and of a clock that goes wrong."""
        changed = [
            f"{_name(owner)}.{name}"
            for owner, functions in self._functions
            for name in self._changed(owner, functions)
        ]
        seconds = self._clock() - self._start[0]
        other_seconds = self._other_clock().elapsed - self._start[1]
        if abs(seconds - other_seconds) > _UNEQUAL_CLOCKS * other_seconds + _TICK_S:
            changed.append(
                f"the clock ({seconds:.1f} s passed on it, {other_seconds:.1f} s on another)"
            )
        return changed

    def restore(self) -> None:
        """Put every replaced function back."""
        for owner, functions in self._functions:
            for name in self._changed(owner, functions):
                if name in functions:
                    setattr(owner, name, functions[name])
                else:
                    delattr(owner, name)
        self._start = self._clock(), self._other_clock().elapsed

    @staticmethod
    def _changed(owner: Owner, functions: dict[str, Callable[..., object]]) -> list[str]:
        now = vars(owner)
        changed = [name for name, was in functions.items() if now.get(name) is not was]
        if isinstance(owner, type):  # a new method hides one of a base class
            bases = [base for base in owner.__mro__[1:] if base is not object]
            changed += [
                name
                for name, value in _functions(owner)
                if name not in functions and any(name in vars(base) for base in bases)
            ]
        return changed


def _functions(owner: Owner) -> Iterator[tuple[str, Callable[..., object]]]:
    for name, value in list(vars(owner).items()):
        if f"{_name(owner)}.{name}" in _REPLACED_BY_LIBRARIES:
            continue
        if callable(value) or isinstance(value, property | classmethod | staticmethod):
            yield name, value


def _name(owner: Owner) -> str:
    return (
        owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}"
    )
