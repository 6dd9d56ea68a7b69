"""Interleaved timing of a candidate against a reference in one process.

    pair = measure_pair(candidate, reference, torch.device("cpu"), budget_s=2.0, width=0.02)
    pair.ratio.value     # 0.5: the candidate takes half the time

Every round measures both sides in random order, so that a disturbance of the machine meets both.
The statistic is the median over rounds of the logarithm of their ratio. Rounds go on until its 95 %
interval is narrow enough or the budget ends. The result says which: a budget that ends is neither
pass nor failure. Every call is clocked by itself: new inputs are brought and outputs taken in
between.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch

from danon.measure.statistics import FEWEST_ROUNDS, Estimate, median_interval, next_look

__all__ = ["Paired", "Single", "TimedCall", "measure_pair", "measure_single"]

SAMPLE_S = 0.02
"""Least duration of the repeated calls of a sample: well above timer and scheduler."""

SHORTEST_S = 1e-9
"""Resolution of the clock: no call takes less."""
Call = Callable[[], object]


def _nothing(*_: object) -> None:
    """Do nothing around a call of a plain function."""


@dataclass(frozen=True)
class TimedCall:
    """A function, and the work around each of its calls while the clock stands.

    Attributes:
        run: is timed.
        before: brings the inputs of the next call.
        after: takes the result of a call as soon as it has returned.
    """

    run: Call
    before: Callable[[], object] = _nothing
    after: Callable[[object], object] = _nothing


Side = Call | TimedCall


@dataclass(frozen=True)
class Single:
    """The times of one function.

    Attributes:
        samples: seconds per call, one a round, in order.
        time: median seconds per call.
        conclusive: the interval became narrow enough within the budget.
    """

    samples: tuple[float, ...]
    time: Estimate
    conclusive: bool


@dataclass(frozen=True)
class Paired:
    """The times of a candidate and a reference.

    Attributes:
        candidate: seconds per call, one a round, in order.
        reference: the same rounds of the reference.
        ratio: median of candidate / reference; below one, the candidate is faster.
        conclusive: the interval became narrow enough within the budget.
    """

    candidate: tuple[float, ...]
    reference: tuple[float, ...]
    ratio: Estimate
    conclusive: bool

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a case: ratio, speed-up and the reference's time."""
        return {
            "time_ratio": self.ratio.value,
            "time_ratio_low": self.ratio.low,
            "time_ratio_high": self.ratio.high,
            "speedup": 1 / self.ratio.value,
            "reference_time_s": median(self.reference),
            "conclusive": float(self.conclusive),
        }


def measure_pair(
    candidate: Side,
    reference: Side,
    device: torch.device,
    *,
    budget_s: float,
    width: float,
    first_rounds_s: float = 0.0,
    sample_s: float = SAMPLE_S,
    seed: int = 0,
) -> Paired:
    """Time two functions against each other.

    Args:
        candidate: called without arguments; a :class:`TimedCall` gets new inputs for each call.
        reference: the same.
        device: cpu or cuda; decides the clock.
        budget_s: seconds of rounds, after one call of each to warm up. At least three rounds are
            measured, two where one round alone takes longer than the budget.
        width: half width of the interval, in logarithms, that is narrow enough; 0.02 is 2 %.
        first_rounds_s: seconds that the first twelve rounds may take beyond the budget. Fewer than
            eight have no interval, and that of fewer than twelve spans all of them, disturbed ones
            too. Where they would take longer, the budget alone decides.
        sample_s: least seconds of a sample.
        seed: of the order within rounds.

    Returns:
        Samples of both sides, and the interval of their ratio.

    Raises:
        ValueError: the budget is not positive, or the device is another.
    """
    sides = _rounds((candidate, reference), device, budget_s, sample_s, width, seed, first_rounds_s)
    middle = sides.interval
    ratio = Estimate(math.exp(middle.value), math.exp(middle.low), math.exp(middle.high))
    return Paired(tuple(sides.samples[0]), tuple(sides.samples[1]), ratio, sides.conclusive)


def measure_single(
    fn: Side, device: torch.device, *, budget_s: float, width: float, sample_s: float = SAMPLE_S
) -> Single:
    """Time one function.

    Args:
        fn: called without arguments; a :class:`TimedCall` gets new inputs for each call.
        device: cpu or cuda; decides the clock.
        budget_s: as in :func:`measure_pair`.
        width: half width of the interval, in logarithms, that is narrow enough; 0.02 is 2 %.
        sample_s: least seconds of a sample.

    Returns:
        Samples, and the interval of the time.

    Raises:
        ValueError: the budget is not positive, or the device is another.
    """
    sides = _rounds((fn,), device, budget_s, sample_s, width, seed=0)
    middle = sides.interval
    time = Estimate(math.exp(middle.value), math.exp(middle.low), math.exp(middle.high))
    return Single(tuple(sides.samples[0]), time, sides.conclusive)


@dataclass
class _Rounds:
    samples: list[list[float]]
    interval: Estimate
    conclusive: bool


def _rounds(
    functions: tuple[Side, ...],
    device: torch.device,
    budget_s: float,
    sample_s: float,
    width: float,
    seed: int,
    first_rounds_s: float = 0.0,
) -> _Rounds:
    """Measure rounds of one or two sides; the statistic is log time, or the log ratio."""
    sides = [side if isinstance(side, TimedCall) else TimedCall(side) for side in functions]
    if budget_s <= 0:
        raise ValueError(f"budget_s = {budget_s}: must be positive")
    clock = _clock(device)
    order = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for side in sides:
            clock(side, 1)
        calls = [1] * len(sides)
        samples: list[list[float]] = [[] for _ in sides]
        start, look_at = perf_counter(), FEWEST_ROUNDS
        while True:
            for i in order.sample(range(len(sides)), len(sides)):
                samples[i].append(max(clock(sides[i], calls[i]), SHORTEST_S))
            short = [s[-1] * n < sample_s / 2 for s, n in zip(samples, calls, strict=True)]
            if any(short) and len(samples[0]) == 1:  # calibrate: repeat calls, drop the round
                calls = [
                    math.ceil(sample_s / s[-1]) if too else n
                    for s, n, too in zip(samples, calls, short, strict=True)
                ]
                samples = [[] for _ in sides]
                continue
            rounds, spent = len(samples[0]), perf_counter() - start
            wanted = FEWEST_ROUNDS if rounds < FEWEST_ROUNDS else next_look(FEWEST_ROUNDS)
            awaited = rounds < wanted and spent / rounds * wanted <= first_rounds_s
            over = spent >= budget_s and not awaited
            if rounds < (2 if spent / rounds > budget_s else 3) or not (over or rounds >= look_at):
                continue
            logs = np.log(np.asarray(samples))
            statistic = logs[0] - logs[1] if len(sides) == 2 else logs[0]
            interval = median_interval(statistic.tolist())
            narrow = rounds >= FEWEST_ROUNDS and (interval.high - interval.low) / 2 <= width
            if narrow or over:
                return _Rounds(samples, interval, narrow)
            look_at = next_look(rounds)
    finally:
        if collecting:
            gc.enable()


def _clock(device: torch.device) -> Callable[[TimedCall, int], float]:
    """Return a function (side, calls) -> seconds per call on this device."""
    if device.type == "cpu":
        return _wall
    if device.type == "cuda":
        return _Events(device)
    raise ValueError(f"device = {device}: must be cpu or cuda")


def _wall(side: TimedCall, calls: int) -> float:
    seconds = 0.0
    for _ in range(calls):
        side.before()
        start = perf_counter()
        result = side.run()
        seconds += perf_counter() - start
        side.after(result)
        del result  # its memory is free for the next call
    return seconds / calls


class _Events:
    """CUDA events around each call; the L2 cache is overwritten before it."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, side: TimedCall, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            side.before()
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = side.run()
            end.record()
            side.after(result)
            del result
            pairs.append((begin, end))
        torch.cuda.synchronize(self.device)
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000 / calls
