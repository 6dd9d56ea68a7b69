"""Two worker processes, one of each side, that take turns: what the gate replicates.

Memory layout and page placement give each process an offset of its own. Rounds within one pair of
processes share it, so they do not add up. A pair gives one figure a case; its error shows only
between pairs.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from danon.gate.worker_client import OutputError, Side, WorkerClient
from danon.gate.workspace import Workspace
from danon.runs.case import Case

__all__ = ["ROUNDS", "Measurement", "draw_content", "measure_abba", "measure_by_turns"]

ROUNDS = 2
"""Rounds in one pair: its offset is larger than what more rounds would take away."""
SAMPLE_S = 0.02
"""Seconds that the calls of one sample take together, at least."""


@dataclass(frozen=True)
class Measurement:
    """Times of one case in one pair.

    Attributes:
        log_ratio: median over rounds of log(head / base), CPU time of a call.
        base: seconds of a call of the base, by sample.
        head: the same of the head.
    """

    log_ratio: float
    base: tuple[float, ...]
    head: tuple[float, ...]


def measure_abba(
    workspace: Workspace,
    sides: tuple[Side, Side],
    cases: Sequence[Case],
    *,
    seed: int,
    rounds: int = ROUNDS,
) -> Iterator[tuple[Case, Measurement | OutputError]]:
    """Measure each case in two fresh processes.

    Args:
        workspace: starts the processes.
        sides: base and head.
        cases: to measure; they must run on both sides.
        seed: of the order of processes, cases and samples.
        rounds: of four samples each, base head head base or the other way round.

    Yields:
        Each case with its measurement, or with the reason why its outputs are wrong.

    Raises:
        WorkerError: A worker died, a case does not run, or the time is over.
    """
    base, head = sides
    order = random.Random(seed)
    first, second = (base, head) if order.random() < 0.5 else (head, base)  # who is placed first
    with workspace.start_worker(first) as one, workspace.start_worker(second) as other:
        workers = {one.side.name: one, other.side.name: other}
        for case in order.sample(list(cases), len(cases)):
            try:
                yield case, _measure(case, workers[base.name], workers[head.name], rounds, order)
            except OutputError as error:
                yield case, error


def _measure(
    case: Case, base: WorkerClient, head: WorkerClient, rounds: int, order: random.Random
) -> Measurement:
    # Drawn, too: who is first in something waits longer for its first sample.
    seed = draw_content()
    for worker in order.sample((base, head), 2):
        worker.request("prepare", case=asdict(case), name=case.id, seed=seed)
    measurement = measure_by_turns((base, case.id), (head, case.id), rounds, order)
    for worker in (base, head):
        worker.verify(case.id)
        worker.request("release", name=case.id)
    return measurement


def draw_content() -> int:
    """Draw a seed of inputs that no code can know from inputs it has seen."""
    return secrets.randbits(32)


def measure_by_turns(
    base: tuple[WorkerClient, str],
    head: tuple[WorkerClient, str],
    rounds: int,
    order: random.Random,
) -> Measurement:
    """Time two prepared cases by turns.

    Args:
        base: a worker, and the name of a case that it has prepared.
        head: the same of the other side; it may be the same worker.
        rounds: of four samples each.
        order: draws which side begins a round.
    """
    calls = {
        side: math.ceil(SAMPLE_S / side[0].request("time", name=side[1], calls=1))
        for side in order.sample((base, head), 2)
    }
    if base[1] == head[1]:  # the same work: the same number of calls
        calls = dict.fromkeys(calls, max(calls.values()))
    ratios: list[float] = []
    seconds: dict[tuple[WorkerClient, str], list[float]] = {base: [], head: []}
    for _ in range(rounds):
        a, b = (base, head) if order.random() < 0.5 else (head, base)
        for side in (a, b, b, a):
            worker, name = side
            seconds[side].append(worker.request("time", name=name, calls=calls[side]))
        ratios.append(math.log(sum(seconds[head][-2:]) / sum(seconds[base][-2:])))
    return Measurement(median(ratios), tuple(seconds[base]), tuple(seconds[head]))
