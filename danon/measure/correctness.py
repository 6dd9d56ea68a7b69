"""Is a case computed correctly? Sampled rows against a float64 oracle, output and gradients.

Errors are norms relative to the oracle's. fp32 has fixed tolerances; lower precision is allowed
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

__all__ = [
    "Attend",
    "Check",
    "Oracle",
    "Subject",
    "check_case",
    "check_causal",
    "check_gradients",
    "check_rows",
    "decided_rows",
    "dense_rows",
    "output_fault",
    "poison_free_memory",
    "relative_error",
    "sample_rows",
    "tolerances",
]

EARLY = 256
"""First tokens of which leaks are looked for in calls of their own."""
FORWARD_FP32 = 1e-5
GRADIENT_FP32 = 1e-4
LOW_PRECISION_FACTOR = 2.0
FLOAT64 = 1e-12
UNDECIDED_AT_MOST = 0.1
NEGLIGIBLE = 1e-3
"""A gradient smaller than this share of the largest one is compared with that share instead."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Oracle = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        attend: (q, k, v) -> (B, H, N, D).
        oracle: (q, k, v, rows), q, k, v in the dtype that is checked -> (B, H, R, D) float64,
            differentiable in them.
        kind: what the oracle is, in the attention's words.
        parameters: of ``attend``, by name.
        oracle_parameters: the same names; the tensors that ``oracle`` depends on.
        undecided: (q, k, v, rows), in the dtype that is checked, -> (R,) bool: rows whose selection
            rounding decides; or None.
    """

    attend: Attend
    oracle: Oracle
    kind: str
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    oracle_parameters: Mapping[str, Tensor] = field(default_factory=dict)
    undecided: Oracle | None = None


@dataclass(frozen=True)
class Check:
    """The outcome.

    Attributes:
        error: relative error of the tensor that is worst against its tolerance.
        tolerance: of that tensor.
        worst: which tensor: output, dq, dk, dv or the name of a parameter.
        rows: query rows compared.
        undecided: sampled rows left out.
        reason: why not ok, in one line; empty when ok.
        positions: of the rows compared, (R,).
        output: what the attention gave there, (B, H, R, D).
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
    """Sorted positions, (R,) int64: first, last, both sides of powers of two, and random ones."""
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


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``; infinite where not finite."""
    return _relative(found, wanted, floor=0.0)


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
    """Dense attention of some queries, by definition, in the dtype of q: (B, H, R, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits: Tensor = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(_later(rows, q.shape[2]), -torch.inf)
    out: Tensor = logits.softmax(-1) @ v
    return out


PARTS = 4
"""Of a sum over tokens: together their error depends less on what happens to cancel."""


def tolerances(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, causal: bool, backward: bool, seed: int = 0
) -> dict[str, float]:
    """Allowed relative error of ``output``, and with ``backward`` of ``dq``, ``dk``, ``dv``.

    Low precision: dense attention runs in that dtype and is compared with float64 on the rows.
    ``scale`` is the gradient of a gain per head on its queries: a sum over all tokens in which much
    cancels, as in the gradient of any parameter. How much is chance: also over parts of the sum.
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
    found, wanted = {"output": out.detach()}, {"output": exact.detach()}
    if backward:
        grad = _upstream(out, seed)
        found |= _gradients(out, low, {"scale": gain}, grad)
        wanted |= _gradients(exact, wide, {"scale": wide_gain}, grad.double())
        found["parts"] = _parts(q.detach() * found["dq"]).to(q.dtype)
        wanted["parts"] = _parts(wide[0].detach() * wanted["dq"])
    once = torch.finfo(q.dtype).eps / 2  # nobody can do better than to round the result
    errors = _errors(found, wanted)
    if backward:
        errors["scale"] = max(errors["scale"], errors.pop("parts"))
    return {n: max(LOW_PRECISION_FACTOR * e, once) for n, e in errors.items()}


def _parts(x: Tensor) -> Tensor:
    """Sums of x (B, H, N, D) over every PARTS-th token, float64 (PARTS, H)."""
    each = x.double().sum((0, 3))
    return torch.stack([each[:, first::PARTS].sum(1) for first in range(PARTS)])


def _upstream(like: Tensor, seed: int) -> Tensor:
    """A gradient to start from, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=g, dtype=torch.float32).to(like)


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
        tolerance: from :func:`tolerances`; a parameter's gradient is allowed the largest of them.
    """
    sampled = len(rows)
    rows = rows[decided_rows(subject, (q, k, v), rows)]
    undecided = sampled - len(rows)

    def outcome(ok: bool, error: float, tolerance: float, worst: str, reason: str) -> Check:
        return Check(ok, error, tolerance, worst, len(rows), undecided, subject.kind, reason)

    if undecided > UNDECIDED_AT_MOST * sampled:
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
    found, wanted = {"output": out.detach()[:, :, rows]}, {"output": exact.detach()}
    grad = torch.zeros_like(out)
    if backward:
        grad[:, :, rows] = _upstream(out[:, :, rows], seed)
        found |= _gradients(out, leaves, subject.parameters, grad)
        wanted |= _gradients(exact, twins, subject.oracle_parameters, grad[:, :, rows].double())
    largest = max(tolerance.values())
    errors = _errors(found, wanted)
    worst = max(errors, key=lambda name: errors[name] / tolerance.get(name, largest))
    error, allowed = errors[worst], tolerance.get(worst, largest)
    reason = ""
    if not error <= allowed:
        reason = f"{worst}: relative error {error:.1e}, tolerance {allowed:.1e} ({subject.kind})"
    verdict = outcome(error <= allowed, error, allowed, worst, reason)
    return replace(verdict, positions=rows, output=found["output"])


def check_rows(
    subject: Subject, inputs: Sequence[Tensor], rows: Tensor, output: Tensor, allowed: float
) -> str:
    """Compare rows of an output that a call has given with the oracle.

    Args:
        inputs: q, k, v of that call.
        rows: positions (R,); those that rounding decides are left out.
        output: (B, H, R, D).
        allowed: relative error.

    Returns:
        Why the output is wrong, in one line; empty if it is right.
    """
    kept = decided_rows(subject, inputs, rows)
    if not bool(kept.any()):
        return ""
    with torch.no_grad():
        exact = subject.oracle(inputs[0], inputs[1], inputs[2], rows[kept])
    error = relative_error(output[:, :, kept], exact)
    if error <= allowed:
        return ""
    return f"relative error {error:.1e}, tolerance {allowed:.1e} ({subject.kind})"


def check_gradients(
    subject: Subject,
    inputs: Sequence[Tensor],
    rows: Tensor,
    grad: Tensor,
    found: Mapping[str, Tensor],
    tolerance: Mapping[str, float],
    slack: float,
) -> tuple[float, str]:
    """Compare gradients of some rows' outputs with the oracle's.

    Args:
        inputs: q, k, v.
        rows: positions (R,), none of which rounding decides.
        grad: upstream gradient on the rows, (B, H, R, D).
        found: gradients of dq, dk, dv and of every parameter.
        tolerance: from :func:`tolerances`.
        slack: factor of it that is allowed.

    Returns:
        The largest error over what is allowed, and which it is, in one line.
    """
    twins = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        exact = subject.oracle(twins[0], twins[1], twins[2], rows)
        wanted = _gradients(exact, twins, subject.oracle_parameters, grad.double())
    largest = max(tolerance.values())
    allowed = {name: slack * tolerance.get(name, largest) for name in wanted}
    errors = _errors(found, wanted)
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return errors[worst] / allowed[worst], (
        f"{worst}: relative error {errors[worst]:.1e}, tolerance {allowed[worst]:.1e} "
        f"({subject.kind})"
    )


def decided_rows(subject: Subject, inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
    """(R,) bool: rows that the oracle can judge."""
    if subject.undecided is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return ~subject.undecided(inputs[0], inputs[1], inputs[2], rows).detach().to(rows.device)


WRITTEN = "writes into q, k or v: inputs must stay as they are"


def output_fault(out: object, inputs: Sequence[Tensor]) -> str:
    """What is wrong with an output beside its values, in one line; empty if nothing.

    It must be a plain tensor (a subclass may compute when it is read), like q, in memory of its
    own.
    """
    q = inputs[0]
    if type(out) is not Tensor:
        return f"output is a {type(out).__name__}: must be a plain torch.Tensor"
    if out.shape != q.shape or out.dtype != q.dtype:
        return f"output is {tuple(out.shape)} {out.dtype}: must be {tuple(q.shape)} {q.dtype}"
    if out.device != q.device:
        return f"output is on {out.device}: must be on {q.device} like q"
    memory = out.untyped_storage().data_ptr()
    if any(memory == x.untyped_storage().data_ptr() for x in inputs):
        return "output shares memory with q, k or v: it must have its own"
    return ""


POISONED = 8
"""Blocks of memory that are filled and freed before a call."""


def poison_free_memory(like: Tensor) -> None:
    """Fill memory that the next call may get with NaN.

    Blocks as large as ``like``: what reads memory that it has not written, an earlier output say,
    finds NaN there.
    """
    for block in [torch.empty_like(like, requires_grad=False) for _ in range(POISONED)]:
        block.fill_(math.nan)


def check_causal(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *, seed: int = 0) -> str:
    """Change every token after a random one: no output up to it may move.

    An oracle that is the attention itself in float64 shares its leaks; this finds them. One place
    is drawn in the second half, one before it, where every power of two is as likely: a leak among
    the first tokens shows only from a place between these. Short sequences may take another path:
    so the first ``EARLY`` tokens are tried alone, too, at a place that may be any, and at one of
    which every power of two is as likely.

    Returns:
        Why the attention is not causal, in one line; empty if it is.
    """
    length = q.shape[2]
    generator = torch.Generator().manual_seed(seed)
    high = max(length - 1, length // 2 + 1)
    late = int(torch.randint(length // 2, high, (), generator=generator))
    uniform, first, second = torch.rand(3, generator=generator).tolist()
    if fault := _later_tokens_move(attend, (q, k, v), [late, _early(length // 2, first)]):
        return fault
    if length <= EARLY:
        return ""
    places = [int(uniform * (EARLY - 1)), _early(EARLY, second)]
    return _later_tokens_move(attend, (q[:, :, :EARLY], k[:, :, :EARLY], v[:, :, :EARLY]), places)


def _early(length: int, drawn: float) -> int:
    """A place before the last of so many tokens, every power of two as likely.

    Args:
        drawn: from [0, 1).
    """
    return max(min(int(length**drawn) - 1, length - 2), 0)


def _later_tokens_move(attend: Attend, inputs: Sequence[Tensor], places: Sequence[int]) -> str:
    q, k, v = inputs
    with torch.no_grad():
        before = attend(q, k, v)
    for last in dict.fromkeys(places):
        # another order, sign and size: sums, maxima and norms of the later tokens all move
        changed = [
            torch.cat((x[:, :, : last + 1], x[:, :, last + 1 :].flip(2) * -1.5), dim=2)
            for x in inputs
        ]
        with torch.no_grad():
            after = attend(*changed)
        # Row by row: a leak of one token may touch a single row. Sums in another order may round
        # differently, nothing more.
        was, now = (x[:, :, : last + 1].double() for x in (before, after))
        moved = (now - was).norm(dim=-1)
        error = float((moved / was.norm(dim=-1)).masked_fill(moved == 0, 0.0).max())
        allowed = FORWARD_FP32 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps
        if not error <= allowed:
            return f"not causal: tokens after {last} move earlier outputs by {error:.1e} (relative)"
    return ""


def _gradients(
    out: Tensor, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    names = ["dq", "dk", "dv", *parameters]
    wrt = [*inputs, *parameters.values()]
    found = torch.autograd.grad(out, wrt, grad, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def _errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    sizes = [float(wanted[name].norm()) for name in wanted if name != "output"]
    floor = NEGLIGIBLE * max(sizes, default=0.0)
    return {
        name: _relative(found[name], wanted[name], floor=0.0 if name == "output" else floor)
        for name in wanted
    }


def _relative(found: Tensor, wanted: Tensor, floor: float) -> float:
    wide = wanted.double()
    difference = float((found.double() - wide).norm())
    size = max(float(wide.norm()), floor)
    if not math.isfinite(difference):
        return math.inf
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def _later(rows: Tensor, length: int) -> Tensor:
    """(R, N) bool: the tokens after each row."""
    return torch.arange(length, device=rows.device) > rows[:, None]
