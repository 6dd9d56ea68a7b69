"""Peak and saved bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from danon.measure.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")


class TestPeakBytes:
    def test_peak_of_known_allocations(self) -> None:
        def work() -> Tensor:
            first = torch.empty(1000, dtype=torch.float32)  # 4000
            second = torch.empty(500, dtype=torch.float64)  # 4000: 8000 live
            del first
            third = torch.empty(750, dtype=torch.float32)  # 3000: 7000 live
            del second, third
            return torch.empty(5000, dtype=torch.float32)  # the result does not count

        assert [peak_bytes(work, CPU) for _ in range(3)] == [8000] * 3

    def test_peak_inside_native_kernels(self) -> None:
        q = torch.randn(1, 4, 256, 64)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found = {peak_bytes(lambda: flash(q, q, q, 0.0, True), CPU) for _ in range(3)}
        assert len(found) == 1
        assert found.pop() > 4 * 64 * 32  # at least a tile of logits, which no tensor shows

    def test_peak_of_quadratic_attention(self) -> None:
        q = torch.randn(1, 2, 128, 32)
        logits = 2 * 128 * 128 * 4
        assert peak_bytes(lambda: (q @ q.mT).softmax(-1) @ q, CPU) == 2 * logits

    def test_peak_with_release_of_older_memory(self) -> None:
        older = [torch.empty(10_000), torch.empty(10_000)]

        def work() -> None:
            older.pop()
            torch.empty(1000, dtype=torch.float32)

        assert peak_bytes(work, CPU) == 4000

    def test_peak_on_another_device(self) -> None:
        with pytest.raises(ValueError, match="device = meta"):
            peak_bytes(lambda: None, torch.device("meta"))


class TestSavedBytes:
    def test_saved_storages_count_once_without_inputs(self) -> None:
        x = torch.randn(10, 100, requires_grad=True)
        weight = torch.randn(100, 50, requires_grad=True)

        def work() -> Tensor:
            hidden = (x @ weight).exp()  # keeps x, weight (given) and its result: 10 * 50 * 4
            return hidden.view(50, 10).sin() + hidden.sum()  # sin keeps a view of the same

        assert saved_bytes(work, [x, weight]) == 10 * 50 * 4

    def test_saved_tensors_on_the_context_of_a_function(self) -> None:
        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.mine, ctx.its = x.exp(), x
                torch.empty(5000)  # and this goes
                ctx.save_for_backward(x.sin()[:5])
                return x.cos()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return -grad * ctx.its.sin()

        x = torch.randn(1000, requires_grad=True)
        assert saved_bytes(lambda: Keep.apply(x), [x]) == 2 * 4000  # type: ignore[no-untyped-call]

    def test_saved_result(self) -> None:
        x = torch.randn(1000, requires_grad=True)
        assert saved_bytes(x.exp, [x]) == 4000
        assert saved_bytes(x.sin, [x]) == 0
        assert saved_bytes(lambda: {"twice": [x.sin(), x.exp()]}, [x]) == 4000

    def test_saved_bytes_without_gradient(self) -> None:
        x = torch.randn(10)
        assert saved_bytes(x.exp, [x]) == 0
