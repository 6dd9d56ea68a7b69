"""A model whose heads are spread over ranks gives what it gives in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from small_models import KINDS, small_language_model
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from danon import create_msra_model
from danon.attention.keyed_draws import set_draw_key
from danon.distributed.sequence_parallel import SequenceParallel
from danon.distributed.tensor_parallel import TensorParallel
from danon.models import Backbone

Figures = dict[str, Any]


def joined(model: Backbone) -> TensorParallel:
    """Spread a model over the ranks that this process is one of."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return TensorParallel(model)


def inputs(length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, : length // 4] = 0  # padding may stand anywhere
    return ids, mask


def passed(model: Any, length: int) -> Figures:
    ids, mask = inputs(length)
    logits = model(ids, mask)
    auxiliary = model.auxiliary_loss()
    (F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()) + auxiliary).backward()
    return {"logits": logits.detach(), "auxiliary": auxiliary.item()}


def gradients(model: Backbone) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_one(kind: str, length: int, dtype: torch.dtype, fields: Figures) -> Figures:
    model = small_language_model(kind, **fields).to(dtype)
    set_draw_key(model, seed=0, step=1)
    figures = passed(model, length)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return {**figures, "norm": norm.item(), "gradients": gradients(model)}


def on_ranks(kind: str, length: int, dtype: torch.dtype, fields: Figures) -> Figures:
    """Return figures with the gradients of the whole model, joined like its weights."""
    parallel = joined(small_language_model(kind, **fields).to(dtype))
    set_draw_key(parallel, seed=0, step=1)
    figures = passed(parallel, length)
    parallel.sum_gradients()
    norm = parallel.clip_gradients(0.5)
    grads = gradients(parallel.module)
    with torch.no_grad():
        for name, parameter in parallel.module.named_parameters():
            if name in grads:
                parameter.copy_(grads[name])
    whole = parallel.whole_state_dict()
    return {**figures, "norm": norm.item(), "gradients": {name: whole[name] for name in grads}}


def assert_equal(one: Figures, ranks: list[Figures], near: float) -> None:
    for rank in ranks:
        off = (rank["logits"] - one["logits"]).abs().max()
        assert off <= near * one["logits"].abs().max()
        assert rank["auxiliary"] == pytest.approx(one["auxiliary"], rel=near, abs=1e-12)
        assert rank["norm"] == pytest.approx(one["norm"], rel=1e-5)  # their norms are float32
        assert rank["gradients"].keys() == one["gradients"].keys()
        for name, expected in one["gradients"].items():
            off = (rank["gradients"][name] - expected).abs().max()
            assert off <= 1e-5 * expected.abs().max() + 1e-12, name


@pytest.mark.parametrize("length", [20, 151])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_what_one_process_does(kind: str, length: int) -> None:
    """Two heads on each rank: DALA's windows go by the number of the head modulo four."""
    case = kind, length, torch.float64, {}
    assert_equal(on_one(*case), rank_pool(2).run(on_ranks, *case), 1e-9)


@pytest.mark.parametrize("kind", ["msra", "dala", "ucsa"])
def test_float32_with_gradient_checkpointing(kind: str) -> None:
    case = kind, 151, torch.float32, {"num_kv_heads": 4, "gradient_checkpointing": True}
    assert_equal(on_one(*case), rank_pool(2).run(on_ranks, *case), 1e-5)


def test_dropout_of_remembered_tokens() -> None:
    case = "dala", 151, torch.float64, {"attention_dropout": 0.3}
    assert_equal(on_one(*case), rank_pool(2).run(on_ranks, *case), 1e-9)


def read(kind: str) -> tuple[list[int], bool]:
    """Return tokens that a spread model generates, and whether its whole state is the model's."""
    model = small_language_model(kind).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    parallel = joined(model)
    tokens, _ = parallel.generate(inputs(100)[0], 5)
    after = parallel.whole_state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    return tokens.tolist(), same and before.keys() == after.keys()


@pytest.mark.parametrize("kind", ["msra", "dala", "ucsa"])
def test_generated_tokens_and_whole_state(kind: str) -> None:
    expected, _ = small_language_model(kind).eval().generate(inputs(100)[0], 5)
    for tokens, same in rank_pool(2).run(read, kind):
        assert tokens == expected.tolist()
        assert same


def drawn_without_a_key() -> list[float]:
    """Return auxiliary losses of ranks whose generators are in different states."""
    parallel = joined(small_language_model("ucsa"))
    torch.manual_seed(dist.get_rank())
    return [passed(parallel, 151)["auxiliary"] for _ in range(2)]


def test_ranks_draw_the_same_without_a_key() -> None:
    one, other = rank_pool(2).run(drawn_without_a_key)
    assert one == other
    assert one[0] != one[1]


def refused(heads: int, kv_heads: int) -> str:
    model = create_msra_model(
        hidden_size=96, num_heads=heads, num_kv_heads=kv_heads, num_layers=1, task="lm"
    )
    try:
        joined(model)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"), [(3, 3, "num_heads = 3"), (6, 3, "num_kv_heads = 3")]
)
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, message: str) -> None:
    for error in rank_pool(2).run(refused, heads, kv_heads):
        assert error == f"{message}: must be a multiple of the 2 ranks"


def spread_twice() -> str:
    parallel = joined(small_language_model("msra"))
    try:
        SequenceParallel(parallel.module)
    except ValueError as error:
        return str(error)
    return ""


def test_a_model_with_spread_heads_cannot_be_cut() -> None:
    for error in rank_pool(2).run(spread_twice):
        assert error == "the heads of the model are spread over processes already"


def test_one_process_alone() -> None:
    model = small_language_model("dala")
    expected = model(inputs(50)[0])
    assert torch.equal(TensorParallel(model)(inputs(50)[0]), expected)
