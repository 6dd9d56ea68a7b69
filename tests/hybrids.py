"""Small hybrids and recorded runs, for the tests of what uses them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from small_mechanisms import SMALL_UCSA
from torch import Tensor

from danon.attention.hybrid.layer import SuperHybrid
from danon.config.hybrid import SuperHybridConfig
from danon.models.hybrid_model import create_super_hybrid_model
from danon.runs.case import SCHEMA

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 32, "num_heads": 4}
SMALL: dict[str, dict[str, Any]] = {
    "msra": {"window": 8, "global_tokens": 3, "compression_factor": 2},
    "dala": {
        "block_size": 4,
        "state_update_frequency": 2,
        "global_tokens": 3,
        "memory_size": 10,
        "window_max": 6,
    },
    "ucsa": SMALL_UCSA,
}
TWO = {name: SMALL[name] for name in ("msra", "dala")}
Figures = Mapping[str, Mapping[int, tuple[float, float, float]]]

# Error, seconds, bytes by length: MSRA is best up to 64 tokens, DALA from 128 on; UCSA is slow and
# exact.
FIGURES: Figures = {
    "msra": {32: (0.1, 1.0, 100.0), 128: (0.4, 9.0, 900.0)},
    "dala": {32: (0.1, 2.0, 200.0), 128: (0.4, 4.0, 400.0)},
    "ucsa": {32: (0.0, 6.0, 600.0), 128: (0.0, 16.0, 1600.0)},
}


def case_line(suite: str, name: str, length: int, metrics: Mapping[str, float], **kw: Any) -> str:
    case = {
        "suite": suite,
        "attention": name,
        "length": length,
        "dtype": "bfloat16",
        "phase": "forward",
        "device": "cpu",
        "batch": 1,
        "heads": 4,
        "head_dim": 8,
        "causal": True,
    }
    config = {"hidden_size": 32, **SMALL.get(name, {})}
    result = {"status": "measured", "metrics": metrics, "config": config}
    if place := kw.pop("place", None):
        result["place"] = place
    return json.dumps({"case": {**case, **kw}, **result}) + "\n"


def record(folder: Path, figures: Figures = FIGURES, **kw: Any) -> str:
    """Write a run with these figures, as a bench leaves it, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "run_id": "20260102T030405Z-abc",
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "danon bench",
        "fingerprint": {"cpu": "a test"},
        "profile": "quick",
    }
    (folder / "run.json").write_text(
        json.dumps({"schema": SCHEMA, "info": info, "status": "FINISHED"})
    )
    lines = []
    for name, by_length in figures.items():
        for length, (error, seconds, peak) in by_length.items():
            speed = {"error_vs_dense": error, "time_s": seconds}
            lines.append(case_line("speed", name, length, speed, **kw))
            lines.append(case_line("memory", name, length, {"peak_bytes": peak}, **kw))
    (folder / "cases.jsonl").write_text("".join(lines))
    return str(folder)


def hybrid(mode: str, causal: bool = True, num_kv_heads: int = 4, **kw: Any) -> SuperHybrid:
    fields: dict[str, Any] = {"components": copy.deepcopy(SMALL), **kw}
    config = SuperHybridConfig.from_dict(
        {**SHAPE, "mode": mode, "causal": causal, "num_kv_heads": num_kv_heads, **fields}
    )
    return SuperHybrid(config).eval()


def away_from_zero(module: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)


def small_model(**kw: Any) -> Any:
    shape = {**SHAPE, "num_layers": 3, "vocab_size": 50, "components": copy.deepcopy(SMALL)}
    return create_super_hybrid_model(**{**shape, **kw})


def ids(length: int = 61) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))
