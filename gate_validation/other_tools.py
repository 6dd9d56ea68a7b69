"""Decisions of other tools about the same samples, each by its own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

__all__ = ["OTHER_TOOLS", "Rule"]

Rule = Callable[[Sequence[float], Sequence[float]], bool]
"""Takes seconds of base and head; returns True for a regression."""


def _pytest_benchmark(threshold: str) -> Rule:
    """Return the rule of ``--benchmark-compare-fail=<threshold>``."""
    from pytest_benchmark.stats import Stats
    from pytest_benchmark.utils import parse_compare_fail

    check = parse_compare_fail(threshold)

    def figure(samples: Sequence[float]) -> dict[str, float]:
        stats = Stats()
        for seconds in samples:
            stats.update(seconds)
        return {check.field: getattr(stats, check.field)}

    return lambda base, head: bool(check.fails(figure(head), figure(base)))


def _asv(factor: float) -> Rule:
    """Return the rule of ``asv compare --factor <factor>``, with its statistics."""
    from asv.commands.compare import _is_result_better
    from asv_runner.statistics import compute_stats

    def slower(base: Sequence[float], head: Sequence[float]) -> bool:
        (a, a_stats), (b, b_stats) = (compute_stats(list(x), 1) for x in (base, head))
        return bool(_is_result_better(a, b, (a_stats, list(base)), (b_stats, list(head)), factor))

    return slower


OTHER_TOOLS: Mapping[str, Callable[[], Rule]] = {
    "pytest-benchmark min:5%": lambda: _pytest_benchmark("min:5%"),
    "pytest-benchmark mean:5%": lambda: _pytest_benchmark("mean:5%"),
    "pytest-benchmark mean:10%": lambda: _pytest_benchmark("mean:10%"),
    "asv compare, factor 1.05": lambda: _asv(1.05),
    "asv compare, factor 1.1": lambda: _asv(1.1),
}
"""Functions that make a rule, by the name of the tool and its setting."""
