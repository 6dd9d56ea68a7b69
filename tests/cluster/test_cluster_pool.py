"""A pool of workers and the jobs of a study, on a Ray that a test stands for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from danon.cluster import pool
from danon.cluster.connection import ClusterError, Node
from danon.tuning.ray_executor import _DescribeDispatcher, _StudyDispatcher
from danon.tuning.study import StudyError
from danon.tuning.study_run import StudyRun

NODES = [Node(name * 8, f"host-{name}", "10.0.0.1", 1, 0) for name in "ab"]


class _Ray:
    """The pool's Ray, without processes: jobs yield what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exceptions = pytest.importorskip("ray").exceptions
        self.killed: list[str] = []
        self.said: list[str] = []
        self.nice = 0
        self.alive = list(NODES)
        monkeypatch.setitem(sys.modules, "ray", self)
        monkeypatch.setattr(pool, "TICK_S", 0.01)
        monkeypatch.setattr(pool, "STOP_TIMEOUT_S", 0.05)
        monkeypatch.setattr(
            pool.WorkerPool, "_query_nodes", lambda of: _query_nodes(of, self.alive)
        )
        monkeypatch.setattr(pool.WorkerPool, "_start_actor", _start_actor)
        monkeypatch.setattr(pool, "installed", lambda *_: {"code": ""})
        self.pool = pool.WorkerPool("cpu", (), self.said.append)

    def wait(self, what: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        if isinstance(what[0], tuple) and what[0][0] == "answer":
            return list(what), []
        ready = [some for some in what if isinstance(some, tuple)]
        ready += [some for some in what if isinstance(some, _Stream) and some.ready]
        if not ready:
            time.sleep(0.01)
        return ready[:1], []

    def get(self, what: Any) -> Any:
        if isinstance(what, self.exceptions.RayError):
            raise what
        if isinstance(what, tuple):
            return {"code": ""} if what[0] == "answer" else self.nice
        return what

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.node.id)


def _query_nodes(of: Any, alive: list[Node]) -> None:
    known = {*of._workers, *of._refused}
    of._queried_s = time.monotonic()
    of._queries = {
        ("answer", n.id): n for n in alive if n.id not in known and of._deaths[n.id] <= pool.RETRIES
    }


def _start_actor(of: Any, node: Node) -> None:
    start = time.monotonic()
    of._workers[node.id] = pool._Worker(node, _Actor(node), ("ready", node.id), start)


class _Stream:
    """Yields of a job; ``...`` is silence until it is stopped."""

    def __init__(self, events: Iterable[Any]) -> None:
        self._events = list(events)

    @property
    def ready(self) -> bool:
        return self._events[:1] != [...]

    def __next__(self) -> Any:
        if not self._events:
            raise StopIteration
        return self._events.pop(0)


class _Actor:
    def __init__(self, node: Node) -> None:
        self.node = node
        streaming = SimpleNamespace(remote=lambda number, job: _Stream(job(node)))
        self.run_job = SimpleNamespace(options=lambda **_: streaming)
        self.stop = SimpleNamespace(remote=lambda number: None)


class _Work:
    """One job for each node."""

    def __init__(self, job: Callable[[Node], Iterable[Any]]) -> None:
        self._job, self.wanted = job, {node.id for node in NODES}
        self.events: list[Any] = []
        self.over: list[tuple[str, bool]] = []

    @property
    def done(self) -> bool:
        return not self.wanted and len(self.over) >= len(NODES)

    def tick(self) -> None:
        pass

    def next_job(self, node: Node) -> Any:
        if node.id not in self.wanted:
            return None
        self.wanted.remove(node.id)
        return self._job

    def on_event(self, node: Node, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, Exception):
            raise event

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        self.over.append((node.id, lost))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> _Ray:
    return _Ray(monkeypatch)


class TestWorkerPool:
    def test_actor_that_does_not_stop_is_ended(self, ray: _Ray) -> None:
        """The next work must not get events of the one before."""
        slow = NODES[0]
        work = _Work(lambda node: [...] if node == slow else [KeyError("told")])
        with pytest.raises(KeyError, match="told"):
            ray.pool.run(work)
        assert ray.killed == [slow.id] and (slow.id, True) in work.over
        again = _Work(lambda node: [node.host])
        ray.pool._queried_s = -pool.REFRESH_S  # time goes by
        ray.pool.run(again)
        assert sorted(again.events) == ["host-a", "host-b"]

    def test_error_during_stop_is_raised_after_the_last_event(self, ray: _Ray) -> None:
        work = _Work(lambda node: [node.host, OSError("full"), "last"])
        with pytest.raises(OSError, match="full"):
            ray.pool.run(work, lambda: work.events)
        assert work.events.count("last") == 2 and not ray.killed

    def test_last_actor_that_dies_is_replaced_once(self, ray: _Ray) -> None:
        ray.alive.remove(NODES[1])
        ray.pool._workers.pop(NODES[1].id)
        dies = ray.exceptions.ActorDiedError()
        work = _Work(lambda node: [dies])
        work.next_job = lambda node: work._job  # type: ignore[method-assign]
        with pytest.raises(ClusterError, match="no node of the cluster is left"):
            ray.pool.run(work)
        assert work.over == [(NODES[0].id, True)] * 2

    def test_low_priority_is_reported_once(self, ray: _Ray) -> None:
        ray.nice = 15
        for _ in range(2):
            ray.pool.run(_Work(lambda node: []))
        assert [words[:40] for words in ray.said] == [f"{node} measures"[:40] for node in NODES]
        assert all("at nice 15" in words for words in ray.said)

    def test_failed_job_excludes_one_machine(self, ray: _Ray) -> None:
        full = ray.exceptions.RayTaskError(
            "do", "Traceback ...", OSError(28, "No space left"), "ray::NodeActor", 1, "10.0.0.1"
        )
        work = _Work(lambda node: [full] if node == NODES[0] else [node.host])
        ray.pool.run(work)
        assert work.events == ["host-b"]
        assert sorted(work.over) == [(NODES[0].id, True), (NODES[1].id, False)]
        words = "is lost: its job failed: OSError: [Errno 28] No space left"
        assert ray.said == [f"{NODES[0]} {words}"]


class _Study:
    """The part of a study that a phase looks at."""

    def __init__(self) -> None:
        self.trials: list[Any] = []

    def get_trials(self, **_: object) -> list[Any]:
        return list(self.trials)


class TestStudyDispatcher:
    def run(self, ray: _Ray, *bad: Node) -> None:
        def share() -> Any:
            return lambda node: [{"error": "another space"} if node in bad else {"value": None}]

        run = StudyRun(_Study(), 1)  # type: ignore[arg-type]
        ray.pool.run(_StudyDispatcher(run, share, ray.pool))

    def test_machine_with_an_error_is_left_out(self, ray: _Ray) -> None:
        self.run(ray, NODES[0])
        assert ray.said == [f"{NODES[0]}: another space; it takes no more part"]
        assert ray.pool.nodes == NODES[1:]

    def test_error_on_every_machine_ends_the_study(self, ray: _Ray) -> None:
        with pytest.raises(StudyError, match="another space"):
            self.run(ray, *NODES)

    def test_only_trials_of_the_pool_reach_the_listener(self, ray: _Ray) -> None:
        study, told = _Study(), list[int]()
        listener = SimpleNamespace(on_end=lambda trial: told.append(trial.number))
        ray.pool.run(_Work(lambda node: []))
        run = StudyRun(study, 1, listeners=(listener,))  # type: ignore[arg-type]
        dispatcher = _StudyDispatcher(run, list, ray.pool)  # type: ignore[arg-type]
        state = SimpleNamespace(name="COMPLETE", is_finished=lambda: True)
        for number, node in enumerate((NODES[0].id, "of another command", "")):
            origin = {"place": {"node": node}} if node else {}
            attributes = {"origin": origin}
            study.trials.append(SimpleNamespace(number=number, state=state, user_attrs=attributes))
        dispatcher.report_ended()
        assert told == [0]

    def test_question_without_an_answer_is_asked_again(self, ray: _Ray) -> None:
        given: list[Node] = []

        def question(node: Node) -> list[Any]:
            given.append(node)
            return [{"value": 1}] if len(given) > 1 else []

        asked = _DescribeDispatcher(question)  # type: ignore[arg-type]
        ray.pool.run(asked)
        assert asked.value == 1 and len(given) == 2
