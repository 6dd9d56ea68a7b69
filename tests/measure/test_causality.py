"""The search for leaks."""

from __future__ import annotations

import torch
from gained_attention import Gained, N, inputs, masked, off_by_one
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from danon.measure.causality import check_causal


class TestCausality:
    def test_dense_causal_attention(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            assert check_causal(Gained(), *inputs(dtype)) == ""

    def test_leak_through_selection(self) -> None:
        """Queries see earlier tokens only, but which ones depends on all: no gradient shows it."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = k.detach().norm(dim=-1).mean((0, 1))
            seen = (size >= size.mean()) | torch.eye(N, dtype=torch.bool)
            return sdpa(q, k, v, seen.tril())

        assert "not causal" in check_causal(attend, *inputs())

    def test_leak_of_the_next_token(self) -> None:
        model = Gained()
        reason = check_causal(masked(model, off_by_one), *inputs())
        assert reason.startswith("not causal: tokens after")

    def test_bidirectional_attention(self) -> None:
        assert "not causal" in check_causal(sdpa, *inputs())

    def test_single_token(self) -> None:
        q, k, v = (x[:, :, :1] for x in inputs())
        assert check_causal(Gained(), q, k, v) == ""
