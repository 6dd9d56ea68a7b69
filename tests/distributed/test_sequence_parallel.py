"""A model on parts of its sequences gives what it gives on the whole, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from small_mechanisms import small_ucsa
from small_models import KINDS, small_language_model
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from danon import UCSA, create_msra_model
from danon.attention.keyed_draws import set_draw_key
from danon.config import AttentionConfig
from danon.distributed.process_group import Group
from danon.distributed.sequence_parallel import SequenceParallel, ShardOfGroup
from danon.models import Backbone
from danon.models.short_convolution import ShortConvolution

LENGTHS = {
    "inside the near window": 20,
    "one token more than ranks": 3,
    "long": 150,
    "odd": 151,
    "odd and longer": 301,
}
PADDING = {"half of a row": (70, 150), "all of the last part": (150, 20)}
"""Real tokens of both rows of 150."""
Figures = dict[str, Any]


def joined(model: Backbone) -> SequenceParallel:
    """Spread a model over the ranks that this process is one of."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return SequenceParallel(model)


def inputs(length: int, real: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 96, (2, length), generator=g)
    labels = ids.roll(-1, 1)
    if real is None:
        return ids, labels, None
    mask = torch.arange(length) < torch.tensor(real)[:, None]
    return ids, labels.masked_fill(~mask, -100), mask


def passed(
    model: Any,
    x: tuple[Tensor, Tensor, Tensor | None],
    mean: Callable[[Tensor, Tensor], Tensor],
    key: bool = True,
) -> Figures:
    """Run a model forward and backward."""
    ids, labels, mask = x
    if key:
        set_draw_key(model, seed=0, step=1)
    logits = model(ids, mask)
    labels = labels.flatten()
    losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none", ignore_index=-100)
    auxiliary = model.auxiliary_loss()
    loss = mean(losses, labels >= 0) + auxiliary
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.item(), "auxiliary": auxiliary.item()}


def gradients(model: Backbone) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_one(
    kind: str, length: int, real: tuple[int, ...] | None, dtype: torch.dtype, **fields: Any
) -> Figures:
    model = small_language_model(kind, **fields).to(dtype)
    figures = passed(model, inputs(length, real), lambda x, counted: x[counted].mean())
    return {**figures, "gradients": gradients(model)}


def on_parts(
    kind: str, length: int, real: tuple[int, ...] | None, dtype: torch.dtype, fields: Figures
) -> Figures:
    parallel = joined(small_language_model(kind, **fields).to(dtype))
    ids, labels, mask = inputs(length, real)
    part = parallel.cut(ids), parallel.cut(labels), None if mask is None else parallel.cut(mask)
    figures = passed(parallel, part, parallel.mean)
    parallel.sum_gradients()
    return {**figures, "gradients": gradients(parallel.module), "sent": parallel.traffic.rows_bytes}


def assert_equal(one: Figures, ranks: list[Figures], rows: float, gradient: float) -> None:
    """Compare relative to the largest number of each tensor."""
    whole = torch.cat([rank["logits"] for rank in ranks], 1)
    assert (whole - one["logits"]).abs().max() <= rows * one["logits"].abs().max()
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=rows)
        assert rank["auxiliary"] == pytest.approx(one["auxiliary"], rel=gradient, abs=1e-12)
        assert rank["gradients"].keys() == one["gradients"].keys()
        for name, expected in one["gradients"].items():
            off = (rank["gradients"][name] - expected).abs().max()
            assert off <= gradient * expected.abs().max() + 1e-12, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_what_one_process_does(kind: str, length: str) -> None:
    case = kind, LENGTHS[length], None, torch.float64
    assert_equal(on_one(*case), rank_pool(2).run(on_parts, *case, {}), 1e-9, 1e-9)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_at_the_end(kind: str, padding: str) -> None:
    case = kind, 150, PADDING[padding], torch.float64
    ranks = rank_pool(2).run(on_parts, *case, {})
    assert_equal(on_one(*case), ranks, 1e-9, 1e-9)
    assert not ranks[1]["logits"][0, PADDING[padding][0] :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_shorter_than_the_near_window(kind: str) -> None:
    """Four ranks with 5 to 16 tokens each, where a window or a period has 16."""
    for length in (21, 39, 61):
        case = kind, length, None, torch.float64
        assert_equal(on_one(*case), rank_pool(4).run(on_parts, *case, {}), 1e-9, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_near_as_rounding(kind: str) -> None:
    case = kind, 301, None, torch.float32
    assert_equal(on_one(*case), rank_pool(2).run(on_parts, *case, {}), 1e-6, 1e-5)


@pytest.mark.parametrize("kind", ["msra", "ucsa", "blend"])
def test_gradient_checkpointing_repeats_the_exchanges(kind: str) -> None:
    case = kind, 150, None, torch.float64
    fields = {"gradient_checkpointing": True}
    ranks = rank_pool(2).run(on_parts, *case, fields)
    assert_equal(on_one(*case, **fields), ranks, 1e-9, 1e-9)


MORE: dict[str, tuple[str, Figures]] = {
    "dropout of remembered tokens": ("dala", {"attention_dropout": 0.3}),
    "no router": ("dala", {"use_adaptive_router": False}),
    "literal decay": ("dala", {"decay": "literal"}),
    "calibrated nodes": ("msra", {"calibration_factor": 0.5}),
    "memory efficient nodes": ("msra", {"memory_efficient": True}),
    "uniform levels": ("msra", {"feature_fusion": "uniform"}),
    "error detection": ("ucsa", {"error_alpha": 0.5}),
    "no coarse nodes": ("ucsa", {"coarse_nodes": False}),
    "annealed sparsity": ("ucsa", {"sparsity_start": 0.3}),
    "fixed weights": ("blend", {"fusion_strategy": "fixed"}),
    "no first tokens": ("ucsa", {"global_tokens": 0}),
    "many first tokens": ("msra", {"global_tokens": 90}),
    "many first tokens of a memory": ("dala", {"global_tokens": 90}),
    "many first tokens of a tree": ("ucsa", {"global_tokens": 90}),
}


@pytest.mark.parametrize("name", MORE)
def test_settings_of_the_mechanisms(name: str) -> None:
    kind, fields = MORE[name]
    case = kind, 150, None, torch.float64
    ranks = rank_pool(2).run(on_parts, *case, fields)
    assert_equal(on_one(*case, **fields), ranks, 1e-9, 1e-9)


def autocast_on_parts(kind: str) -> float:
    """Return the relative error of a rank's logits under autocast."""
    model = small_language_model(kind)
    parallel = joined(model)
    ids, _, _ = inputs(150, None)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = parallel.cut(model(ids)), parallel(parallel.cut(ids))
        got.float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return ((got - expected).abs().mean() / expected.abs().mean()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind: str) -> None:
    assert max(rank_pool(2).run(autocast_on_parts, kind)) < 1e-2


def drawn_without_a_key() -> Figures:
    """Train on draws of torch's generator, which differs from rank to rank."""
    parallel = joined(small_language_model("ucsa"))
    torch.manual_seed(dist.get_rank())
    ids, labels, _ = inputs(150, None)
    return passed(parallel, (parallel.cut(ids), parallel.cut(labels), None), parallel.mean, False)


def test_ranks_draw_the_same_without_a_key() -> None:
    one, other = rank_pool(2).run(drawn_without_a_key)
    assert one["auxiliary"] == other["auxiliary"] > 0


# What travels

NEAR = 4 + 23
"""Tokens that the second of two ranks with 75 tokens fetches: the first ones, and those from the
block of 16 before its own on."""
ROWS_SENT = {
    # Tokens, and nodes of four tokens.
    "msra": (2 * NEAR + 2 * 17, 2 * NEAR + 2 * 17),
    # Tokens, means of periods, and a memory of 16 with a score each; gradients of all.
    "dala": (2 * NEAR + 2 * 4 + 2 * 16 + 1, 2 * NEAR + 2 * 4 + 2 * 16 + 1),
    # Tokens; leaves of four and all their tokens. Without gradients: the leaves' largest and
    # smallest keys, masses and squared lengths, and queries of 4 heads: 15 that vote, 32 that ask.
    "ucsa": (
        2 * NEAR + 2 * 17 + 2 * 71 + 2 * 17 + 2 * 17 / 16 + 2 * 15 + 2 * 32,
        2 * NEAR + 2 * 17 + 2 * 71,
    ),
}
"""Rows of 16 numbers of each key/value head that go forward from the first rank, and back."""


@pytest.mark.parametrize("kind", [*ROWS_SENT, "blend"])
def test_bytes_sent(kind: str) -> None:
    layers, batch, heads, width, bytes_each = 2, 2, 2, 16, 4
    kinds = ROWS_SENT if kind == "blend" else (kind,)
    ranks = rank_pool(2).run(on_parts, kind, 150, None, torch.float32, {})
    for rank, direction in zip(ranks, range(2), strict=True):
        rows = sum(ROWS_SENT[name][direction] for name in kinds)
        if kind == "blend":  # all three have the same near tokens here: fetched once
            rows -= 2 * 2 * NEAR
        assert rank["sent"] == layers * batch * heads * width * bytes_each * rows


# UCSA's recovery


def overflowing() -> tuple[UCSA, Tensor, Tensor, Tensor]:
    """Return an attention and inputs with a query on the last part that float32 cannot hold."""
    torch.manual_seed(0)
    module = small_ucsa(True, 2)
    q = torch.randn(1, 4, 110, 8)
    k, v = torch.randn(2, 1, 2, 110, 8)
    k[:, :, 5] *= 30
    q[0, 1, 100] = k[0, 0, 5].sign() * 1e38
    return module, q, k, v


def recovered_on_parts() -> tuple[Tensor, list[Tensor], int, float]:
    """Return outputs and gradients of this rank, recovered rows, and the auxiliary loss."""
    module, *whole = overflowing()
    rank = joined(small_language_model("msra")).cut(torch.arange(2)[None]).item()
    shard = ShardOfGroup((0, 55, 110), None, Group.of(None), seed=0)
    own = [x[:, :, 55 * rank : 55 * (rank + 1)].clone().requires_grad_() for x in whole]
    out = module.attend_shard(*own, shard)
    (out[:, :, :-10].sum() + out[:, 1, 45].sum() * rank).backward()
    gradients = [x.grad for x in own if x.grad is not None]
    return out.detach(), gradients, module.recovered, module.auxiliary_loss().item()


def test_overflow_is_recovered_on_its_part() -> None:
    module, q, k, v = overflowing()
    inputs_of_one = [x.requires_grad_() for x in (q, k, v)]
    want = module(*inputs_of_one)
    ranks = rank_pool(2).run(recovered_on_parts)
    out = torch.cat([rank[0] for rank in ranks], 2)
    assert out.isfinite().all()
    torch.testing.assert_close(out, want.detach(), rtol=1e-4, atol=1e-4)
    assert [rank[2] for rank in ranks] == [0, 1]
    assert [rank[3] for rank in ranks] == [0, 0]  # as in one process: no loss of such a pass
    counted = want[:, :, [*range(45), *range(55, 100)]].sum() + want[:, 1, 100].sum()
    counted.backward()
    for which, x in enumerate(inputs_of_one):
        assert x.grad is not None
        got = torch.cat([rank[1][which] for rank in ranks], 2)
        torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4)


# What is refused


def refused(what: str) -> str:
    """Give one rank, or all, what cannot be, and return the error."""
    model = small_language_model("msra")
    parallel = joined(model)
    rank = dist.get_rank()
    ids, _, _ = inputs(20, None)
    part, mask = parallel.cut(ids), torch.ones(2, 10)
    if what == "token":
        part = part + 96 * rank
    elif what == "batch":
        part = part[: 1 + rank]
        mask = mask[: 1 + rank]
    elif what == "gap":
        mask[:, 4] = 0
    elif what == "padding between parts":
        mask[1, 8:] = rank
    elif what == "too short":
        part = ids[:, :1]
    try:
        if what == "generate":
            parallel.generate(ids, 3)
        elif what == "too short":
            parallel.cut(part)
        else:
            parallel(part, mask)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "on_first", "on_second"),
    [
        ("token", "rank 1 of 2 was given wrong input", "must be in [0, vocab_size = 96)"),
        ("batch", "batch of 1 here, and [1, 2]", "batch of 2 here, and [1, 2]"),
        ("gap", "padding at their end only", "padding at their end only"),
        ("padding between parts", "ranks after 0, which has padding", "ranks after 0, which"),
        ("too short", "a token for each of 2 ranks", "a token for each of 2 ranks"),
        ("generate", "call generate of the model itself", "call generate of the model itself"),
    ],
)
def test_wrong_input_is_refused_on_all_ranks(what: str, on_first: str, on_second: str) -> None:
    first, second = rank_pool(2).run(refused, what)
    assert on_first in first
    assert on_second in second


def test_bidirectional_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is bidirectional: sequences can be cut only"):
        SequenceParallel(create_msra_model(hidden_size=32, num_layers=1))


def test_classifier_is_refused() -> None:
    model = create_msra_model(hidden_size=32, num_layers=1, task="classifier", causal=True)
    with pytest.raises(ValueError, match="'classifier': must be 'encoder' or 'lm'"):
        SequenceParallel(model)


def test_attention_without_parts_is_refused() -> None:
    config = AttentionConfig(hidden_size=32, num_layers=1, causal=True)
    with pytest.raises(ValueError, match="ShortConvolution takes whole sequences only"):
        SequenceParallel(Backbone(config, lambda: ShortConvolution(config)))


def test_one_process_alone() -> None:
    model = small_language_model("ucsa").double()
    parallel = SequenceParallel(model)
    ids, _, _ = inputs(150, None)
    assert torch.equal(parallel.cut(ids), ids)
    torch.testing.assert_close(parallel(ids), model(ids), rtol=1e-12, atol=1e-12)
