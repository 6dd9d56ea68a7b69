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
LOOK_S = 5.0
"""Between looks for machines that have joined."""
ANSWER_S = 60.0
"""For a machine to say what it has installed."""
BUSY_S = 20.0
"""After which it is said that a machine is not free."""
STOP_S = 15.0
"""For a job that is stopped to end by itself."""
RETRIES = 1
"""Of a machine whose actor died."""


class Dispatcher(Protocol):
    """What a pool is run for."""

    @property
    def done(self) -> bool: ...

    def pulse(self) -> None:
        """Called about once a second."""
        ...

    def offer(self, node: Node) -> Job | None:
        """The next job of a machine that is free; None if it has none for it now."""
        ...

    def heard(self, node: Node, event: Any) -> None:
        """What a job has yielded."""
        ...

    def ended(self, node: Node, *, lost: bool) -> None:
        """A job is over, or its machine has died."""
        ...


@dataclass
class _Worker:
    """An actor on a machine, or one that is to come.

    Attributes:
        jobs: given so far.
        waits: for this: to be ready, or for what its job yields; None when it is free.
    """

    node: Node
    actor: Any
    waits: Any
    since: float
    ready: bool = False
    jobs: int = 0


class WorkerPool:
    """Has each machine for itself; a context manager.

    Args:
        device: cpu or cuda, which only machines with a GPU have.
        files: of the user, that every machine must have.
        say: hears of machines that come and go.
        fits: why a machine cannot take part; empty if it can.

    Attributes:
        had: ids of the nodes that were ready for a job, now or before.

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
        self.had: set[str] = set()
        self._members: dict[str, _Worker] = {}
        self._deaths: Counter[str] = Counter()
        self._refused: set[str] = set()
        self._asked: dict[Any, Node] = {}  # by the answer that is to come
        self._looked = 0.0
        self._ask()
        for node, reason in self._answered(ANSWER_S):
            if reason:
                raise ClusterError(f"{node} {reason}")
            self._hire(node)
        if self._asked:
            late = next(iter(self._asked.values()))
            raise ClusterError(f"{late} does not answer within {ANSWER_S:.0f} s")
        if not self._members:
            needed = "a GPU" if device == "cuda" else "a CPU"
            raise ClusterError(f"the cluster has no node that is alive and has {needed}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for member in self._members.values():
            ray.kill(member.actor)
        self._members.clear()

    @property
    def nodes(self) -> list[Node]:
        return [member.node for member in self._members.values()]

    def refuse(self, node: Node, reason: str) -> None:
        """Let a machine whose job is over take no more part."""
        self._refused.add(node.id)
        self._let_go(self._members[node.id])
        self._say(f"{node}: {reason}; it takes no more part")

    def run(self, work: Dispatcher, stopped: Callable[[], object] = lambda: False) -> None:
        """Give and hear until the work is done, or stopped.

        Raises:
            ClusterError: no machine is left.
        """
        try:
            while not (work.done or stopped()):
                self._look()
                if not self._members and not self._regained(stopped):
                    raise ClusterError("no node of the cluster is left")
                work.pulse()
                for member in list(self._members.values()):
                    if member.waits is None and (job := work.offer(member.node)) is not None:
                        self._give(member, job)
                self._hear(work)
        except BaseException:
            self._stop(work)  # what fails in it is less than this
            raise
        if error := self._stop(work):
            raise error

    def _give(self, member: _Worker, job: Job) -> None:
        member.jobs += 1
        streaming = member.actor.do.options(num_returns="streaming")
        member.waits = streaming.remote(member.jobs, job)

    def _hear(self, work: Dispatcher) -> None:
        import ray

        waiting = {m.waits: m for m in self._members.values() if m.waits is not None}
        if not waiting:
            time.sleep(TICK_S)
            return
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=TICK_S)
        for what in ready:
            member = waiting[what]
            try:
                self._take(work, member)
            except ray.exceptions.RayError as error:
                self._lose(work, member, error)
        for member in waiting.values():
            if not member.ready and time.monotonic() - member.since > BUSY_S:
                self._say(f"{member.node} is not free yet: it takes part as soon as it is")
                member.since = float("inf")

    def _take(self, work: Dispatcher, member: _Worker) -> None:
        """What a member waited for is there."""
        import ray

        if not member.ready:
            nice = ray.get(member.waits)
            member.ready, member.waits = True, None
            if nice > 0 and member.node.id not in self.had:
                self._say(
                    f"{member.node} measures at nice {nice}, unlike a bench without Ray: set "
                    "RAY_worker_niceness=0 there before `ray start`"
                )
            self.had.add(member.node.id)
            return
        try:
            event = ray.get(next(member.waits))
        except StopIteration:
            member.waits = None
            work.ended(member.node, lost=False)
        else:
            work.heard(member.node, event)

    def _lose(self, work: Dispatcher, member: _Worker, error: Exception) -> None:
        self._let_go(member)
        self._deaths[member.node.id] += 1
        self._say(f"{member.node} is lost: {_why(error)}")
        if member.ready:
            work.ended(member.node, lost=True)

    def _regained(self, stopped: Callable[[], object]) -> bool:
        """Whether a machine whose actor died has another, or need not."""
        self._ask()
        end = time.monotonic() + ANSWER_S
        while self._asked and time.monotonic() < end and not (self._members or stopped()):
            self._look(TICK_S)
        return bool(self._members or stopped())

    def _look(self, seconds: float = 0) -> None:
        """Machines that have joined, or whose actor died, get one."""
        if time.monotonic() - self._looked > LOOK_S:
            self._ask()
        for node, reason in self._answered(seconds):
            if reason:
                self._refused.add(node.id)
                self._say(f"{node} {reason}; it takes no part")
            else:
                self._hire(node)

    def _ask(self) -> None:
        """Machines without an actor are asked what they have installed."""
        import ray

        self._looked = time.monotonic()
        known = {*self._members, *self._refused, *(node.id for node in self._asked.values())}
        look = ray.remote(_look())
        for node in nodes(self._device):
            if node.id not in known and self._deaths[node.id] <= RETRIES:
                task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node))
                self._asked[task.remote(self._folder, self._files)] = node

    def _answered(self, seconds: float) -> list[tuple[Node, str]]:
        """Machines that have answered, and why they cannot take part."""
        import ray

        if not self._asked:
            return []
        answers, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=seconds)
        found = []
        for answer in answers:
            node = self._asked.pop(answer)
            try:
                reason = self._fits(node) or incompatibility(self._here, ray.get(answer))
            except ray.exceptions.RayTaskError as error:
                reason = f"cannot say what it has installed: {error.cause}"
            except ray.exceptions.RayError:
                continue  # it died meanwhile
            found.append((node, reason))
        return found

    def _hire(self, node: Node) -> None:
        """All of its CPUs are ours, so that Ray runs nothing else there that asks for one."""
        import ray

        gpus = {"num_gpus": 1} if self._device == "cuda" else {}
        actor = (
            ray.remote(NodeActor)
            .options(num_cpus=node.cpus, scheduling_strategy=_on(node), max_concurrency=2, **gpus)
            .remote(self._folder, node.id)
        )
        self._members[node.id] = _Worker(node, actor, actor.ready.remote(), time.monotonic())

    def _stop(self, work: Dispatcher) -> Exception | None:
        """Let jobs that are not over end, and hear what they still say; returns what failed first.

        An actor that is still busy then is let go: the next work must not hear of this one.
        """
        errors: list[Exception] = []
        for member in self._busy():
            member.actor.stop.remote(member.jobs)
        end = time.monotonic() + STOP_S
        try:
            while time.monotonic() < end and self._busy():
                try:
                    self._hear(work)
                except Exception as error:  # noqa: BLE001  the others are heard all the same
                    errors.append(error)
        finally:
            for member in self._busy():
                self._let_go(member)
                try:
                    work.ended(member.node, lost=True)
                except Exception as error:  # noqa: BLE001
                    errors.append(error)
        return errors[0] if errors else None

    def _busy(self) -> list[_Worker]:
        """Those that are at a job."""
        return [m for m in self._members.values() if m.ready and m.waits is not None]

    def _let_go(self, member: _Worker) -> None:
        import ray

        del self._members[member.node.id]
        ray.kill(member.actor)


def _on(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _look() -> Callable[[str, tuple[str, ...]], dict[str, str]]:
    """What a machine is to find out; defined inside, it travels to where there is no danon, too."""

    def look(folder: str, files: tuple[str, ...]) -> dict[str, str]:
        try:
            from danon.cluster.install_check import installed
        except ImportError as error:
            return {"error": str(error)}
        return installed(folder, files)

    return look


def _why(error: Exception) -> str:
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return f"its job failed: {type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it does not answer any more"
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died"
    return " ".join(str(error).split())[:200]
