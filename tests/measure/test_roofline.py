"""The rates of the machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danon.measure import roofline

CPU = torch.device("cpu")


class TestRoofline:
    def test_matmul_rate_of_a_slow_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = []

        def slow(a: Tensor) -> float:
            sizes.append(len(a))
            return float(2 * len(a) ** 3 / 0.4e9)

        monkeypatch.setattr(roofline, "_seconds", slow)
        assert roofline.matmul_rate(CPU, torch.float64) == pytest.approx(0.4e9)
        assert max(sizes) <= 512

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_narrow_dtype_that_is_computed_in_float32(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rates = {torch.float32: 300e9, dtype: 35e9}
        monkeypatch.setattr(roofline, "_seconds", lambda a: 2 * len(a) ** 3 / rates[a.dtype])
        for measured in (
            roofline.matmul_rate(CPU, dtype),
            roofline.matmul_rate_of(1e9, CPU, dtype),
        ):
            assert measured == pytest.approx(300e9)  # dense attention reaches 180

    def test_matmul_rate_of_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roofline, "_PRODUCT_S", 0.02)
        assert 1e8 < roofline.matmul_rate(CPU, torch.float32) < 1e15
