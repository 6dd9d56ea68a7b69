"""Results of a small run, and its runs in MLflow."""

from __future__ import annotations

from danon.runs.case import Case, CaseResult
from danon.runs.run_info import RunInfo
from danon.tracking import store

LENGTHS = (1024, 4096)


def measured(attention: str, length: int, phase: str = "forward", **metrics: float) -> CaseResult:
    return CaseResult(
        Case("speed", attention, length, "float32", phase),  # type: ignore[arg-type]
        "measured",
        semantics="exact",
        metrics={"time_s": length / 1e6, "speedup": 1.5, **metrics},
        samples={"candidate_s": [0.1, 0.2], "reference_s": [0.3, 0.25]},
        check={"kind": "definition", "error": 1e-6, "tolerance": 1e-5},
    )


def some_results() -> list[CaseResult]:
    missing = CaseResult(
        Case("speed", "xformers", 1024, "float32", "forward"), "unavailable", reason="needs CUDA"
    )
    return [
        *(measured(name, n) for name in ("sdpa", "msra") for n in LENGTHS),
        measured("msra", 1024, "forward+backward"),
        missing,
    ]


def two_texts() -> list[CaseResult]:
    """One attention trained on two texts at one length."""
    return [
        CaseResult(
            Case("language", "msra", 1024, "float32", "training", task=text),
            "measured",
            metrics={"bits_per_byte": bits},
            samples={"candidate_s": [seconds]},
            curves={"bits_by_tokens": [[1e6, bits]]},
        )
        for text, bits, seconds in (("code", 2.1, 40.0), ("prose", 2.6, 50.0))
    ]


def runs_of(uri: str, info: RunInfo) -> tuple[list, list]:
    """(parent runs, child runs) of an invocation."""
    client = store.connect(uri)
    experiment = store.experiment_id(client, uri, "bench")
    runs = store.runs_where(client, [experiment], f"tags.`danon.run_id` = '{info.run_id}'")
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


def history(uri: str, info: RunInfo, attention: str, metric: str) -> list[tuple[int, float]]:
    (child,) = [r for r in runs_of(uri, info)[1] if r.info.run_name == attention]
    points = store.connect(uri).get_metric_history(child.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)
