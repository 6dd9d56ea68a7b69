"""The timed call of a workload: new inputs each time, and outputs that are checked afterwards."""

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
"""The tolerance was measured on other inputs and rows."""
GRADIENT_SLACK = 6.0
"""Gradients are compared by a sum of two calls: two roundings, on other inputs."""
ALONE_FACTOR = 2.0
"""A gradient of nothing but the rows that are asked for is wrong by so many times that, or more."""
GROSS_FACTOR = 10.0
"""Beyond so many times what is allowed a gradient is wrong at once."""
GRADIENT_DRAWS = 3
"""Below that, rows are drawn so often: a single one of an attention may be ill-conditioned."""
MODEL_ERROR = 1e-3
"""Of a model that is run again on the same tokens: threads may add in another order."""
SHARE, LEAST_S = 0.1, 0.1
"""Checks go on for so much of the time that the timing took, and so many seconds anyway."""
FEW_CALLS = 2
"""Calls that are kept, or checked, where one of them takes much memory or time."""


class TimedAttention:
    """One side of a timing.

    Args:
        workload: gives the attention, its inputs and its oracle.
        tolerance: of its correctness check; None: the calls are not checked (the reference).
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
        """What is timed: a forward pass, or forward and backward to q, k, v and parameters."""
        run = self._forward_and_backward if self._backward else self._forward
        return TimedCall(run, self._change, self._observe)

    def returned(self, result: object) -> object:
        """What of a result a caller would get: the output, or the gradients."""
        return result[1] if self._backward else result  # type: ignore[index]

    def fault(self, timing_s: float) -> str:
        """Check calls that have been timed.

        Args:
            timing_s: seconds that the timing took.

        Returns:
            Which call was wrong and why, in one line; empty if none was.
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
        """Check the output, and the gradients, on rows drawn anew while they are nearly right.

        Rounding makes the gradient of a few rows of an honest attention worse than the tolerance
        (Performer, in float32: 1 of about 100 draws); what is wrong in general is so in each draw.
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
        """Rows whose gradients are compared: the more, the less they stand out of all rows."""
        assert self._tolerance is not None
        length = self._workload.case.length
        allowed = GRADIENT_SLACK * min(self._tolerance[name] for name in ("dq", "dk", "dv"))
        return min(max(KEPT_ROWS, ceil(length * (ALONE_FACTOR * allowed) ** 2)), length)

    def _gradient_error(self, kept: KeptCall, rows: Tensor) -> tuple[float, str]:
        """The error of gradients over what is allowed, and its words, at the price of a few rows.

        The oracle differentiates few rows only. A second call gets the same inputs, and the
        upstream gradient with the other sign but for these rows: gradients are linear in it, so
        their sum is that of these rows. The first call cannot have known which. The second cannot
        know them either: each timed call has an upstream gradient of its own.
        """
        assert self._tolerance is not None
        workload, inputs = self._workload, self._inputs.of(kept.variation)
        subject = workload.subject()
        rows = rows[decided_rows(subject, inputs, rows)]
        if not len(rows):
            return 0.0, ""
        # As large as all other rows together: little is lost in the sum.
        gain = (workload.case.length / len(rows)) ** 0.5
        before = torch.empty_like(workload.q)
        _write_upstream(before, kept.variation)
        upstream = -before
        upstream[:, :, rows] += gain * torch.randn_like(upstream[:, :, rows])
        leaves = [x.requires_grad_() for x in inputs]
        _, again = self._differentiated(leaves, upstream)
        names = ["dq", "dk", "dv", *workload.parameters]
        tensors = [*leaves, *self._parameters]
        found = {
            name: _dense(first, like) + _dense(second, like)
            for name, first, second, like in zip(names, kept.gradients, again, tensors, strict=True)
        }
        change = (upstream + before)[:, :, rows]  # as it was rounded
        return check_gradients(
            subject, inputs, rows, change, found, self._tolerance, GRADIENT_SLACK
        )


class TimedModel:
    """A model as one side of a timing: other tokens each time, and logits that are checked.

    Args:
        run: takes tokens (B, N) and gives a tensor (B, ...).
        ids: the tokens (B, N); each call gets them rotated to another first one.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> None:
        self._run, self._source, self._ids = run, ids, ids.clone()
        self._random = random.SystemRandom()
        self._calls = self._shift = 0
        self._kept: list[tuple[int, int, Tensor]] = []  # number, rotation, result

    @property
    def call(self) -> TimedCall:
        """What is timed: a forward pass."""
        return TimedCall(self._forward, self._change, self._observe)

    def fault(self) -> str:
        """Run calls that have been timed again, and compare.

        Returns:
            Which call was wrong and why, in one line; empty if none was.
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
        """Keep the result if it is drawn: each is as likely as any other to be kept."""
        assert isinstance(result, Tensor)
        self._calls += 1
        place = self._calls - 1
        if place >= FEW_CALLS:
            place = self._random.randrange(self._calls)
        if place < FEW_CALLS:
            kept = (self._calls, self._shift, result.detach().clone())
            self._kept[place : place + 1] = [kept]


def _write_upstream(target: Tensor, variation: Variation) -> None:
    """Write the upstream gradient of one call."""
    generator = torch.Generator(target.device).manual_seed(variation.seed)
    target.normal_(generator=generator)


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float64) if gradient is None else gradient.double()
