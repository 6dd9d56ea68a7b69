"""The correctness check: it accepts a right model and rejects every mutant."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from gained_attention import Gained, N, dense, gained, inputs, masked, off_by_one
from torch import Tensor

from danon.measure.correctness import (
    Attend,
    Check,
    Subject,
    check_case,
    dense_rows,
    sample_rows,
    tolerances,
)


def check(attend: Attend, model: Gained, dtype: torch.dtype = torch.float32) -> Check:
    q, k, v = inputs(dtype)
    rows, parameters = sample_rows(N, N), dict(model.named_parameters())
    subject = Subject(attend, model.oracle, "definition", parameters, parameters)
    allowed = tolerances(q, k, v, rows, causal=True, backward=True)
    return check_case(subject, q, k, v, rows, allowed, backward=True)


def leak_one(seen: Tensor) -> None:
    seen[97, 98] = True


def forget_one(seen: Tensor) -> None:
    seen[150, 3] = False


# What is wrong -> (the model made wrong, the tensor that must tell).
Mutant = Callable[[Gained], Attend]


MUTANTS: dict[str, tuple[Mutant, str]] = {
    "scaled output": (lambda m: lambda q, k, v: m(q, k, v) * 1.001, "output"),
    "leak of one token": (lambda m: masked(m, leak_one), "output"),
    "mask off by one": (lambda m: masked(m, off_by_one), "output"),
    "one token forgotten": (lambda m: masked(m, forget_one), "output"),
    "swapped weights": (lambda m: lambda *x: gained(dense(*x), m.gain.flip(0)), "output"),
    "gradient of v cut": (lambda m: lambda q, k, v: m(q, k, v.detach()), "dv"),
    "gradient of k halved": (lambda m: lambda q, k, v: m(q, (k + k.detach()) / 2, v), "dk"),
    "gradient of the gain cut": (lambda m: lambda *x: gained(dense(*x), m.gain.detach()), "gain"),
    "not finite": (lambda m: lambda q, k, v: m(q, k, v) / 0, "output"),
    "another dtype": (lambda m: lambda q, k, v: m(q, k, v).double(), "output"),
    "another shape": (lambda m: lambda q, k, v: m(q, k, v)[:, :, 1:], "output"),
}


TOO_SMALL_FOR_BF16 = ("scaled output", "leak of one token", "one token forgotten")


class TestCorrectness:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_right_model(self, dtype: torch.dtype) -> None:
        model = Gained()
        found = check(model, model, dtype)
        assert found.ok, found.reason
        assert (found.rows, found.undecided, found.kind) == (N, 0, "definition")
        assert found.error <= found.tolerance

    @pytest.mark.parametrize("name", MUTANTS)
    def test_mutant_in_float32(self, name: str) -> None:
        model, (mutant, worst) = Gained(), MUTANTS[name]
        found = check(mutant(model), model)
        assert not found.ok
        assert found.worst == worst
        assert worst in found.reason
        assert found.error > found.tolerance

    @pytest.mark.parametrize("name", [n for n in MUTANTS if n not in TOO_SMALL_FOR_BF16])
    def test_mutant_in_bfloat16(self, name: str) -> None:
        model, (mutant, _) = Gained(), MUTANTS[name]
        assert not check(mutant(model), model, torch.bfloat16).ok

    def test_output_scaled_by_two_percent_in_bfloat16(self) -> None:
        model = Gained()
        assert not check(lambda q, k, v: model(q, k, v) * 1.02, model, torch.bfloat16).ok

    def test_tolerance_in_bfloat16_is_twice_the_error_of_dense(self) -> None:
        q, k, v = inputs(torch.bfloat16)
        rows = sample_rows(N)
        allowed = tolerances(q, k, v, rows, causal=True, backward=True)
        exact = dense_rows(q.double(), k.double(), v.double(), rows, causal=True)
        found = dense(q, k, v)[:, :, rows]
        error = float((found.double() - exact).norm() / exact.norm())
        assert allowed["output"] == pytest.approx(max(2 * error, 2**-8))
        assert set(allowed) == {"output", "dq", "dk", "dv", "scale"}
        much = allowed.pop("scale")  # cancels in it
        assert 2**-9 < much < 0.1 and all(2**-9 < value < 0.02 for value in allowed.values())

    def test_undecided_rows_up_to_a_tenth(self) -> None:
        model = Gained()
        q, k, v = inputs()
        rows = sample_rows(N, N)
        allowed = tolerances(q, k, v, rows, causal=True, backward=False)

        def outcome(flagged: int) -> Check:
            wrong = masked(model, off_by_one)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = model(q, k, v)
                out[:, :, :flagged] = wrong(q, k, v)[:, :, :flagged]
                return out

            subject = Subject(
                attend, model.oracle, "definition", undecided=lambda q, k, v, r: r < flagged
            )
            return check_case(subject, q, k, v, rows, allowed, backward=False)

        few, many = outcome(N // 10), outcome(N // 10 + 1)
        assert few.ok
        assert (few.rows, few.undecided) == (N - N // 10, N // 10)
        assert not many.ok
        assert "rounding decides" in many.reason

    def test_sampled_rows_hold_first_last_and_borders(self) -> None:
        rows = sample_rows(5000, 64).tolist()
        assert len(rows) == len(set(rows)) == 64
        assert {0, 15, 16, 255, 256, 4095, 4096, 4999} <= set(rows)
        assert rows == sample_rows(5000, 64).tolist()
        assert sample_rows(1).tolist() == [0]
        assert sample_rows(10).tolist() == list(range(10))

    def test_check_is_plain_data_but_for_its_tensors(self) -> None:
        model = Gained()
        found = dataclasses.asdict(check(model, model))
        del found["positions"], found["output"]
        json.dumps(found)
