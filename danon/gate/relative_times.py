"""Times over dense attention's: they can be compared between days, and roughly between machines."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from danon.gate.paired_processes import ROUNDS, draw_content, measure_by_turns
from danon.gate.worker_client import OutputError, Side
from danon.gate.workspace import Workspace
from danon.runs.case import REFERENCE, Case

__all__ = ["RelativeTime", "measure_relative_times"]


@dataclass(frozen=True)
class RelativeTime:
    """Time of a case beside dense attention in the same process.

    Attributes:
        ratio: time of a call over that of dense attention.
        dense_s: seconds of a call of dense attention.
    """

    ratio: float
    dense_s: float


def measure_relative_times(
    workspace: Workspace, side: Side, cases: Sequence[Case], *, seed: int
) -> Iterator[tuple[Case, RelativeTime | OutputError]]:
    """Measure each case beside dense attention, all in one fresh process.

    Args:
        workspace: starts the process.
        side: the code to measure.
        cases: to measure; they must run.
        seed: of the order of cases and samples.

    Yields:
        Each case with its time, or with the reason why its outputs are wrong.

    Raises:
        WorkerError: The worker died, a case does not run, or the time is over.
    """
    order = random.Random(seed)
    with workspace.start_worker(side) as worker:
        for case in order.sample(list(cases), len(cases)):
            prepared = {"dense": replace(case, attention=REFERENCE), "case": case}
            content = draw_content()
            for name, one in prepared.items():
                worker.request("prepare", case=asdict(one), name=name, seed=content)
            pair = measure_by_turns((worker, "dense"), (worker, "case"), ROUNDS, order)
            try:
                for name in prepared:
                    worker.verify(name)
            except OutputError as error:
                yield case, error
            else:
                yield case, RelativeTime(math.exp(pair.log_ratio), median(pair.base))
            for name in prepared:
                worker.request("release", name=name)
