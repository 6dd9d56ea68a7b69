"""Settings of the process that code can change, and how each is set back."""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import gc
import locale
import os
import random
import signal
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as hooks
from torch import Tensor

__all__ = ["SEED", "Changes", "ProcessState", "open_autocast_regions"]

DEVICES = ("cpu", "cuda")
PACKAGES = ("danon", "suites", "baselines")
"""Whose modules nothing that is measured may patch; torch and the clocks besides."""
PATCHABLE = ("torch", "torch.nn.functional", "torch.autograd", "torch.cuda", "time", "math")
_CLASSES: dict[str, type] = {"torch.Tensor": Tensor, "torch.nn.Module": torch.nn.Module}
TOLD = 3
"""Names of what has changed in a collection; further ones are counted."""
SEED = "torch's seed"

_PACKAGES = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))
_WORKER = concurrent.futures.thread._worker.__code__
_REFUSALS = (RuntimeError, OSError, ValueError, locale.Error)
_guards: list[object] = []  # modes that are entered again and never left


@dataclass(frozen=True)
class Setting:
    """One thing that a process has once.

    Attributes:
        name: in words.
        read: its value; two values are compared.
        write: sets a value that was read; None: it cannot be set back.
        describe: a difference in words, from the value before and the one now; empty: not to be
            told.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object] | None
    describe: Callable[[Any, Any], str] = lambda before, now: f"{_word(before)} -> {_word(now)}"


@dataclass(frozen=True)
class Changes:
    """What differed from a state.

    Attributes:
        described: setting -> how it differed, in words.
        unrestored: settings that could not be set back: only another process has them as they were.
    """

    described: dict[str, str]
    unrestored: tuple[str, ...]


class ProcessState:
    """The settings of this process at the moment this is made."""

    def __init__(self) -> None:
        self._values = {setting.name: _read(setting) for setting in _SETTINGS}

    def restore(self) -> Changes:
        """Set back what has changed since.

        Returns:
            What it was. Random generators are set back without a word.
        """
        now = {setting.name: _read(setting) for setting in _SETTINGS}
        changed = [s for s in _SETTINGS if self._values[s.name] != now[s.name]]
        said = {s.name: _told(s, self._values[s.name], now[s.name]) for s in changed}
        for setting in changed:
            if setting.write is not None:
                with contextlib.suppress(*_REFUSALS):  # then it is among the unrestored
                    setting.write(self._values[setting.name])
        told = {name: words for name, words in said.items() if words}
        lasting = (s for s in changed if self._values[s.name] != _read(s))
        return Changes(told, tuple(s.name for s in lasting if s.name in told))


def _read(setting: Setting) -> Any:
    try:
        return setting.read()
    except _REFUSALS as error:  # torch refuses to name what is set in two ways
        return _Unreadable(type(error).__name__)


@dataclass(frozen=True)
class _Unreadable:
    """In the place of a value.

    Attributes:
        error: that reading it raised.
    """

    error: str


def _told(setting: Setting, before: Any, now: Any) -> str:
    for value in (before, now):
        if isinstance(value, _Unreadable):
            return f"reading it raises {value.error}"
    return setting.describe(before, now)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value).removeprefix("torch.")
    return text if len(text) <= 40 else f"{text[:37]}..."


def _names(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which entries of a dictionary have changed."""
    changed = sorted(
        str(name)
        for name in before.keys() | now.keys()
        if name not in before or name not in now or before[name] != now[name]
    )
    return _listed(changed)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def _silent(before: Any, now: Any) -> str:
    return ""


def _changed(before: Any, now: Any) -> str:
    return "changed"


# --- torch -----------------------------------------------------------------------------------


def _default_device() -> object:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _set_inference(value: bool) -> None:
    _guards.append(torch._C._InferenceMode(value))


def _autocast() -> dict[str, Any]:
    kinds = {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES
    }
    kept = torch.is_autocast_cache_enabled()
    return {**kinds, "cache": kept, "open regions": open_autocast_regions()}


def open_autocast_regions() -> int:
    """How deep the process is in autocast: until it is out, torch keeps casts of weights."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast(value: dict[str, Any]) -> None:
    for kind in DEVICES:
        enabled, dtype = value[kind]
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(value["cache"])
    for _ in range(open_autocast_regions() - value["open regions"]):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


fills: Any = torch.utils.deterministic


def _deterministic() -> dict[str, bool]:
    return {
        "enabled": torch.are_deterministic_algorithms_enabled(),
        "only warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill memory": fills.fill_uninitialized_memory,
    }


def _set_deterministic(value: dict[str, bool]) -> None:
    torch.use_deterministic_algorithms(value["enabled"], warn_only=value["only warn"])
    fills.fill_uninitialized_memory = value["fill memory"]


def _precisions() -> dict[str, Any]:
    """Of matrix products, by backend; names as torch has them."""
    backends = torch.backends
    found = {
        "fp32_precision": backends.fp32_precision,  # type: ignore[attr-defined]
        "bf16 reduction": backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16 reduction": backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "cudnn.benchmark": backends.cudnn.benchmark,
        "cudnn.deterministic": backends.cudnn.deterministic,
        "cudnn.enabled": backends.cudnn.enabled,
        "mkldnn.enabled": torch._C._get_mkldnn_enabled(),
    }
    return found | {name: place.fp32_precision for name, place in _precision_places().items()}


def _precision_places() -> dict[str, Any]:
    backends: Any = torch.backends
    return {
        "cuda.matmul": backends.cuda.matmul,
        "cudnn": backends.cudnn,
        "mkldnn": backends.mkldnn,
        "mkldnn.matmul": backends.mkldnn.matmul,
    }


def _set_precisions(value: dict[str, Any]) -> None:
    backends: Any = torch.backends
    backends.fp32_precision = value["fp32_precision"]
    for name, place in _precision_places().items():
        place.fp32_precision = value[name]
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = value["bf16 reduction"]
    backends.cuda.matmul.allow_fp16_reduced_precision_reduction = value["fp16 reduction"]
    backends.cudnn.benchmark = value["cudnn.benchmark"]
    backends.cudnn.deterministic = value["cudnn.deterministic"]
    backends.cudnn.enabled = value["cudnn.enabled"]
    torch._C._set_mkldnn_enabled(value["mkldnn.enabled"])


def _sdp() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "memory efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


def _set_sdp(value: dict[str, bool]) -> None:
    cuda: Any = torch.backends.cuda
    cuda.enable_flash_sdp(value["flash"])
    cuda.enable_mem_efficient_sdp(value["memory efficient"])
    cuda.enable_math_sdp(value["math"])
    cuda.enable_cudnn_sdp(value["cudnn"])


def _flushes_denormals() -> bool:
    tiny = torch.full((1,), 1e-310, dtype=torch.float64, device="cpu")
    return float(tiny * 0.5) == 0.0


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _hooks() -> dict[str, dict[Any, Any]]:
    found = {name: value for name, value in vars(hooks).items() if name.startswith("_global_")}
    return {name: dict(value) for name, value in found.items() if isinstance(value, dict)}


def _set_hooks(value: dict[str, dict[Any, Any]]) -> None:
    for name, entries in value.items():
        there = getattr(hooks, name)
        there.clear()
        there.update(entries)


def _pop_modes(count: int) -> None:
    while torch._C._len_torch_function_stack() > count:
        torch.overrides._pop_mode()


def _generators() -> tuple[Any, ...]:
    states = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    legacy: Any = np.random.get_state()  # noqa: NPY002  what is measured may draw from it
    states += [(legacy[0], legacy[1].tobytes(), *legacy[2:])]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [x.numpy().tobytes() for x in torch.cuda.get_rng_state_all()]
    return tuple(states)


def _set_generators(value: tuple[Any, ...]) -> None:
    mine, python, (kind, keys, *rest), *cuda = value

    def tensor(content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    torch.set_rng_state(tensor(mine))
    random.setstate(python)
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    for index, state in enumerate(cuda):
        torch.cuda.set_rng_state(tensor(state), index)


# --- the interpreter and the operating system -------------------------------------------------


def _handlers() -> dict[str, Any]:
    fixed = {signal.SIGKILL, signal.SIGSTOP}
    found = ((n, signal.getsignal(n)) for n in sorted(signal.valid_signals() - fixed))
    return {str(getattr(n, "name", n)): handler for n, handler in found}


def _set_handlers(value: dict[str, Any]) -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        name = str(getattr(number, "name", number))
        if signal.getsignal(number) != value[name] and value[name] is not None:
            signal.signal(number, value[name])


def _timers() -> tuple[bool, ...]:
    every = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    return tuple(any(signal.getitimer(timer)) for timer in every)


def _set_timers(value: tuple[bool, ...]) -> None:
    every = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    for timer, wanted in zip(every, value, strict=True):
        if not wanted:
            signal.setitimer(timer, 0)


def _environment() -> dict[str, str]:
    """Without what compilers of torch leave there when they are first used."""
    own = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def _set_environment(value: dict[str, str]) -> None:
    for name in _environment().keys() - value.keys():
        del os.environ[name]
    os.environ.update({name: x for name, x in value.items() if os.environ.get(name) != x})


def _path() -> list[str]:
    """Without folders that installed packages add when they are imported, as setuptools does."""
    return [place for place in sys.path if not place.startswith(_PACKAGES)]


def _set_path(value: list[str]) -> None:
    sys.path[:] = [*value, *(place for place in sys.path if place.startswith(_PACKAGES))]


@dataclass(frozen=True)
class _Filters:
    """Of warnings; and how many modules there were: many add filters when they are imported."""

    filters: list[Any]
    modules: int = field(compare=False)


def _filters() -> _Filters:
    return _Filters(list(warnings.filters), len(sys.modules))


def _told_filters(before: _Filters, now: _Filters) -> str:
    return "changed" if now.modules == before.modules else ""


def _set_filters(value: _Filters) -> None:
    filters: Any = warnings.filters
    filters[:] = value.filters
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _collector() -> dict[str, Any]:
    return {
        "enabled": gc.isenabled(),
        "thresholds": gc.get_threshold(),
        "frozen objects": gc.get_freeze_count() > 0,
        "callbacks": list(gc.callbacks),
    }


def _set_collector(value: dict[str, Any]) -> None:
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


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _threads() -> dict[int, str]:
    """Python's threads that are alive, names by identifier, but not workers that have no work.

    Compilers of torch leave such a pool behind.
    """
    frames = sys._current_frames()
    found = {}
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        idle = frame is not None and frame.f_code is _WORKER
        if thread.is_alive() and thread.ident is not None and not idle:
            found[thread.ident] = thread.name
    return found


def _more_threads(before: dict[int, str], now: dict[int, str]) -> str:
    """Threads that have come; one that has ended is no change to tell."""
    return _listed([name for ident, name in now.items() if ident not in before])


def _patchable() -> dict[str, dict[str, Any]]:
    """What is in modules and classes that others could patch: torch, clocks, the instruments."""
    modules = {name: sys.modules[name] for name in PATCHABLE}
    modules |= {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in PACKAGES and isinstance(module, ModuleType)
    }
    found = {name: dict(vars(module)) for name, module in modules.items()}
    return found | {name: dict(vars(kind)) for name, kind in _CLASSES.items()}


class _Functions:
    """Functions and classes; compares by identity, and only what was there before."""

    def __init__(self) -> None:
        self.places = _patchable()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Functions) and not list(self.patched(other))

    __hash__ = None  # type: ignore[assignment]

    def patched(self, other: _Functions) -> Iterator[tuple[str, str]]:
        """Module or class, and the attribute there that is another one in ``other``."""
        changed = {
            place: now
            for place, known in self.places.items()
            if not _identical(known, now := other.places.get(place, {}))
        }
        if not changed:
            return
        functions = {
            id(value)
            for place, known in self.places.items()
            for value in known.values()
            if _is_function(place, value)
        }
        for place, now in changed.items():
            known = self.places[place]
            for attribute, value in known.items():
                new = now.get(attribute)
                if new is value or not _is_function(place, value):
                    continue
                # One known function in the place of another is nobody's wrapper.
                if id(new) in functions or not _of_package(new):
                    yield place, attribute
            for attribute in now.keys() - known.keys():  # hides a method that it inherits
                if place in _CLASSES and hasattr(
                    super(_CLASSES[place], _CLASSES[place]), attribute
                ):
                    yield place, attribute


def _identical(some: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all values are the same objects."""
    return some.keys() == other.keys() and all(map(is_, some.values(), other.values()))


def _is_function(place: str, value: Any) -> bool:
    """Also whatever is in a class."""
    return (
        place in _CLASSES
        or isinstance(value, FunctionType | type)
        or type(value).__name__.startswith("builtin_")
    )


def _of_package(value: Any) -> bool:
    """Whether it is of an installed package: some wrap functions of torch, as torch does late."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(_PACKAGES)
    module = sys.modules.get(value.__module__) if isinstance(value, type) else None
    return str(getattr(module, "__file__", "")).startswith(_PACKAGES)


def _told_functions(before: _Functions, now: _Functions) -> str:
    return f"{_listed(['.'.join(names) for names in before.patched(now)])} replaced"


def _set_functions(value: _Functions) -> None:
    now = _Functions()
    for place, attribute in list(value.patched(now)):
        where = _CLASSES.get(place) or sys.modules[place]
        if attribute in value.places[place]:
            setattr(where, attribute, value.places[place][attribute])
        else:
            delattr(where, attribute)


def _set_cwd(value: str) -> None:
    os.chdir(value)


_SETTINGS = (
    # Functions first: the others are read and set through them.
    Setting("functions", _Functions, _set_functions, _told_functions),
    Setting("torch's default device", _default_device, torch.set_default_device),
    Setting("torch's function modes", torch._C._len_torch_function_stack, _pop_modes),
    Setting("torch's threads", torch.get_num_threads, torch.set_num_threads),
    Setting("torch's inter-op threads", torch.get_num_interop_threads, None),
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("inference mode", torch.is_inference_mode_enabled, _set_inference),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("autocast", _autocast, _set_autocast, _names),
    Setting("anomaly detection", _anomaly, lambda x: torch.set_anomaly_enabled(*x), _changed),
    Setting("deterministic algorithms", _deterministic, _set_deterministic, _names),
    Setting(
        "float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    Setting("torch's backends", _precisions, _set_precisions, _names),  # that sets these too
    Setting("kernels of dense attention", _sdp, _set_sdp, _names),
    Setting("flushing of denormal numbers", _flushes_denormals, torch.set_flush_denormal),
    Setting("hooks of all modules", _hooks, _set_hooks, _names),
    Setting(SEED, torch.initial_seed, lambda seed: None, _changed),  # the generators have it
    Setting("random generators", _generators, _set_generators, _silent),
    Setting("the garbage collector", _collector, _set_collector, _names),
    Setting("tracing", _tracing, _set_tracing, _changed),
    Setting(
        "sys.excepthook", lambda: sys.excepthook, lambda x: setattr(sys, "excepthook", x), _changed
    ),
    Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    Setting("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
    Setting("the warning filters", _filters, _set_filters, _told_filters),
    Setting("the environment", _environment, _set_environment, _names),
    Setting("sys.path", _path, _set_path, _changed),
    Setting("the current folder", os.getcwd, _set_cwd),
    Setting(
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda x: locale.setlocale(locale.LC_ALL, x),
    ),
    Setting("signal handlers", _handlers, _set_handlers, _names),
    Setting("timers", _timers, _set_timers, _changed),
    Setting("the umask", _umask, os.umask),
    Setting("resource limits", _limits, _set_limits, _names),
    Setting("the priority", _priority, None),
    Setting("the processors to run on", _affinity, lambda x: os.sched_setaffinity(0, x)),
    Setting("running threads", _threads, None, _more_threads),
)
