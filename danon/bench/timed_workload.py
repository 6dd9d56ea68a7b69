"""The timed call of a workload: new inputs at each call, outputs checked afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from math import ceil
from time import perf_counter

import torch
from torch import Tensor

from danon.bench.workload import Workload
from danon.measure.correctness import check_gradients, check_rows, decided_rows, relative_error
from danon.measure.spot_checks import KEPT_ROWS, KeptCall, SpotChecks
from danon.measure.threads import fewer_threads_beside_load
from danon.measure.timing import TimedCall
from danon.measure.varied_inputs import Variation, VariedInputs

__all__ = ["TimedAttention", "TimedModel"]

SLACK = 2.0
"""Factor on the tolerance, which was measured on other inputs and rows."""
GRADIENT_SLACK = 6.0
"""Factor for gradients: they are sums of two calls, so they have two roundings."""
ALONE_FACTOR = 2.0
"""A gradient of the requested rows alone must be off by at least this multiple of that."""
GROSS_FACTOR = 10.0
"""Multiple of the allowed error beyond which a gradient is wrong after one draw."""
GRADIENT_DRAWS = 3
"""Draws of rows below that multiple: a single row may be ill-conditioned."""
MODEL_ERROR = 1e-3
"""Allowed relative error of a repeated model call: threads may add in another order."""
SHARE, LEAST_S = 0.1, 0.1
"""Time for checks: this share of the timing's seconds, and at least these seconds."""
FEW_CALLS = 2
"""Calls that are kept, or checked, if one call takes much memory or time."""


class TimedAttention:
    """One side of a timing: an attention that gets other inputs at each call.

    Args:
        workload: the attention, its inputs and its oracle.
        tolerance: relative errors allowed by the check; None: calls are not checked (reference).
    """

    def __init__(self, workload: Workload, tolerance: Mapping[str, float] | None) -> None:
        self._workload, self._tolerance = workload, tolerance
        self._inputs = VariedInputs(workload.q, workload.k, workload.v)
        self._backward = workload.case.phase == "forward+backward"
        buffers = (self._inputs.q, self._inputs.k, self._inputs.v)
        self._leaves = [x.detach().requires_grad_(self._backward) for x in buffers]
        self._parameters = list(workload.parameters.values())
        # (B, H, N, D), dense: every row of every timed call has to have a backward pass.
        self._upstream = torch.empty_like(workload.q)
        self._variation: Variation | None = None
        self._spot_checks = SpotChecks(
            self._inputs, **({"calls": FEW_CALLS} if self._backward else {})
        )

    @property
    def call(self) -> TimedCall:
        """The timed call: forward, or forward and backward to q, k, v and parameters."""
        run = self._forward_and_backward if self._backward else self._forward
        return TimedCall(run, self._change, self._observe)

    def returned(self, result: object) -> object:
        """Return the part of a result that a caller would get: the output, or the gradients."""
        return result[1] if self._backward else result  # type: ignore[index]

    def fault(self, timing_s: float) -> str:
        """Check calls that have been timed.

        Args:
            timing_s: seconds of the timing.

        Returns:
            The wrong call and the reason, in one line; empty if none was wrong.
        """
        allowed_s = max(SHARE * timing_s, LEAST_S)

        def enough(checked: int) -> bool:  # one is checked in any case
            return checked > 0 and perf_counter() - start > allowed_s

        check = self._gradient_fault if self._backward else self._output_fault
        with fewer_threads_beside_load(self._workload.device):
            start = perf_counter()
            return self._spot_checks.first_fault(check, enough)

    def _change(self) -> None:
        self._variation = self._inputs.change()
        if self._backward:
            _write_upstream(self._upstream, self._variation)

    def _forward(self) -> object:
        with torch.no_grad():
            return self._workload.attend(*self._leaves)

    def _forward_and_backward(self) -> object:
        return self._differentiated(self._leaves, self._upstream)

    def _differentiated(
        self, leaves: list[Tensor], upstream: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        out = self._workload.attend(*leaves)
        wrt = [*leaves, *self._parameters]
        return out, torch.autograd.grad(out, wrt, upstream, allow_unused=True)

    def _observe(self, result: object) -> None:
        if self._tolerance is None:
            return
        assert self._variation is not None
        if not self._backward:
            self._spot_checks.observe(self._variation, result)
            return
        assert isinstance(result, tuple)
        out, gradients = result
        self._spot_checks.observe(self._variation, out, gradients)

    def _output_fault(self, kept: KeptCall) -> str:
        assert self._tolerance is not None
        inputs = self._inputs.of(kept.variation)
        allowed = SLACK * self._tolerance["output"]
        return check_rows(self._workload.subject(), inputs, kept.rows, kept.output, allowed)

    def _gradient_fault(self, kept: KeptCall) -> str:
        """Check the output and the gradients; draw other rows while the error is small.

        Rounding makes the gradient of a few rows of a correct attention worse than the tolerance
        (Performer in float32: 1 of about 100 draws). A wrong attention fails in every draw.
        """
        if fault := self._output_fault(kept):
            return fault
        for draw in range(GRADIENT_DRAWS):
            drawn = torch.randperm(self._workload.case.length)[: self._gradient_rows].to(kept.rows)
            rows = drawn if draw else torch.cat((kept.rows, drawn))[: len(drawn)]
            excess, fault = self._gradient_error(kept, rows.unique())
            if excess <= 1:
                return ""
            if not excess <= GROSS_FACTOR:
                break
        return fault

    @property
    def _gradient_rows(self) -> int:
        """Number of rows whose gradients are compared: few rows stand out less among many."""
        assert self._tolerance is not None
        length = self._workload.case.length
        allowed = GRADIENT_SLACK * min(self._tolerance[name] for name in ("dq", "dk", "dv"))
        return min(max(KEPT_ROWS, ceil(length * (ALONE_FACTOR * allowed) ** 2)), length)

    def _gradient_error(self, kept: KeptCall, rows: Tensor) -> tuple[float, str]:
        """Return the error of gradients as a multiple of the allowed one, and its description.

        The oracle differentiates only a few rows. A second call gets the same inputs, and the
        negated upstream gradient, changed in these rows. Gradients are linear in it, so the sum of
        both calls is the gradient of these rows. Neither call can know the rows: the first comes
        before they are drawn, and each timed call has an upstream gradient of its own.
        """
        assert self._tolerance is not None
        workload, inputs = self._workload, self._inputs.of(kept.variation)
        subject = workload.subject()
        rows = rows[decided_rows(subject, inputs, rows)]
        if not len(rows):
            return 0.0, ""
        # As large as all other rows together, so that the sum loses few digits.
        gain = (workload.case.length / len(rows)) ** 0.5
        before = torch.empty_like(workload.q)
        _write_upstream(before, kept.variation)
        upstream = -before
        upstream[:, :, rows] += gain * torch.randn_like(upstream[:, :, rows])
        leaves = [x.requires_grad_() for x in inputs]
        _, again = self._differentiated(leaves, upstream)
        names = ["dq", "dk", "dv", *workload.parameters]
        tensors = [*leaves, *self._parameters]
        gradients = {
            name: _dense(first, like) + _dense(second, like)
            for name, first, second, like in zip(names, kept.gradients, again, tensors, strict=True)
        }
        change = (upstream + before)[:, :, rows]  # as it was rounded
        return check_gradients(
            subject, inputs, rows, change, gradients, self._tolerance, GRADIENT_SLACK
        )


class TimedModel:
    """A model as one side of a timing: other tokens at each call, and logits that are checked.

    Args:
        run: takes tokens (B, N) and returns a tensor (B, ...).
        ids: tokens (B, N); each call gets them rotated by a random number of positions.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> None:
        self._run, self._source, self._ids = run, ids, ids.clone()
        self._random = random.SystemRandom()
        self._calls = self._shift = 0
        self._kept: list[tuple[int, int, Tensor]] = []  # number, rotation, result

    @property
    def call(self) -> TimedCall:
        """The timed call: a forward pass."""
        return TimedCall(self._forward, self._change, self._observe)

    def fault(self) -> str:
        """Repeat calls that have been timed, and compare.

        Returns:
            The wrong call and the reason, in one line; empty if none was wrong.
        """
        for number, shift, result in self._kept:
            self._ids.copy_(self._source.roll(shift, -1))
            error = relative_error(result, self._forward().double())
            if not error <= MODEL_ERROR:
                return f"timed call {number} of {self._calls}: run again it differs by {error:.1e}"
        return ""

    def _change(self) -> None:
        self._shift = self._random.randrange(self._source.shape[-1])
        self._ids.copy_(self._source.roll(self._shift, -1))

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self._run(self._ids)

    def _observe(self, result: object) -> None:
        """Keep the result if it is drawn; each result has the same chance."""
        assert isinstance(result, Tensor)
        self._calls += 1
        index = self._calls - 1
        if index >= FEW_CALLS:
            index = self._random.randrange(self._calls)
        if index < FEW_CALLS:
            kept = (self._calls, self._shift, result.detach().clone())
            self._kept[index : index + 1] = [kept]


def _write_upstream(target: Tensor, variation: Variation) -> None:
    """Write the upstream gradient of one call."""
    generator = torch.Generator(target.device).manual_seed(variation.seed)
    target.normal_(generator=generator)


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float64) if gradient is None else gradient.double()
