"""Tune and bench on a real Ray cluster of two nodes, one of which dies in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
import pytest

from danon.processes.interpreter import bundle
from danon.runs.journal import Journal
from danon.tuning import storage
from danon.tuning.study import progress, resume

pytest.importorskip("ray", reason="Ray is not installed (pip install danon[ray])")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NO_STORE = "http://127.0.0.1:9"
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
raylets = [cluster.add_node(num_cpus=1) for _ in range(2)]
pids = [node.all_processes["raylet"][0].process.pid for node in raylets]
print(cluster.address, *[f"{n.node_id}:{p}" for n, p in zip(raylets, pids)], flush=True)
sys.stdin.read()
cluster.shutdown()
"""
FEWER = (
    "from danon.tuning import candidates\n"
    "candidates.REPEATS, candidates.CHOOSING_REPEATS, candidates.MAX_REPEATED = 2, 1, 1\n"
)
DANON = "from danon.cli.main import main; main()"
MINE = """
import torch
from danon import BaseAttention
from danon.tuned.search_space import Float, Space


class Mine(BaseAttention):
    description = "dense, with a decay"

    def __init__(self, config, decay=1e-3):
        super().__init__()
        self.setup_attention(config)
        self.decay = decay

    @classmethod
    def search_space(cls):
        return Space({"decay": Float(1e-5, 1e-2, log=True)}, {"decay": 1e-3})

    def forward(self, q, k, v, mask=None):
        at = torch.arange(q.shape[2])
        logits = self.compute_attention(q, k) - self.decay * (at[:, None] - at)
        return torch.softmax(logits, dim=-1) @ v
"""
QUICK = "from danon.tuning import measured_case\nmeasured_case.TIMING_S = 0.1\n"
TUNE = (
    "tune",
    "--attention",
    "mine.py:Mine",
    "--objective",
    "speed",
    "--length",
    "192",
    "--dtype",
    "float32",
    "--trials",
    "8",
    "--sampler",
    "random",
    "--study",
    "s",
    "--storage",
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(bundle()),
    "RAY_USAGE_STATS_ENABLED": "0",
    "ACCELERATE_USE_CPU": "true",
}


class Nodes:
    """A cluster: a head without a CPU, for the command, and two nodes that measure."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.address, *nodes = process.stdout.readline().split()
        self.raylets = {node: int(pid) for node, pid in (some.split(":") for some in nodes)}

    def kill(self, node: str) -> None:
        """Kill a node with all that runs on it, as a machine dies."""
        raylet = psutil.Process(self.raylets[node])
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    ) as process:
        try:
            yield Nodes(process)
        finally:
            process.communicate("")


class Command:
    """A command of danon's; what it says goes to a file."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        before: str = "",
        store: str = NO_STORE,
        said: str = "said",
    ) -> None:
        self._log = folder / said
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", before + DANON, *arguments],
                cwd=folder,
                env={**ENVIRONMENT, "MLFLOW_TRACKING_URI": store},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def until(self, look: Callable[[], Any]) -> Any:
        """Call ``look`` until it finds something, and return that."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := look():
                return found
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(self.said)

    def family(self, look: Callable[[], Any]) -> list[psutil.Process]:
        """Return the processes below the command once ``look`` finds something."""
        self.until(look)
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, seconds: float = 200) -> tuple[int, str]:
        """Exit status and what it said."""
        try:
            return self.process.wait(seconds), self.said
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.said) from None


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_study_continues_after_a_node_dies(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    cluster = (url, "--engine", "ray", "--address", nodes.address)
    command = Command(tmp_path, *TUNE, *cluster, before=FEWER)

    def trials(*states: str) -> list[optuna.trial.FrozenTrial]:
        if "Study" not in command.said:  # it may not be made yet
            return []
        study = optuna.load_study(study_name="s", storage=url)
        return [t for t in study.get_trials(deepcopy=False) if t.state.name in states]

    def of(node: str, *states: str) -> list[int]:
        origins = {t.number: t.user_attrs.get("origin", {}) for t in trials(*states)}
        return [n for n, o in origins.items() if o.get("place", {}).get("node") == node]

    doomed, other = nodes.raylets
    command.until(lambda: of(doomed, "COMPLETE") and of(other, "COMPLETE"))
    command.until(lambda: of(doomed, "RUNNING"))
    nodes.kill(doomed)
    status, said = command.end()
    assert status == 0, said
    assert "is lost" in said and "Traceback" not in said
    found = progress(optuna.load_study(study_name="s", storage=url))
    assert found.finished == 8 and found.failed == 0 and found.running == found.waiting == 0
    assert found.died == 1 and found.repeats >= 2
    (died,) = [t for t in trials("FAIL") if "surplus" not in t.user_attrs]
    (again,) = [
        t
        for t in trials("FAIL", "COMPLETE")
        if died.number in t.system_attrs.get("retry_history", [])
    ]
    assert again.state.name == "COMPLETE"
    assert died.params.items() <= again.params.items()  # it may have died before it had any
    assert again.user_attrs["origin"]["place"]["node"] == other
    assert f"node {doomed[:8]}" in said and f"node {other[:8]}" in said
    tuned = json.loads((tmp_path / "results" / "tuned" / "Mine.json").read_text())
    assert "place" not in tuned["best"]["speed"]["provenance"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_workers_and_a_node_die_in_two_hundred_trials(
    nodes: Nodes, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "mine.py").write_text(MINE + QUICK)
    url = (
        f"sqlite:///{tmp_path / 'optuna.db'}"
        if kind == "sqlite"
        else request.getfixturevalue("postgresql")
    )
    cluster = (url, "--trials", "200", "--engine", "ray", "--address", nodes.address)
    command = Command(tmp_path, *TUNE, *cluster, before=FEWER)
    command.until(lambda: "trial 0" in command.said)
    with storage.opened(url) as database:
        study = resume("s", database)

        def found(*states: str) -> list[optuna.trial.FrozenTrial]:
            trials = study.get_trials(deepcopy=False)
            return [t for t in trials if t.state.name in states and "origin" in t.user_attrs]

        def at(node: str | None) -> list[int]:
            running = {t.number: t.user_attrs["origin"].get("place", {}) for t in found("RUNNING")}
            return [number for number, place in running.items() if place.get("node") == node]

        join = ("tune", "worker", "--study", "s", "--storage", url)
        doomed = next(iter(nodes.raylets))
        with contextlib.ExitStack() as stack:
            for n in range(2):
                worker = Command(tmp_path, *join, said=f"worker {n}").process
                stack.enter_context(worker)
                stack.callback(worker.kill)
            ended = ("COMPLETE", "PRUNED")
            command.until(lambda: len(found(*ended)) >= 20 and len(at(None)) == 2)
            nodes.kill(doomed)
        lost = [*at(None), *at(doomed)]
        status, said = command.end(800)
        assert status == 0, said
        whole = progress(study)
        assert (whole.finished, whole.failed) == (200, 0)
        assert 1 <= len(lost) <= whole.died <= 3, "a worker between two trials has none to lose"
        assert whole.running == whole.waiting == 0
        first = [t for t in found(*ended) if "again" not in t.user_attrs]
        assert len(first) == len({t.params["decay"] for t in first}) == 200, "one is counted twice"
        for trial in (t for t in found("FAIL") if "surplus" not in t.user_attrs):
            number = trial.number
            same = [t for t in study.trials if number in t.system_attrs.get("retry_history", [])]
            assert [t.state.name in ended for t in same] == [True], "retried once"


def test_bench_continues_after_a_node_dies(nodes: Nodes, tmp_path: Path) -> None:
    command = Command(
        tmp_path,
        "bench",
        "--profile",
        "smoke",
        "--only",
        "window,linear",
        "--suites",
        "speed,memory,recall",
        "--engine",
        "ray",
        "--address",
        nodes.address,
    )

    def journal() -> Journal | None:
        found = list(tmp_path.glob("results/runs/*/run.json"))
        return Journal(found[0].parent) if found else None

    def measured() -> set[str]:
        found = journal()
        return {r.place["node"] for r in found.results()} if found else set()

    command.until(lambda: measured() >= set(nodes.raylets))
    found = journal()
    assert found is not None
    last = found.results()[-1]
    nodes.kill(last.place["node"])
    status, said = command.end()
    assert status == 0, said
    assert "is lost" in said and "Traceback" not in said
    assert "measures at nice" in said  # nobody told this Ray otherwise
    assert found.status == "FINISHED"
    results = found.results()
    assert {r.place["node"] for r in results} == set(nodes.raylets)
    assert last.to_json() in {r.to_json() for r in results}, "what was received is kept"
    assert all(r.status == "measured" for r in results), results
    assert len(lines(found.run_dir / "cases.jsonl")) == len(results), "measured twice"
    stored = json.loads((found.run_dir / "results.json").read_text())["results"]
    assert all(r["place"]["machine"]["id"] for r in stored)
    names = {r.case.attention for r in results}
    assert all((found.run_dir / f"benchmark-{name}.json").is_file() for name in names)
    assert {p.name for p in (found.run_dir / "models").iterdir()} == {f"{n}-mqar" for n in names}
    assert "and 1 more machine: danon report --tables" in " ".join(said.split())
    report = (found.run_dir / "report.html").read_text(encoding="utf-8")
    for node in nodes.raylets:
        assert f"node {node[:8]}: " in report


def test_interrupted_bench_on_a_local_ray_leaves_no_process(tmp_path: Path) -> None:
    arguments = (
        "bench",
        "--profile",
        "smoke",
        "--only",
        "window",
        "--suites",
        "speed",
        "--engine",
        "ray",
    )
    command = Command(tmp_path, *arguments)
    cases = "results/runs/*/cases.jsonl"
    family = command.family(lambda: [file for file in tmp_path.glob(cases) if lines(file)])
    command.process.send_signal(signal.SIGINT)
    status, said = command.end(60)
    assert status == 130, said
    assert "--resume continues" in said and "Traceback" not in said
    assert not psutil.wait_procs(family, timeout=15)[1]
    command = Command(tmp_path, *arguments, "--resume")
    status, said = command.end()
    assert status == 0 and "measured already" in said, said


def test_interrupted_study_requeues_its_trial(tmp_path: Path, sqlite: str) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    command = Command(tmp_path, *TUNE, url, "--engine", "ray", store=sqlite)
    family = command.family(lambda: "trial 1 on " in command.said)
    command.process.send_signal(signal.SIGTERM)
    status, said = command.end(60)
    assert status == 128 + signal.SIGTERM, said
    assert "interrupted by SIGTERM: the same command goes on" in said and "Traceback" not in said
    found = progress(optuna.load_study(study_name="s", storage=url))
    assert found.running == 0 and found.waiting == found.died <= 1 and found.finished >= 2
    assert os.nice(0) > 0 or "at nice" not in said
    client = mlflow.MlflowClient(sqlite)
    experiment = client.get_experiment_by_name("danon/tune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sum("danon.place" in run.data.tags for run in runs) >= found.finished
    assert not psutil.wait_procs(family, timeout=15)[1]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (
            "import socket; socket.gethostname = lambda: 'elsewhere'\n",
            "cannot reach --storage sqlite:///o.db, a file of elsewhere",
        ),
        (
            "from danon.cluster import pool; real = pool.installed\n"
            "pool.installed = lambda *given: {**real(*given), 'code': 'newer'}\n",
            "has other code of danon",
        ),
    ],
)
def test_machine_that_cannot_take_part_is_named(
    nodes: Nodes, tmp_path: Path, before: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    cluster = ("sqlite:///o.db", "--engine", "ray", "--address", nodes.address)
    status, said = Command(tmp_path, *TUNE, *cluster, before=before).end(60)
    assert status == 2 and len(said.splitlines()) == 1
    assert said.startswith("danon: ") and words in said
