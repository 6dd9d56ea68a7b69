"""pytest's side of the suites: options, one test a case, and what becomes of an outcome."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from danon.experiment.runs import Journal
from danon.measure.alone import alone
from danon.measure.case import Case
from danon.measure.fingerprint import fingerprint
from danon.measure.integrity import Integrity
from danon.measure.side_effects import Helpers
from suites.attentions import check_contract, gather
from suites.channel import Channel
from suites.guard import limit_memory
from suites.keeper import Keeper
from suites.lab import Lab
from suites.profiles import PROFILES, Profile, visible_profiles
from suites.replay import replay

DEVICES = ("cpu", "cuda")
SUITES = (
    "speed", "memory", "decode", "bounds", "scaling", "recall", "language", "pretrained",
)  # fmt: skip
_channel = pytest.StashKey[Channel]()
_profile = pytest.StashKey[Profile]()
_cases = pytest.StashKey[dict[str, Case]]()
_names = pytest.StashKey[tuple[str, ...]]()
_integrity = pytest.StashKey[Integrity]()
_answer = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("danon")
    group.addoption("--danon-profile", default="quick", help=", ".join(visible_profiles()))
    group.addoption("--danon-device", default="cpu", help=", ".join(DEVICES))
    group.addoption(
        "--danon-attention", action="append", default=[], help="file.py:Class to measure as well"
    )
    group.addoption("--danon-only", default="", help="registered names to keep, comma separated")
    group.addoption("--danon-one", default="", help="registered name whose cases alone are run")
    group.addoption("--danon-suites", default="", help=f"of {', '.join(SUITES)}; all without")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse whatever is wrong before anything is measured."""
    channel = config.stash[_channel] = Channel()
    try:
        _prepare(config)
    except ValueError as error:
        channel.send(event="refused", reason=str(error))
        raise pytest.UsageError(str(error)) from error


def _prepare(config: pytest.Config) -> None:
    name, device = config.getoption("--danon-profile"), config.getoption("--danon-device")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: {', '.join(visible_profiles())}")
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch finds no CUDA device here; use --device cpu")
    integrity = config.stash[_integrity] = Integrity.take("danon.measure", "suites")
    helpers = Helpers.now()
    names, own = gather(config.getoption("--danon-attention"), _words(config, "only"))
    if replaced := integrity.replaced():
        integrity.restore()
        targets = ", ".join(config.getoption("--danon-attention"))
        raise ValueError(
            f"{targets}: replaces {', '.join(replaced[:3])} while it is loaded; what measures must "
            "stay as it is"
        )
    for suite in _words(config, "suites"):
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    profile = config.stash[_profile] = PROFILES[name]
    dtypes = {d for block in (*profile.speed, *profile.memory) for d in block.dtypes}
    for attention in own:
        check_contract(attention, sorted(dtypes), device)
        if left := Helpers.now().since(helpers):
            raise ValueError(f"attention {attention!r} leaves {left}")
    one = config.getoption("--danon-one")
    if one and one not in names:
        raise ValueError(f"--danon-one {one!r}: must be one of {', '.join(names)}")
    config.stash[_names], config.stash[_cases] = names, {}
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or models would be trained on what else is here
        limit_memory()  # CUDA reserves more address space than it uses


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    suite = metafunc.function.__name__.removeprefix("test_")
    cases = config.stash[_profile].cases(config.stash[_names], config.getoption("--danon-device"))
    # Identifiers, not cases: pytest-benchmark stores the parameters in its JSON.
    wanted = suite in (_words(config, "suites") or SUITES)
    one = config.getoption("--danon-one")
    mine = {
        case.id: case for case in cases
        if wanted and case.suite == suite and one in ("", case.attention)
    }  # fmt: skip
    config.stash[_cases] |= mine
    metafunc.parametrize("case", mine, ids=[i.partition("/")[2] for i in mine], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Short lengths first, whatever the suite: long ones are forecast from them.

    What has a task comes last, all lengths of a training together: killed in between and resumed,
    a bench trains again only what it was at.
    """
    items[:] = [item for item in items if isinstance(_parameter(item), str)]  # a suite not wanted
    items.sort(key=lambda item: (not _case(item).task and _case(item).length) or math.inf)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly:
        return
    profile = config.stash[_profile]
    cases = [_case(item) for item in session.items]
    plan = [(case.id, profile.weight(case)) for case in cases]
    device = torch.device(config.getoption("--danon-device"))
    config.stash[_answer] = config.stash[_channel].ask(
        event="plan", cases=plan, attentions=[case.attention for case in cases],
        fingerprint=fingerprint(device),
    )  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with alone(item.config.getoption("--danon-device")):
        result = yield
    item.config.stash[_channel].send(event="done", case=_case(item).id)
    return result


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    device = torch.device(config.getoption("--danon-device"))
    machine_info["danon"] = fingerprint(device)


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Lab:
    channel = pytestconfig.stash[_channel]
    run_dir = pytestconfig.stash[_answer].get("run")

    def note(text: str) -> None:
        channel.send(event="note", text=text)

    return Lab(
        pytestconfig.stash[_profile],
        on_begin=lambda case: channel.send(event="begin", case=case.id),
        on_result=lambda result: channel.ask(event="result", result=result.to_json()),
        known=Journal(run_dir).results() if run_dir else (),
        keeper=Keeper(Path(run_dir), note) if run_dir else None,
        integrity=pytestconfig.stash[_integrity],
    )


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.config.stash[_cases][request.param]


@pytest.fixture
def measure(lab: Lab, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Measure a case: figures go to pytest-benchmark, a reason instead becomes skip or failure."""

    def run(case: Case) -> None:
        result = lab.result(case)
        if result.status == "failed":
            pytest.fail(result.reason, pytrace=False)
        if result.status != "measured":
            pytest.skip(f"{result.status}: {result.reason}")
        replay(result, lab.samples(result), request.getfixturevalue("benchmark"))

    return run


def _words(config: pytest.Config, option: str) -> list[str]:
    given: str = config.getoption(f"--danon-{option}")
    return [word.strip() for word in given.split(",") if word.strip()]


def _parameter(item: pytest.Item) -> object:
    assert isinstance(item, pytest.Function)
    return item.callspec.params["case"]


def _case(item: pytest.Item) -> Case:
    identifier = _parameter(item)
    assert isinstance(identifier, str)
    return item.config.stash[_cases][identifier]
