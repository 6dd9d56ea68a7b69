"""Settings of the Python interpreter and of the operating system's process."""

from __future__ import annotations

import concurrent.futures.thread
import gc
import locale
import os
import signal
import sys
import sysconfig
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

from danon.measure.process_setting import (
    Setting,
    describe_change,
    describe_changed_entries,
    list_names,
)

__all__ = ["INTERPRETER_SETTINGS", "PACKAGE_FOLDERS"]

PACKAGE_FOLDERS = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))
"""Folders of installed packages."""
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
COMPILER_VARIABLES = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_")
"""Beginnings of variables that torch's compilers set when they are first used."""
_POOL_WORKER = concurrent.futures.thread._worker.__code__


def _handlers() -> dict[str, Any]:
    return {
        str(getattr(number, "name", number)): signal.getsignal(number)
        for number in sorted(_catchable_signals())
    }


def _set_handlers(value: dict[str, Any]) -> None:
    for number in _catchable_signals():
        name = str(getattr(number, "name", number))
        if signal.getsignal(number) != value[name] and value[name] is not None:
            signal.signal(number, value[name])


def _catchable_signals() -> set[signal.Signals]:
    return set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}


def _timers() -> tuple[bool, ...]:
    return tuple(any(signal.getitimer(timer)) for timer in TIMERS)


def _set_timers(value: tuple[bool, ...]) -> None:
    for timer, running in zip(TIMERS, value, strict=True):
        if not running:
            signal.setitimer(timer, 0)


def _environment() -> dict[str, str]:
    """Return the variables of the environment, without those of torch's compilers."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(COMPILER_VARIABLES)
    }


def _set_environment(value: dict[str, str]) -> None:
    for name in _environment().keys() - value.keys():
        del os.environ[name]
    os.environ.update({name: x for name, x in value.items() if os.environ.get(name) != x})


def _path() -> list[str]:
    """Return ``sys.path`` without folders that installed packages add, as setuptools does."""
    return [folder for folder in sys.path if not folder.startswith(PACKAGE_FOLDERS)]


def _set_path(value: list[str]) -> None:
    sys.path[:] = [*value, *(x for x in sys.path if x.startswith(PACKAGE_FOLDERS))]


@dataclass(frozen=True)
class _WarningFilters:
    """The filters of warnings.

    Attributes:
        modules: number of loaded modules; many packages add filters when they are imported.
    """

    filters: list[Any]
    modules: int = field(compare=False)


def _warning_filters() -> _WarningFilters:
    return _WarningFilters(list(warnings.filters), len(sys.modules))


def _describe_filters(before: _WarningFilters, now: _WarningFilters) -> str:
    return "changed" if now.modules == before.modules else ""


def _set_warning_filters(value: _WarningFilters) -> None:
    filters: Any = warnings.filters
    filters[:] = value.filters
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _garbage_collector() -> dict[str, Any]:
    return {
        "enabled": gc.isenabled(),
        "thresholds": gc.get_threshold(),
        "frozen objects": gc.get_freeze_count() > 0,
        "callbacks": list(gc.callbacks),
    }


def _set_garbage_collector(value: dict[str, Any]) -> None:
    (gc.enable if value["enabled"] else gc.disable)()
    gc.set_threshold(*value["thresholds"])
    if not value["frozen objects"]:
        gc.unfreeze()
    gc.callbacks[:] = value["callbacks"]


def _tracing() -> tuple[Any, ...]:
    return sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()


def _set_tracing(value: tuple[Any, ...]) -> None:
    sys.settrace(value[0])
    sys.setprofile(value[1])
    threading.settrace(value[2])
    threading.setprofile(value[3])


def _excepthook() -> Any:
    return sys.excepthook


def _set_excepthook(value: Any) -> None:
    sys.excepthook = value


def _locale() -> str:
    return locale.setlocale(locale.LC_ALL)


def _set_locale(value: str) -> None:
    locale.setlocale(locale.LC_ALL, value)


def _umask() -> int:
    value = os.umask(0o077)
    os.umask(value)
    return value


def _limits() -> dict[str, tuple[int, int]]:
    if sys.platform == "win32":
        return {}
    import resource

    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def _set_limits(value: dict[str, tuple[int, int]]) -> None:
    import resource

    for name, limit in value.items():
        number = getattr(resource, name)
        if resource.getrlimit(number) != limit:
            resource.setrlimit(number, limit)


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def _processors() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _set_processors(value: set[int]) -> None:
    os.sched_setaffinity(0, value)


def _threads() -> dict[int, str]:
    """Return the names of Python's running threads by identifier.

    Pool workers that have no work are left out: torch's compilers leave such a pool behind.
    """
    frames = sys._current_frames()
    running = {}
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        idle = frame is not None and frame.f_code is _POOL_WORKER
        if thread.is_alive() and thread.ident is not None and not idle:
            running[thread.ident] = thread.name
    return running


def _describe_threads(before: dict[int, str], now: dict[int, str]) -> str:
    """Return the threads that have come; one that has ended is no change to report."""
    return list_names([name for ident, name in now.items() if ident not in before])


INTERPRETER_SETTINGS = (
    Setting(
        "the garbage collector",
        _garbage_collector,
        _set_garbage_collector,
        describe_changed_entries,
    ),
    Setting("tracing", _tracing, _set_tracing, describe_change),
    Setting("sys.excepthook", _excepthook, _set_excepthook, describe_change),
    Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    Setting("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
    Setting("the warning filters", _warning_filters, _set_warning_filters, _describe_filters),
    Setting("the environment", _environment, _set_environment, describe_changed_entries),
    Setting("sys.path", _path, _set_path, describe_change),
    Setting("the current folder", os.getcwd, os.chdir),
    Setting("the locale", _locale, _set_locale),
    Setting("signal handlers", _handlers, _set_handlers, describe_changed_entries),
    Setting("timers", _timers, _set_timers, describe_change),
    Setting("the umask", _umask, os.umask),
    Setting("resource limits", _limits, _set_limits, describe_changed_entries),
    Setting("the priority", _priority, None),
    Setting("the processors to run on", _processors, _set_processors),
    Setting("running threads", _threads, None, _describe_threads),
)
"""In the order in which they are set back."""
