"""The correctness check: sampled rows against a float64 oracle, output and gradients.

    rows = sample_rows(q.shape[2])
    allowed = tolerances(q, k, v, rows, causal=True, backward=True)
    check_case(subject, q, k, v, rows, allowed, backward=True).ok

Errors are norms relative to the oracle's. float32 has fixed tolerances. Lower precision is allowed
twice the error that dense attention makes in that dtype on the same rows.

Shapes: q (B, H, N, D), k and v (B, G, N, D), rows (R,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from danon.measure.output_checks import WRITTEN, output_fault, poison_free_memory

__all__ = [
    "Attend",
    "Check",
    "Oracle",
    "Subject",
    "check_case",
    "check_gradients",
    "check_rows",
    "decided_rows",
    "dense_rows",
    "relative_error",
    "sample_rows",
    "tolerances",
]

FORWARD_FP32 = 1e-5
GRADIENT_FP32 = 1e-4
LOW_PRECISION_FACTOR = 2.0
FLOAT64 = 1e-12
MAX_UNDECIDED_SHARE = 0.1
"""Share of the sampled rows whose selection rounding may decide."""
PARTIAL_SUMS = 4
"""Parts of a sum over tokens: together their error depends less on what happens to cancel."""
NEGLIGIBLE = 1e-3
"""A gradient smaller than this share of the largest one is compared with that share instead."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Oracle = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """An attention and its oracle.

    Attributes:
        attend: (q, k, v) -> (B, H, N, D).
        oracle: (q, k, v, rows), q, k, v in the dtype that is checked -> (B, H, R, D) float64,
            differentiable in them.
        kind: a description of the oracle, in the attention's words.
        parameters: name -> parameter of ``attend``.
        oracle_parameters: the same names -> the tensors that ``oracle`` depends on.
        undecided: (q, k, v, rows), in the dtype that is checked, -> (R,) bool: rows whose selection
            rounding decides. None: there are no such rows.
    """

    attend: Attend
    oracle: Oracle
    kind: str
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    oracle_parameters: Mapping[str, Tensor] = field(default_factory=dict)
    undecided: Oracle | None = None


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        ok: the error is within the tolerance.
        error: relative error of the tensor that is worst against its tolerance.
        tolerance: of that tensor.
        worst: which tensor: output, dq, dk, dv or the name of a parameter.
        rows: query rows compared.
        undecided: sampled rows left out.
        kind: of the subject.
        reason: why not ok, in one line; empty when ok.
        positions: of the rows compared, (R,).
        output: of the attention on these rows, (B, H, R, D).
    """

    ok: bool
    error: float
    tolerance: float
    worst: str
    rows: int
    undecided: int
    kind: str
    reason: str = ""
    positions: Tensor | None = None
    output: Tensor | None = None


def sample_rows(length: int, count: int = 64, *, seed: int = 0) -> Tensor:
    """Return sorted row positions (R,) int64.

    They are the first and the last row, both sides of powers of two, and random ones.

    Args:
        length: tokens N.
        count: rows R, fewer in a short sequence.
        seed: of the random positions.
    """
    chosen = {0, length - 1}
    border = 16
    while border < length:
        chosen |= {border - 1, border}
        border *= 2
    generator = torch.Generator().manual_seed(seed)
    for row in torch.randperm(length, generator=generator).tolist():
        if len(chosen) >= count:
            break
        chosen.add(row)
    return torch.tensor(sorted(chosen))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected``; infinite if not finite."""
    return _relative(result, expected, floor=0.0)


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
    """Compute dense attention of some queries, by its definition, in the dtype of q.

    Args:
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        rows: positions (R,).
        causal: a query sees no later token.

    Returns:
        Outputs (B, H, R, D).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits: Tensor = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(_later(rows, q.shape[2]), -torch.inf)
    out: Tensor = logits.softmax(-1) @ v
    return out


def tolerances(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, causal: bool, backward: bool, seed: int = 0
) -> dict[str, float]:
    """Return the allowed relative errors for these inputs.

    In low precision, dense attention runs in that dtype and is compared with float64 on the rows.
    ``scale`` is the gradient of a gain per head on its queries. It is a sum over all tokens in
    which much cancels, as in the gradient of any parameter. How much cancels is chance, so parts
    of the sum are compared too.

    Args:
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        rows: positions (R,).
        causal: a query sees no later token.
        backward: gradients are compared too.
        seed: of the upstream gradient.

    Returns:
        Tolerances of ``output``, and with ``backward`` of ``dq``, ``dk``, ``dv``. In low precision
        ``scale`` too.
    """
    names = ("output", "dq", "dk", "dv") if backward else ("output",)
    if q.dtype == torch.float64:
        return dict.fromkeys(names, FLOAT64)
    if q.dtype == torch.float32:
        return {name: FORWARD_FP32 if name == "output" else GRADIENT_FP32 for name in names}
    low = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_(backward) for x in (q, k, v)]
    gain = torch.ones(q.shape[1], 1, 1, dtype=q.dtype, device=q.device, requires_grad=backward)
    wide_gain = gain.detach().double().requires_grad_(backward)
    rows = rows.to(q.device)
    with torch.set_grad_enabled(backward):
        out = F.scaled_dot_product_attention(
            low[0] * gain, low[1], low[2], is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )[:, :, rows]
        exact = dense_rows(wide[0] * wide_gain, wide[1], wide[2], rows, causal=causal)
    results, expected = {"output": out.detach()}, {"output": exact.detach()}
    if backward:
        grad = _upstream(out, seed)
        results |= _gradients(out, low, {"scale": gain}, grad)
        expected |= _gradients(exact, wide, {"scale": wide_gain}, grad.double())
        results["parts"] = _partial_sums(q.detach() * results["dq"]).to(q.dtype)
        expected["parts"] = _partial_sums(wide[0].detach() * expected["dq"])
    once = torch.finfo(q.dtype).eps / 2  # no implementation can do better than round the result
    errors = _errors(results, expected)
    if backward:
        errors["scale"] = max(errors["scale"], errors.pop("parts"))
    return {n: max(LOW_PRECISION_FACTOR * e, once) for n, e in errors.items()}


def _partial_sums(x: Tensor) -> Tensor:
    """Sum x (B, H, N, D) over every PARTIAL_SUMS-th token: float64 (PARTIAL_SUMS, H)."""
    each = x.double().sum((0, 3))
    return torch.stack([each[:, first::PARTIAL_SUMS].sum(1) for first in range(PARTIAL_SUMS)])


def _upstream(like: Tensor, seed: int) -> Tensor:
    """Draw an upstream gradient, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


def check_case(
    subject: Subject,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    tolerance: Mapping[str, float],
    *,
    backward: bool,
    seed: int = 0,
) -> Check:
    """Compare output, and with ``backward`` the gradients, with the oracle on sampled rows.

    The upstream gradient is random on the rows and zero elsewhere, so that an oracle which
    computes those rows alone has the whole gradient of k, v and every parameter.

    Args:
        subject: the attention and its oracle.
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        rows: positions (R,) to compare.
        tolerance: from :func:`tolerances`; a parameter's gradient is allowed the largest of them.
        backward: compare gradients too.
        seed: of the upstream gradient.

    Returns:
        The outcome; it is not ok either where rounding decides more than a tenth of the rows.
    """
    sampled = len(rows)
    rows = rows[decided_rows(subject, (q, k, v), rows)]
    undecided = sampled - len(rows)

    def outcome(ok: bool, error: float, tolerance: float, worst: str, reason: str) -> Check:
        return Check(ok, error, tolerance, worst, len(rows), undecided, subject.kind, reason)

    if undecided > MAX_UNDECIDED_SHARE * sampled:
        reason = f"rounding decides the selection of {undecided} of {sampled} sampled rows"
        return outcome(False, math.inf, 0.0, "selection", reason)

    rows = rows.to(q.device)
    leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    twins = [x.detach().clone().requires_grad_(backward) for x in (q, k, v)]
    poison_free_memory(q)
    with torch.set_grad_enabled(backward):
        out = subject.attend(*leaves)
        reason = output_fault(out, leaves)
        if not reason and not all(map(torch.equal, leaves, twins)):
            reason = WRITTEN
        if not reason and not bool(torch.isfinite(out).all()):
            reason = "output has values that are not finite"
        if reason:
            return outcome(False, math.inf, 0.0, "output", reason)
        exact = subject.oracle(twins[0], twins[1], twins[2], rows)
    results, expected = {"output": out.detach()[:, :, rows]}, {"output": exact.detach()}
    grad = torch.zeros_like(out)
    if backward:
        grad[:, :, rows] = _upstream(out[:, :, rows], seed)
        results |= _gradients(out, leaves, subject.parameters, grad)
        expected |= _gradients(exact, twins, subject.oracle_parameters, grad[:, :, rows].double())
    largest = max(tolerance.values())
    errors = _errors(results, expected)
    worst = max(errors, key=lambda name: errors[name] / tolerance.get(name, largest))
    error, allowed = errors[worst], tolerance.get(worst, largest)
    reason = ""
    if not error <= allowed:
        reason = f"{worst}: relative error {error:.1e}, tolerance {allowed:.1e} ({subject.kind})"
    check = outcome(error <= allowed, error, allowed, worst, reason)
    return replace(check, positions=rows, output=results["output"])


def check_rows(
    subject: Subject, inputs: Sequence[Tensor], rows: Tensor, output: Tensor, allowed: float
) -> str:
    """Compare rows of an output that a call has given with the oracle.

    Args:
        subject: the attention and its oracle.
        inputs: q, k, v of that call.
        rows: positions (R,); those that rounding decides are left out.
        output: (B, H, R, D).
        allowed: relative error.

    Returns:
        Why the output is wrong, in one line; empty if it is right.
    """
    decided = decided_rows(subject, inputs, rows)
    if not bool(decided.any()):
        return ""
    with torch.no_grad():
        exact = subject.oracle(inputs[0], inputs[1], inputs[2], rows[decided])
    error = relative_error(output[:, :, decided], exact)
    if error <= allowed:
        return ""
    return f"relative error {error:.1e}, tolerance {allowed:.1e} ({subject.kind})"


def check_gradients(
    subject: Subject,
    inputs: Sequence[Tensor],
    rows: Tensor,
    grad: Tensor,
    gradients: Mapping[str, Tensor],
    tolerance: Mapping[str, float],
    slack: float,
) -> tuple[float, str]:
    """Compare gradients of some rows' outputs with the oracle's.

    Args:
        subject: the attention and its oracle.
        inputs: q, k, v.
        rows: positions (R,), none of which rounding decides.
        grad: upstream gradient on the rows, (B, H, R, D).
        gradients: dq, dk, dv and the gradient of every parameter, by name.
        tolerance: from :func:`tolerances`.
        slack: allowed multiple of the tolerance.

    Returns:
        The largest error over what is allowed, and which it is, in one line.
    """
    twins = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        exact = subject.oracle(twins[0], twins[1], twins[2], rows)
        expected = _gradients(exact, twins, subject.oracle_parameters, grad.double())
    largest = max(tolerance.values())
    allowed = {name: slack * tolerance.get(name, largest) for name in expected}
    errors = _errors(gradients, expected)
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return errors[worst] / allowed[worst], (
        f"{worst}: relative error {errors[worst]:.1e}, tolerance {allowed[worst]:.1e} "
        f"({subject.kind})"
    )


def decided_rows(subject: Subject, inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return (R,) bool: the rows whose selection rounding does not decide.

    Args:
        subject: the attention and its oracle.
        inputs: q, k, v.
        rows: positions (R,).
    """
    if subject.undecided is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return ~subject.undecided(inputs[0], inputs[1], inputs[2], rows).detach().to(rows.device)


def _gradients(
    out: Tensor, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    names = ["dq", "dk", "dv", *parameters]
    wrt = [*inputs, *parameters.values()]
    gradients = torch.autograd.grad(out, wrt, grad, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def _errors(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    sizes = [float(expected[name].norm()) for name in expected if name != "output"]
    floor = NEGLIGIBLE * max(sizes, default=0.0)
    return {
        name: _relative(results[name], expected[name], floor=0.0 if name == "output" else floor)
        for name in expected
    }


def _relative(results: Tensor, expected: Tensor, floor: float) -> float:
    wide = expected.double()
    difference = float((results.double() - wide).norm())
    size = max(float(wide.norm()), floor)
    if not math.isfinite(difference):
        return math.inf
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def _later(rows: Tensor, length: int) -> Tensor:
    """Return (R, N) bool: the tokens after each row."""
    return torch.arange(length, device=rows.device) > rows[:, None]
