"""Export of a run to files that other tools read: ``results.json`` and ``samples.parquet``."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from danon.runs.case import SCHEMA
from danon.runs.files import replace_file
from danon.runs.run_info import RunInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from danon.runs.case import CaseResult

__all__ = ["write_results"]


def write_results(results: Sequence[CaseResult], info: RunInfo, run_dir: Path) -> None:
    """Write both files into ``run_dir``, each replaced as a whole.

    Args:
        results: of all cases.
        info: of the run.
        run_dir: the folder of the run.

    Raises:
        ValueError: the name of a sample series does not end with ``_s``.
    """
    ordered = sorted(results, key=lambda r: (r.case.id, dataclasses.astuple(r.case)))
    content = {
        "schema": SCHEMA,
        "run": dataclasses.asdict(info),
        "results": [_figures(r) for r in ordered],
    }
    text = json.dumps(_finite(content), indent=1, sort_keys=True, allow_nan=False) + "\n"
    replace_file(run_dir / "results.json", text.encode())
    replace_file(run_dir / "samples.parquet", _parquet(_sample_rows(ordered, info.run_id)))


def _figures(result: CaseResult) -> dict[str, Any]:
    values = result.values()
    del values["samples"]  # they are in the parquet file
    return values


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which are not JSON, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sample_rows(results: Sequence[CaseResult], run_id: str) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        case = dataclasses.asdict(result.case)
        for name, series in result.samples.items():
            if not name.endswith("_s"):
                raise ValueError(
                    f"{result.case.id}: sample series {name!r}: must be seconds and be named "
                    "'<side>_s'"
                )
            side = name.removesuffix("_s")
            rows += [
                {"run_id": run_id, **case, "side": side, "index": index, "seconds": seconds}
                for index, seconds in enumerate(series)
            ]
    return rows


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, name = pa.int64(), pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [
            ("run_id", name),
            ("suite", name),
            ("task", name),
            ("attention", name),
            ("length", whole),
            ("dtype", name),
            ("phase", name),
            ("device", name),
            ("batch", whole),
            ("heads", whole),
            ("head_dim", whole),
            ("causal", pa.bool_()),
            ("side", name),
            ("index", whole),
            ("seconds", pa.float64()),
        ]
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
