"""The attention contract as an inheritable test class (needs pytest).

class TestMine(AttentionContract):
    def make(self, causal, num_kv_heads=4):
        return Mine(MyConfig(hidden_size=32, num_heads=4, num_kv_heads=num_kv_heads, causal=causal))
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.base import BaseAttention
from danon.measure.correctness import Subject, check_case, tolerances

__all__ = [
    "AttentionContract",
    "Inputs",
    "assert_causal",
    "assert_matches_oracle",
    "relative_error",
]


class Inputs(NamedTuple):
    """Arguments of an attention.

    Attributes:
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        mask: padding (B, N) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


def make_inputs(
    module: BaseAttention,
    length: int,
    *,
    batch: int = 2,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Draw random inputs for an attention.

    Args:
        module: says shapes.
        length: tokens N.
        batch: B.
        padded: True: with a mask that hides a third of the tokens, anywhere.
        dtype: of q, k and v.
        seed: of the random numbers.

    Returns:
        q (B, H, N, D), k and v (B, G, N, D), and a mask (B, N) or None.
    """
    c, g = module.config, torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, c.head_dim) for heads in (c.num_heads, c.kv_heads, c.kv_heads)]
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float32).to(dtype) for s in shapes)
    mask = torch.rand(batch, length, generator=g, dtype=torch.float32) > 1 / 3 if padded else None
    return Inputs(q, k, v, mask)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ||got - want|| / ||want|| in float64; ||got - want|| where want is zero.

    Args:
        got: the tensor to judge.
        want: the exact one, of the same shape.
    """
    difference, size = (got.detach().double() - want.detach()).norm(), want.detach().double().norm()
    return float(difference / size if size > 0 else difference)


def assert_matches_oracle(
    module: BaseAttention, x: Inputs, forward: float = 1e-5, backward: float = 1e-4
) -> None:
    """Assert that output and all gradients agree with the float64 oracle.

    Rows the module calls undecided (``undecided_rows``) are left out.

    Args:
        module: the attention.
        x: inputs.
        forward: largest relative error of the output.
        backward: largest relative error of a gradient.

    Raises:
        AssertionError: says what differs, and by how much.
    """
    leaves = [t.clone().requires_grad_() for t in x[:3]]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    rows = torch.arange(x.q.shape[2])
    rows = rows[~module.undecided_rows(*x, rows=rows)]
    assert len(rows) >= 0.75 * x.q.shape[2], "rounding decides the selection of too many rows"
    got, want = (
        module(*leaves, x.mask)[:, :, rows],
        module.oracle(wide[0], wide[1], wide[2], x.mask, rows),
    )
    assert got.dtype == x.q.dtype and got.isfinite().all()
    error = relative_error(got, want)
    assert error <= forward, f"forward error {error:.2e} > {forward:.2e}"
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    grad = grad.to(got.dtype)
    names = ["q", "k", "v", *(name for name, _ in module.named_parameters())]
    parameters = list(module.parameters())
    d_got: tuple[Tensor | None, ...] = torch.autograd.grad(
        (got * grad).sum(), [*leaves, *parameters], allow_unused=True
    )
    d_want: tuple[Tensor | None, ...] = torch.autograd.grad(
        (want * grad.double()).sum(), [*wide, *parameters], allow_unused=True
    )
    # A gradient that is zero by symmetry is noise in any precision: compare to the largest.
    floor = 1e-6 * max(float(d.norm()) for d in d_want if d is not None)
    for name, a, b in zip(names, d_got, d_want, strict=True):
        if a is None or b is None:
            unused = b if a is None else a
            assert unused is None or float(unused.norm()) <= floor, f"{name} lost its gradient"
        elif float(b.norm()) > floor:
            error = relative_error(a, b)
            assert error <= backward, f"gradient of {name}: error {error:.2e} > {backward:.2e}"
        else:
            assert float(a.norm()) <= 10 * floor, f"gradient of {name} should vanish"


def assert_causal(module: BaseAttention, x: Inputs, places: list[int]) -> None:
    """Assert that changing all tokens after a place leaves the output up to it unchanged.

    Args:
        module: the attention.
        x: inputs.
        places: positions, each of which is tried.

    Raises:
        AssertionError: names the output and the place.
    """
    with torch.no_grad():
        before = module(*x)
        for place in places:
            changed = [
                torch.cat((t[:, :, : place + 1], -3 * t[:, :, place + 1 :] + 1), 2) for t in x[:3]
            ]
            after = module(*changed, x.mask)
            moved = (after - before)[:, :, : place + 1].abs().amax(dim=(0, 1, 3))
            first = int(moved.gt(1e-6).int().argmax())
            assert float(moved.max()) <= 1e-6, f"output {first} sees a token after {place}"


def _subject(module: BaseAttention, parameters: dict[str, Tensor]) -> Subject:
    """Return the module and its oracle, as the suites' check takes them."""

    def oracle(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        return module.oracle(q, k, v, rows=rows)

    def undecided(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        return module.undecided_rows(q, k, v, None, rows)

    return Subject(module, oracle, module.oracle_kind, parameters, parameters, undecided)


class AttentionContract:
    """Tests that every attention must pass.

    Subclass it in a test module and define :meth:`make`, with sizes for which N = 103 uses every
    branch.

    Example::

        class TestWindow(AttentionContract):
            def make(self, causal, num_kv_heads=4):
                shape = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": num_kv_heads}
                return Window(AttentionConfig(**shape, causal=causal))

    Attributes:
        lengths: tokens N of the inputs.
        half_lengths: tokens N of inputs in bfloat16 and float16.
    """

    lengths = (1, 7, 8, 17, 40, 103)
    half_lengths = (17, 103)

    def make(self, causal: bool, num_kv_heads: int = 4) -> BaseAttention:
        """Build the attention under test.

        Args:
            causal: later tokens are hidden.
            num_kv_heads: G, a divisor of 4, which H is.
        """
        raise NotImplementedError("define make(causal, num_kv_heads)")

    def trained(self, causal: bool, num_kv_heads: int = 4) -> BaseAttention:
        """Build an instance whose parameters are all away from where they start."""
        module = self.make(causal, num_kv_heads).eval()
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float32) * 0.3)
        return module

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_matches_oracle(self, causal: bool, padded: bool) -> None:
        """Compare output and gradients with the float64 oracle."""
        for heads in (4, 2):
            module = self.trained(causal, heads)
            for length in self.lengths:
                assert_matches_oracle(module, make_inputs(module, length, padded=padded))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("causal", [False, True])
    def test_low_precision_is_as_good_as_dense(self, causal: bool, dtype: torch.dtype) -> None:
        """Bound the error in half precision by twice that of dense attention."""
        for length in self.half_lengths:
            module = self.trained(causal)
            x = make_inputs(module, length, dtype=dtype)
            q, k, v, _ = x
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            q, k, v = q.double(), k.double(), v.double()
            exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            rows = torch.arange(length)
            rows = rows[~module.undecided_rows(*x, rows=rows)]
            error = relative_error(module(*x)[:, :, rows], module.oracle(*x, rows=rows))
            assert error <= 2 * relative_error(dense, exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("causal", [False, True])
    def test_low_precision_gradients_are_as_good_as_dense(
        self, causal: bool, dtype: torch.dtype
    ) -> None:
        """Check gradients in half precision with the tolerances of the suites."""
        for length in self.half_lengths:
            module = self.make(causal).eval()
            q, k, v, _ = make_inputs(module, length, dtype=dtype)
            rows = torch.arange(length)
            parameters: dict[str, Tensor] = dict(module.named_parameters())
            subject = _subject(module, parameters)
            allowed = tolerances(q, k, v, rows, causal=causal, backward=True)
            check = check_case(subject, q, k, v, rows, allowed, backward=True)
            assert check.ok, check.reason

    def test_no_causal_leak(self) -> None:
        """Change later tokens; earlier outputs stay."""
        module = self.trained(True)
        assert_causal(module, make_inputs(module, 103), [0, 6, 7, 30, 31, 50, 77, 101])

    def test_oracle_rows_are_rows_of_the_whole(self) -> None:
        """Compare the oracle of some rows with those rows of all."""
        for causal in (False, True):
            module = self.trained(causal, 2)
            x, rows = make_inputs(module, 103, padded=True), torch.tensor([0, 5, 64, 102])
            torch.testing.assert_close(module.oracle(*x, rows=rows), module.oracle(*x)[:, :, rows])

    def test_padding_tokens_have_no_influence(self) -> None:
        """Put NaN, infinity and large numbers in padding; outputs stay."""
        for causal in (False, True):
            module = self.trained(causal)
            x = make_inputs(module, 103, padded=True)
            assert x.mask is not None
            hole = ~x.mask[:, None, :, None]
            for value in (torch.nan, torch.inf, 1e30):
                changed = [torch.where(hole, value, t) for t in x[:3]]
                with torch.no_grad():
                    torch.testing.assert_close(module(*changed, x.mask), module(*x))

    def test_a_padded_row_gets_what_it_gets_alone(self) -> None:
        """Pad on the left, on the right and between: none of it is part of a sequence."""
        for causal in (False, True):
            module = self.trained(causal)
            q, k, v, mask = make_inputs(module, 103, batch=4, padded=True)
            assert mask is not None
            mask[1], mask[2] = torch.arange(103) >= 40, torch.arange(103) < 61
            with torch.no_grad():
                out = module(q, k, v, mask)
                assert out.transpose(1, 2)[~mask].eq(0).all()
                for b, real in enumerate(mask):
                    alone = module(*(t[b : b + 1, :, real] for t in (q, k, v)))
                    assert relative_error(out[b, :, real], alone[0].double()) <= 1e-5

    def test_a_row_without_a_token_gives_zeros(self) -> None:
        """Pad a whole row; outputs and gradients are zeros."""
        for causal in (False, True):
            module = self.trained(causal)
            q, k, v, _ = make_inputs(module, 40)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            mask = torch.ones(2, 40, dtype=torch.int64)
            mask[0] = 0
            mask[1, :9] = 0
            out = module(*leaves, mask)
            assert out[0].eq(0).all() and out.isfinite().all() and out[1, :, :9].eq(0).all()
            for g in torch.autograd.grad(out.square().sum(), leaves):
                assert g.isfinite().all() and g[0].eq(0).all()

    def test_batch_and_layout_do_not_matter(self) -> None:
        """Compare with other batches and memory layouts."""
        module = self.trained(True)
        q, k, v, _ = make_inputs(module, 57, batch=3)
        whole = module(q, k, v)
        torch.testing.assert_close(whole[1:2], module(q[1:2], k[1:2], v[1:2]))
        for a, b in ((1, 2), (2, 3)):  # tokens outermost; width not innermost
            strided = [t.transpose(a, b).contiguous().transpose(a, b) for t in (q, k, v)]
            torch.testing.assert_close(whole, module(*strided))

    def test_autocast_leaves_it_alone(self) -> None:
        """Compare with the output under autocast."""
        module = self.trained(True)
        x = make_inputs(module, 103)
        with torch.autocast("cpu", torch.bfloat16):
            inside = module(*x)
        torch.testing.assert_close(inside, module(*x))

    def test_bad_input_is_named(self) -> None:
        """Expect an error that names the wrong tensor."""
        module = self.make(True)
        q, k, v, _ = make_inputs(module, 8)
        for bad, message in (
            ((q[0], k, v), r"q has shape \(4, 8, 8\): must be \(B, H, N, D\)"),
            ((q, k[:, :, :7], v), r"k has shape .* must be"),
            ((q, k, v.bfloat16()), r"v is torch.bfloat16 .* must be torch.float32"),
            ((q.long(), k.long(), v.long()), r"q is torch.int64: must be one of"),
            ((q[:, :, :0], k[:, :, :0], v[:, :, :0]), r"B and N must be at least 1"),
            ((q, k, v, torch.ones(2, 7)), r"mask has shape \(2, 7\): must be \(B, N\) = \(2, 8\)"),
            ((q, k, v, torch.zeros(2, 8).log()), r"mask holds -inf: must be bool, or 1 for a real"),
            ((q, k, v, torch.full((2, 8), 2)), r"mask holds 2: must be bool, or 1 for a real"),
            ((q.to("meta"), k, v), r"k is torch.float32 on cpu: must be .* meta"),
        ):
            with pytest.raises(ValueError, match=message):
                module(*bad)
