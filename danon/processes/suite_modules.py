"""Import of the modules that register suites: the files in suites/, and installed packages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from danon.console.reasons import located
from danon.processes.interpreter import bundle
from danon.processes.interruption import Interruption
from danon.runs.entry_points import entry_points, package_of

__all__ = ["GROUP", "comes_with_danon", "import_suites", "suite_names"]

GROUP = "danon.suites"
ELSEWHERE = "danon_suites"
NOT_SUITES = ("conftest", "profiles", "test_suites")


@cache
def import_suites() -> dict[str, str]:
    """Import every file in suites/, and the entry points ``danon.suites``, once.

    An entry point names a class, or a module that registers suites and metrics when imported::

        [project.entry-points."danon.suites"]
        energy = "my_package.energy:Energy"

    Returns:
        Why suites of installed packages are left out, by the name of the entry point.
    """
    package = _package()
    for module in pkgutil.iter_modules([str(_folder())]):
        if module.name not in NOT_SUITES:
            importlib.import_module(f"{package}.{module.name}")
    left_out = {}
    for point in entry_points(GROUP):
        try:
            point.load()
        except Interruption:
            raise
        except BaseException as error:  # noqa: BLE001  importing it may raise anything
            reason = str(error) if isinstance(error, ValueError) else located(error)
            which = f"suite {point.name!r} of the installed package {package_of(point)}"
            left_out[point.name] = f"{which} is left out: {reason}"
    return left_out


def suite_names() -> tuple[str, ...]:
    """Return the names of danon's own suites and of installed ones, without importing any."""
    own = (module.name for module in pkgutil.iter_modules([str(_folder())]))
    installed = (point.name for point in entry_points(GROUP))
    return tuple(dict.fromkeys((*(name for name in own if name not in NOT_SUITES), *installed)))


def comes_with_danon(suite: type) -> bool:
    """Return True if the class of a suite is in a file of suites/."""
    return Path(inspect.getfile(suite)).resolve().parent == _folder()


def _folder() -> Path:
    return (bundle() / "suites").resolve()


def _package() -> str:
    """Return the name under which the files of the folder are imported.

    In a process that danon has not started, ``suites`` may be nothing, or somebody else's, whose
    files come before danon's.
    """
    spec = importlib.util.find_spec("suites")
    folders = [
        Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or ()
    ]
    if folders[:1] == [_folder()]:
        return "suites"
    package = ModuleType(ELSEWHERE)
    package.__path__ = [str(_folder())]
    sys.modules[ELSEWHERE] = package
    return ELSEWHERE
