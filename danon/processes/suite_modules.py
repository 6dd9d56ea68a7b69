"""Import of the modules that register suites: the files in suites/, and installed packages."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from functools import cache

from danon.console.reasons import located
from danon.processes.interpreter import bundle
from danon.processes.interruption import Interruption
from danon.runs.entry_points import entry_points, package_of

__all__ = ["GROUP", "import_suites"]

GROUP = "danon.suites"
NOT_SUITES = ("conftest", "profiles", "test_suites")


@cache
def import_suites() -> tuple[str, ...]:
    """Import every file in suites/, and the entry points ``danon.suites``, once.

    An entry point names a class, or a module that registers suites and metrics when imported::

        [project.entry-points."danon.suites"]
        energy = "my_package.energy:Energy"

    Returns:
        Why suites of installed packages are left out, a sentence each.
    """
    folder = bundle() / "suites"
    if importlib.util.find_spec("suites") is None:  # in a process that is no child of danon's
        sys.path.append(str(folder.parent))
    for module in pkgutil.iter_modules([str(folder)]):
        if module.name not in NOT_SUITES:
            importlib.import_module(f"suites.{module.name}")
    left_out = []
    for point in entry_points(GROUP):
        try:
            point.load()
        except Interruption:
            raise
        except BaseException as error:  # noqa: BLE001  importing it may raise anything
            reason = str(error) if isinstance(error, ValueError) else located(error)
            which = f"suite {point.name!r} of the installed package {package_of(point)}"
            left_out.append(f"{which} is left out: {reason}")
    return tuple(left_out)
