"""Hostile and repeatable: fresh memory is NaN, every test starts from the same seed."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from repositories import two_commits

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.measure.torch_settings import open_autocast_regions
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.tracking import store

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

# In deterministic mode torch fills what torch.empty returns, inside its own kernels too: with NaN,
# or the largest integer.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
# Beside another process of tests, a second thread costs more than it computes.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if "PYTEST_XDIST_WORKER" in os.environ:
    # A temporary folder of its own has a lock of its own: no test is about exact times, so benches
    # and studies of two processes of tests need not take turns.
    _folder = tempfile.TemporaryDirectory(prefix="danon-tests-", ignore_cleanup_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = _folder.name

# Who starts the tests may ignore signals (nohup, a shell's background job), and every process that
# they start would, too.
for _name, _handler in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _closed_autocast() -> Iterator[None]:
    """Nothing leaves an autocast region open: every later training would read stale weights."""
    yield
    assert open_autocast_regions() == 0


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """For looks at what is kept: each would go through all objects of torch, as in the suites."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that a second thread costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a store with its schema, for copies: creating one takes seconds, copying it none."""
    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        store.connect(store.tracking_uri())
    return file


@pytest.fixture
def sqlite(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    file = tmp_path / "store" / "mlflow.db"
    file.parent.mkdir()
    file.write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return store.tracking_uri()


@pytest.fixture
def bring() -> Iterator[Callable[[str, type[BaseAttention]], str]]:
    """Register an attention for the time of one test."""
    added: list[str] = []

    def add(name: str, kind: type[BaseAttention]) -> str:
        registry.register(name)(kind)
        added.append(name)
        return name

    yield add
    for name in added:
        del registry._TABLE[name]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Somebody's own, with an attention that a second commit makes slower."""
    return two_commits(tmp_path / "theirs")


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork worker processes; tests of the processes themselves start them as danon does."""
    from forked_workers import forking_subprocess

    from danon.processes import request_server

    monkeypatch.setattr(request_server, "subprocess", forking_subprocess)


@pytest.fixture(scope="session")
def gate_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the inputs that the gate's workers read."""
    from danon.gate import workspace

    return workspace.write_inputs(tmp_path_factory.mktemp("gate") / "inputs.pt")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Start a server with its socket in a temporary folder, and yield its address."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed")
    user = "nobody" if os.geteuid() == 0 else None  # it does not run as root

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")

    with tempfile.TemporaryDirectory(prefix="danon-pg-") as folder:  # a socket's path is short
        if user is not None:
            shutil.chown(folder, user)
        data, options = f"{folder}/data", f"-c listen_addresses= -k {folder}"
        run("initdb", "-D", data, "-A", "trust", "-U", "danon")
        run("pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{folder}/log", "start")
        try:
            yield f"postgresql+psycopg://danon@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


@pytest.fixture
def info() -> RunInfo:
    return RunInfo.capture("quick", 7, "danon bench", {"cpu": "a processor", "cores": "2"})


@pytest.fixture
def journal(tmp_path: Path, info: RunInfo) -> Journal:
    return Journal.create(tmp_path / "runs", info)
