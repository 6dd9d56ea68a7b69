"""An actor on every machine of the cluster, and jobs for those that are free."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from danon.cluster.connection import ClusterError, Node, nodes
from danon.cluster.install_check import incompatibility, installed
from danon.cluster.node_actor import Job, NodeActor

__all__ = ["Dispatcher", "WorkerPool"]

TICK_S = 1.0
"""Seconds between calls of ``Dispatcher.tick``."""
REFRESH_S = 5.0
"""Seconds between searches for machines that have joined."""
ANSWER_TIMEOUT_S = 60.0
"""Seconds for a machine to answer what it has installed."""
BUSY_WARNING_S = 20.0
"""Seconds after which a message says that a machine is not free."""
STOP_TIMEOUT_S = 15.0
"""Seconds for a stopped job to end by itself."""
RETRIES = 1
"""New actors for a machine whose actor died."""


class Dispatcher(Protocol):
    """Source of the jobs of a pool, and receiver of their events."""

    @property
    def done(self) -> bool:
        """True when there is nothing left to do."""
        ...

    def tick(self) -> None:
        """Do regular work; called about once a second."""
        ...

    def next_job(self, node: Node) -> Job | None:
        """Return the next job for a free machine; None if there is none now.

        Args:
            node: the machine.
        """
        ...

    def on_event(self, node: Node, event: Any) -> None:
        """Receive an event of a job.

        Args:
            node: the machine.
            event: as the job yielded it.
        """
        ...

    def on_job_end(self, node: Node, *, lost: bool) -> None:
        """Note that a job has ended.

        Args:
            node: the machine.
            lost: True if the machine died or the job did not end by itself.
        """
        ...


@dataclass
class _Worker:
    """An actor on a machine, which may still be starting.

    Attributes:
        node: the machine.
        actor: Ray's handle.
        waits: Ray's reference that it is ready, or its job's events; None when it is free.
        since: time of its start on the monotonic clock.
        ready: True once the actor has started.
        jobs: number of jobs so far.
    """

    node: Node
    actor: Any
    waits: Any
    since: float
    ready: bool = False
    jobs: int = 0


class WorkerPool:
    """Pool of actors, one on each machine of the cluster; a context manager.

    Args:
        device: ``cpu``, or ``cuda`` for machines with a GPU only.
        files: the user's files that every machine must have.
        say: receives messages about machines that join and leave.
        fits: returns the reason why a machine cannot take part; empty if it can.

    Attributes:
        seen_nodes: ids of the nodes that are or were ready for a job.

    Raises:
        ClusterError: there is no machine, or one that cannot take part.
    """

    def __init__(
        self,
        device: str,
        files: Sequence[str],
        say: Callable[[str], object],
        fits: Callable[[Node], str] = lambda node: "",
    ) -> None:
        self._device, self._files, self._say, self._fits = device, tuple(files), say, fits
        self._folder = str(Path.cwd())
        self._here = installed(self._folder, self._files)
        self.seen_nodes: set[str] = set()
        self._workers: dict[str, _Worker] = {}
        self._deaths: Counter[str] = Counter()
        self._refused: set[str] = set()
        self._queries: dict[Any, Node] = {}  # by Ray's reference to the answer
        self._queried_s = 0.0
        self._query_nodes()
        for node, reason in self._query_answers(ANSWER_TIMEOUT_S):
            if reason:
                raise ClusterError(f"{node} {reason}")
            self._start_actor(node)
        if self._queries:
            late = next(iter(self._queries.values()))
            raise ClusterError(f"{late} does not answer within {ANSWER_TIMEOUT_S:.0f} s")
        if not self._workers:
            needed = "a GPU" if device == "cuda" else "a CPU"
            raise ClusterError(f"the cluster has no node that is alive and has {needed}")

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all actors."""
        import ray

        for worker in self._workers.values():
            ray.kill(worker.actor)
        self._workers.clear()

    @property
    def nodes(self) -> list[Node]:
        """Machines that take part."""
        return [worker.node for worker in self._workers.values()]

    def refuse(self, node: Node, reason: str) -> None:
        """Exclude a machine whose job has ended.

        Args:
            node: the machine.
            reason: for the message.
        """
        self._refused.add(node.id)
        self._kill(self._workers[node.id])
        self._say(f"{node}: {reason}; it takes no more part")

    def run(self, work: Dispatcher, stopped: Callable[[], object] = lambda: False) -> None:
        """Give jobs and receive events until the work is done or stopped.

        Args:
            work: source of the jobs.
            stopped: returns something true to stop.

        Raises:
            ClusterError: no machine is left.
        """
        try:
            while not (work.done or stopped()):
                self._refresh()
                if not self._workers and not self._has_replacement(stopped):
                    raise ClusterError("no node of the cluster is left")
                work.tick()
                for worker in list(self._workers.values()):
                    if worker.waits is None and (job := work.next_job(worker.node)) is not None:
                        self._submit(worker, job)
                self._receive(work)
        except BaseException:
            self._stop(work)  # its own error matters less than this one
            raise
        if error := self._stop(work):
            raise error

    def _submit(self, worker: _Worker, job: Job) -> None:
        worker.jobs += 1
        streaming = worker.actor.run_job.options(num_returns="streaming")
        worker.waits = streaming.remote(worker.jobs, job)

    def _receive(self, work: Dispatcher) -> None:
        import ray

        waiting = {m.waits: m for m in self._workers.values() if m.waits is not None}
        if not waiting:
            time.sleep(TICK_S)
            return
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=TICK_S)
        for reference in ready:
            worker = waiting[reference]
            try:
                self._handle(work, worker)
            except ray.exceptions.RayError as error:
                self._drop(work, worker, error)
        for worker in waiting.values():
            if not worker.ready and time.monotonic() - worker.since > BUSY_WARNING_S:
                self._say(f"{worker.node} is not free yet: it takes part as soon as it is")
                worker.since = float("inf")

    def _handle(self, work: Dispatcher, worker: _Worker) -> None:
        """Handle the next event of a worker, or that its actor is ready."""
        import ray

        if not worker.ready:
            nice = ray.get(worker.waits)
            worker.ready, worker.waits = True, None
            if nice > 0 and worker.node.id not in self.seen_nodes:
                self._say(
                    f"{worker.node} measures at nice {nice}, unlike a bench without Ray: set "
                    "RAY_worker_niceness=0 there before `ray start`"
                )
            self.seen_nodes.add(worker.node.id)
            return
        try:
            event = ray.get(next(worker.waits))
        except StopIteration:
            worker.waits = None
            work.on_job_end(worker.node, lost=False)
        else:
            work.on_event(worker.node, event)

    def _drop(self, work: Dispatcher, worker: _Worker, error: Exception) -> None:
        self._kill(worker)
        self._deaths[worker.node.id] += 1
        self._say(f"{worker.node} is lost: {_why(error)}")
        if worker.ready:
            work.on_job_end(worker.node, lost=True)

    def _has_replacement(self, stopped: Callable[[], object]) -> bool:
        """Return True once a machine has an actor again, or the work is stopped."""
        self._query_nodes()
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while self._queries and time.monotonic() < end and not (self._workers or stopped()):
            self._refresh(TICK_S)
        return bool(self._workers or stopped())

    def _refresh(self, seconds: float = 0) -> None:
        """Start actors on machines that have joined or whose actor died."""
        if time.monotonic() - self._queried_s > REFRESH_S:
            self._query_nodes()
        for node, reason in self._query_answers(seconds):
            if reason:
                self._refused.add(node.id)
                self._say(f"{node} {reason}; it takes no part")
            else:
                self._start_actor(node)

    def _query_nodes(self) -> None:
        """Ask machines without an actor what they have installed."""
        import ray

        self._queried_s = time.monotonic()
        busy = {*self._workers, *self._refused, *(node.id for node in self._queries.values())}
        query = ray.remote(_installed_task())
        for node in nodes(self._device):
            if node.id not in busy and self._deaths[node.id] <= RETRIES:
                task = query.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node))
                self._queries[task.remote(self._folder, self._files)] = node

    def _query_answers(self, seconds: float) -> list[tuple[Node, str]]:
        """Return machines that have answered, and the reason why each cannot take part."""
        import ray

        if not self._queries:
            return []
        answers, _ = ray.wait(list(self._queries), num_returns=len(self._queries), timeout=seconds)
        answered = []
        for answer in answers:
            node = self._queries.pop(answer)
            try:
                reason = self._fits(node) or incompatibility(self._here, ray.get(answer))
            except ray.exceptions.RayTaskError as error:
                reason = f"cannot say what it has installed: {error.cause}"
            except ray.exceptions.RayError:
                continue  # the machine died in the meantime
            answered.append((node, reason))
        return answered

    def _start_actor(self, node: Node) -> None:
        """Start an actor that reserves all CPUs, so that Ray runs nothing else on the machine."""
        import ray

        gpus = {"num_gpus": 1} if self._device == "cuda" else {}
        actor = (
            ray.remote(NodeActor)
            .options(num_cpus=node.cpus, scheduling_strategy=_on(node), max_concurrency=2, **gpus)
            .remote(self._folder, node.id)
        )
        self._workers[node.id] = _Worker(node, actor, actor.ready.remote(), time.monotonic())

    def _stop(self, work: Dispatcher) -> Exception | None:
        """Stop the running jobs, receive their last events, and return the first error.

        An actor that is still busy afterwards is ended: the next work must not get its events.
        """
        errors: list[Exception] = []
        for worker in self._busy():
            worker.actor.stop.remote(worker.jobs)
        end = time.monotonic() + STOP_TIMEOUT_S
        try:
            while time.monotonic() < end and self._busy():
                try:
                    self._receive(work)
                except Exception as error:  # noqa: BLE001  the others still get their events
                    errors.append(error)
        finally:
            for worker in self._busy():
                self._kill(worker)
                try:
                    work.on_job_end(worker.node, lost=True)
                except Exception as error:  # noqa: BLE001
                    errors.append(error)
        return errors[0] if errors else None

    def _busy(self) -> list[_Worker]:
        """Return the workers that run a job."""
        return [m for m in self._workers.values() if m.ready and m.waits is not None]

    def _kill(self, worker: _Worker) -> None:
        import ray

        del self._workers[worker.node.id]
        ray.kill(worker.actor)


def _on(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _installed_task() -> Callable[[str, tuple[str, ...]], dict[str, str]]:
    """Return :func:`installed` as a function that Ray can send to machines without danon."""

    def task(folder: str, files: tuple[str, ...]) -> dict[str, str]:
        try:
            from danon.cluster.install_check import installed
        except ImportError as error:
            return {"error": str(error)}
        return installed(folder, files)

    return task


def _why(error: Exception) -> str:
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return f"its job failed: {type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it does not answer any more"
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died"
    return " ".join(str(error).split())[:200]
