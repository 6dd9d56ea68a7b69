"""Plugin that runs the suites under pytest: options, one test a case, reporting of outcomes."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
from filelock import Timeout

from danon.attention import installed, registry
from danon.attention.discovery import discover
from danon.bench import suite as suites
from danon.bench.contract import check_contract
from danon.bench.isolation import Isolation
from danon.bench.profile import Profile
from danon.bench.pytest_benchmark_adapter import replay
from danon.bench.runner import CaseRunner
from danon.bench.suite import planned_cases
from danon.bench.suite_selection import select_suites
from danon.bench.user_files import imported_user_files
from danon.measure.background_work import BackgroundWork
from danon.measure.fingerprint import fingerprint
from danon.measure.integrity import MEASURING, Integrity
from danon.measure.machine_lock import device_lock
from danon.measure.memory_limit import limit_memory
from danon.measure.process_state import ProcessState
from danon.measure.threads import threads_for_timing
from danon.processes.code_digest import code, digest
from danon.processes.event_channel import EventChannel
from danon.processes.interruption import interrupt_on_signal
from danon.processes.suite_modules import import_suites
from danon.runs.case import DEVICES, Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.suite_info import described
from suites.profiles import PROFILES

_channel = pytest.StashKey[EventChannel]()
_profile = pytest.StashKey[Profile]()
_cases = pytest.StashKey[dict[str, Case]]()
_suites = pytest.StashKey[tuple[str, ...]]()
_names = pytest.StashKey[tuple[str, ...]]()
_integrity = pytest.StashKey[Integrity]()
_answer = pytest.StashKey[dict[str, Any]]()
_most_threads = pytest.StashKey[int]()
_isolation = pytest.StashKey[Isolation]()
_session = pytest.StashKey[pytest.Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("danon")
    group.addoption("--danon-profile", default="quick", help=", ".join(PROFILES))
    group.addoption("--danon-device", default="cpu", help=", ".join(DEVICES))
    group.addoption(
        "--danon-attention",
        action="append",
        default=[],
        help="file.py:Class of an attention to add",
    )
    group.addoption(
        "--danon-only",
        default="",
        help="registered names to measure, comma separated; default: all",
    )
    group.addoption(
        "--danon-one",
        default="",
        help="the only attention whose cases are run; dense attention is measured as needed",
    )
    group.addoption(
        "--danon-fewer-threads",
        action="store_true",
        help="time with fewer threads where another program keeps the machine busy",
    )
    group.addoption(
        "--danon-suites", default="", help="names, or file.py:Class; default: all suites"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse wrong options before anything is measured."""
    channel = config.stash[_channel] = EventChannel()
    config.stash[_isolation] = Isolation(
        on_trace=lambda case, text: channel.send(event="trace", case=case.id, text=text),
        on_change=lambda key, text: channel.send(event="note", key=key, text=text),
    )
    interrupt_on_signal()
    try:
        _prepare(config)
    except ValueError as error:
        channel.send(event="refused", reason=str(error))
        raise pytest.UsageError(str(error)) from error


def _prepare(config: pytest.Config) -> None:
    import_suites()  # before what measures is taken down
    name, device = config.getoption("--danon-profile"), config.getoption("--danon-device")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: {', '.join(PROFILES)}")
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no CUDA device here; use --device cpu")
    _choose_threads(config)
    # What the suites themselves set is there before the first case: it is no attention's change.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tqdm.tqdm.monitor_interval = 0  # its thread would run beside what is timed
    config.stash[_integrity] = Integrity.take(*MEASURING)
    gc.collect()
    gc.freeze()  # or each look at what is kept, and each collection, goes through all of torch
    profile = config.stash[_profile] = PROFILES[name]

    def note(text: str) -> None:
        config.stash[_channel].send(event="note", text=text)

    targets, only = config.getoption("--danon-attention"), _words(config, "only")
    names, user_attentions = discover(
        targets, only, partial(_load, config), note, profile.attentions
    )
    config.stash[_suites] = select_suites(_words(config, "suites"), note, profile.suites)
    dtypes = {d for name in ("speed", "memory") for g in profile.grids[name] for d in g.dtypes}
    for attention in user_attentions:
        with _prepared(config, attention, f"attention {attention!r} is called with a few tokens"):
            check_contract(attention, sorted(dtypes), device)
    config.stash[_channel].send(event="prepare", what="the cases are planned")
    one = config.getoption("--danon-one")
    if one and one not in names:
        raise ValueError(f"--danon-one {one!r}: must be one of {', '.join(names)}")
    config.stash[_names], config.stash[_cases] = names, {}
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or models would be trained on what else is here
        limit_memory()  # CUDA reserves more address space than it uses


def _choose_threads(config: pytest.Config) -> None:
    config.stash[_most_threads] = torch.get_num_threads()
    if config.getoption("--danon-fewer-threads") and config.getoption("--danon-device") == "cpu":
        with _alone(config):  # or another bench would be the other program
            torch.set_num_threads(threads_for_timing())


def _load(config: pytest.Config, target: str, name: str = "") -> str:
    if not name:  # an installed package's attention has one
        registry.make_importable(target)  # for good: what it imports later is there, too
    with _prepared(config, name or target, f"attention {target!r} is imported"):
        return registry.load(target, name)


@contextlib.contextmanager
def _prepared(config: pytest.Config, attention: str, what: str) -> Iterator[None]:
    """Report what is done with an attention, and undo what it changes in the process."""
    config.stash[_channel].send(event="prepare", what=what)
    state, background, integrity = ProcessState(), BackgroundWork.now(), config.stash[_integrity]
    try:
        yield
    except ValueError:  # an installed package's attention is left out, the others are measured
        config.stash[_isolation].prepare(attention, state)
        raise
    faults = [left] if (left := BackgroundWork.now().since(background)) else []
    if replaced := integrity.replaced():
        integrity.restore()
        faults.append(f"other functions in place of {', '.join(replaced[:3])}, which measure it")
    if faults:
        raise ValueError(f"attention {attention!r} leaves {' and '.join(faults)}")
    config.stash[_isolation].prepare(attention, state)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    one, device = config.getoption("--danon-one"), config.getoption("--danon-device")
    names: tuple[str, ...] = config.stash[_names]
    planned = planned_cases(config.stash[_profile], names, device, config.stash[_suites])
    # Identifiers, not cases: pytest-benchmark stores the parameters in its JSON.
    cases = config.stash[_cases] = {c.id: c for c in planned if one in ("", c.attention)}
    metafunc.parametrize("case", list(cases), ids=list(cases), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop the item that pytest makes where there are no cases at all."""
    items[:] = [item for item in items if isinstance(_parameter(item), str)]


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly:
        return
    profile = config.stash[_profile]
    cases = [_case(item) for item in session.items]
    plan = [(case.id, suites.get(case.suite).seconds(profile, case)) for case in cases]
    device = torch.device(config.getoption("--danon-device"))
    answer = config.stash[_answer] = config.stash[_channel].ask(
        event="plan",
        cases=plan,
        attentions=[case.attention for case in cases],
        described=[asdict(case) for case in cases],
        fingerprint=fingerprint(device),
        most_threads=config.stash[_most_threads],
        suites={name: asdict(described()[name]) for name in config.stash[_suites]},
        basis=_basis(config, cases),
    )
    if answer.get("threads"):  # those of the run, which may have begun in another process
        torch.set_num_threads(answer["threads"])


def _basis(config: pytest.Config, cases: Sequence[Case]) -> dict[str, str]:
    """Return what decides the figures, by name: a resumed run must have the same."""
    names: tuple[str, ...] = config.stash[_names]
    planned = {case.suite for case in cases}
    options = {
        "profile": config.getoption("--danon-profile"),
        "device": config.getoption("--danon-device"),
        "attentions": ", ".join(names),
        **{f"package of {name}": package for name, package in installed.versions().items()},
        "suites": ", ".join(name for name in config.stash[_suites] if name in planned),
    }
    return (
        options
        | code()
        | {f"file {name}": digest(file) for name, file in imported_user_files().items()}
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _alone(item.config):
        result = yield
    item.config.stash[_channel].send(event="done", case=_case(item).id)
    return result


@contextlib.contextmanager
def _alone(config: pytest.Config) -> Iterator[None]:
    """Hold the lock of the machine, which all benches share; report a wait for it."""
    channel, lock = config.stash[_channel], device_lock(config.getoption("--danon-device"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        channel.send(event="waiting")
        lock.acquire()
        channel.send(event="going")
    try:
        yield
    finally:
        lock.release()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_session] = session


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Report that pytest came to its end: a process that was killed has not."""
    if (session := config.stash.get(_session, None)) is not None:
        config.stash[_channel].send(event="finished", status=int(session.exitstatus))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    device = torch.device(config.getoption("--danon-device"))
    machine_info["danon"] = fingerprint(device)


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> CaseRunner:
    channel = pytestconfig.stash[_channel]
    run_dir = pytestconfig.stash[_answer].get("run")
    profile, isolation = pytestconfig.stash[_profile], pytestconfig.stash[_isolation]

    def begin(case: Case) -> None:
        channel.send(
            event="begin", case=case.id, described=asdict(case), limit_s=profile.limit(case)
        )

    def keep(result: CaseResult) -> None:
        channel.ask(event="result", result=result.to_json())
        if isolation.needs_new_process and channel.heard:
            channel.send(event="leaving")
            os._exit(0)  # threads of an attention would hold a usual exit up

    return CaseRunner(
        profile,
        on_begin=begin,
        on_result=keep,
        earlier=Journal(run_dir).results() if run_dir else (),
        isolation=isolation,
        integrity=pytestconfig.stash[_integrity],
        run_dir=Path(run_dir) if run_dir else None,
        note=lambda text: channel.send(event="note", text=text),
    )


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.config.stash[_cases][request.param]


@pytest.fixture
def measure(runner: CaseRunner, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Return a function that measures a case.

    Its figures go to pytest-benchmark; a case without figures is skipped or fails.
    """

    def run(case: Case) -> None:
        result = runner.result(case)
        if result.status == "failed":
            pytest.fail(result.reason, pytrace=False)
        if result.status != "measured":
            pytest.skip(f"{result.status}: {result.reason}")
        if samples := runner.samples(result):
            replay(result, samples, request.getfixturevalue("benchmark"))

    return run


def _words(config: pytest.Config, option: str) -> list[str]:
    text: str = config.getoption(f"--danon-{option}")
    return [word.strip() for word in text.split(",") if word.strip()]


def _parameter(item: pytest.Item) -> object:
    assert isinstance(item, pytest.Function)
    return item.callspec.params["case"]


def _case(item: pytest.Item) -> Case:
    identifier = _parameter(item)
    assert isinstance(identifier, str)
    return item.config.stash[_cases][identifier]
