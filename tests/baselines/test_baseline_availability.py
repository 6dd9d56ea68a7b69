"""Reasons why a baseline cannot run here, and errors for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from baseline_cases import (
    CPU,
    LONGEST,
    NAMES,
    built,
    config,
    half_precision_error,
    inputs,
    reason,
    runnable,
)

from baselines import _memory
from baselines._adapter import Adapter
from baselines.window import Window
from danon.attention import registry
from danon.config import AttentionConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_unavailable_exactly_where_a_call_fails(name: str, dtype: torch.dtype) -> None:
    """It works if it runs and errs at most four times as much as dense attention."""
    why, error = reason(name, dtype=dtype), ""
    if name in {"linformer", "nsa"} and dtype != torch.float32:
        # Their errors show on long real text only; the classes give the figures.
        assert why == f"takes float32 only, not {str(dtype).removeprefix('torch.')}"
        return
    allowed = 4 * half_precision_error("sdpa", dtype)
    try:
        works = half_precision_error(name, dtype) <= allowed
    except ImportError as raised:
        works, error = False, str(raised)
    assert (why is None) == works, why
    assert error in ("", why)
    assert why is None or (why.strip() and "\n" not in why)


@pytest.mark.parametrize("name", NAMES)
def test_unavailable_exactly_where_the_backward_pass_fails(name: str) -> None:
    attention = runnable(name, True)
    q, k, v = (x.requires_grad_() for x in inputs(40))
    if why := reason(name, backward=True):
        with pytest.raises(NotImplementedError):
            attention(q, k, v)
        assert why == "FlexAttention has no backward on CPU"
    else:
        attention(q, k, v).sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("name", NAMES)
def test_missing_cuda_device_is_a_reason(name: str) -> None:
    why = reason(name, device=torch.device("cuda"))
    assert why is not None
    assert why == "no CUDA device" or "is not installed (pip install danon[" in why


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionConfig(hidden_size=256, num_heads=4, causal=True, max_sequence_length=4096)
    quadratic = {"nsa": True, "sdpa-math": False, "bigbird": False, "performer": True}

    def why(name: str, backward: bool) -> str | None:
        return registry.get(name).unavailable(
            shape, length=4096, dtype=torch.float32, device=CPU, backward=backward
        )

    monkeypatch.setattr(_memory, "free_bytes", lambda _: 24 * 10**9)
    assert [n for n in NAMES if "GB" in (why(n, True) or "")] == ["nsa"]
    assert why("nsa", False) is None
    monkeypatch.setattr(_memory, "free_bytes", lambda _: 10**8)
    for name, backward in quadratic.items():
        assert "GB at length 4096, 0.1 GB are free on cpu" in (why(name, backward) or "")
    assert why("sdpa", True) is None


def test_free_memory_of_this_machine() -> None:
    assert 10**7 < _memory.free_bytes(CPU) < 10**14


def test_failed_import_of_a_package_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import a_part_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Broken(Adapter):
        package, module = "broken-package", "broken_package"

    class Missing(Adapter):
        package, module, extra = "missing-package", "missing_package.part", "cuda"

    def why(cls: type[Adapter]) -> str | None:
        return cls.unavailable(
            config(True), length=1, dtype=torch.float32, device=CPU, backward=False
        )

    broken = "broken-package does not import here: No module named 'a_part_that_is_missing'"
    missing = "missing-package is not installed (pip install danon[cuda])"
    assert why(Broken) == broken
    assert why(Missing) == missing
    with pytest.raises(ImportError, match="broken-package does not import"):
        Broken.load()
    with pytest.raises(ImportError, match="missing-package is not installed"):
        Missing.load()


def test_bad_input_names_the_value() -> None:
    attention = built("sdpa", True)
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 9, 16\): must be \(2, 2, 9, 16\)"):
        attention(q, q, v)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 8\)"):
        attention(q, k, v, torch.ones(2, 8))
    with pytest.raises(ValueError, match="width = 0"):
        Window(config(True), width=0)
    long = LONGEST + 1
    assert reason("linformer", length=long) == f"configured for at most {LONGEST} tokens"
    with pytest.raises(ValueError, match=f"N = {long}: linformer takes at most"):
        built("linformer", True)(*inputs(long, batch=1))


def test_reasons_name_the_dtypes() -> None:
    assert reason("performer", dtype=torch.float16) == "takes float32 only, not float16"
