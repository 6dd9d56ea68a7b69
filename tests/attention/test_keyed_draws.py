"""Draws that are a function of seed, step, attention and example."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from danon import BaseAttention
from danon.attention.keyed_draws import (
    DrawKey,
    clear_draw_key,
    draw,
    draw_by_example,
    number_attentions,
    set_draw_key,
)

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.ModuleList([BaseAttention(), nn.Linear(2, 2), BaseAttention()])


def key(step: int = 0, number: int = 0, rows: list[int] | None = None, seed: int = 0) -> DrawKey:
    attentions = model()
    set_draw_key(attentions, seed, step, rows)
    found = number_attentions(attentions)[number].draw_key
    assert isinstance(found, DrawKey)
    return found


class TestDraws:
    def test_draws_are_uniform(self) -> None:
        x = draw_by_example(key(rows=list(range(64))), 64, 4096, CPU)
        assert 0 <= float(x.min()) and float(x.max()) < 1
        counts = torch.histc(x, bins=64, min=0, max=1)
        expected = x.numel() / 64
        # Chi-squared with 63 degrees of freedom: 120 has a chance of 2e-5.
        assert float(((counts - expected) ** 2 / expected).sum()) < 120
        assert abs(float(torch.corrcoef(x).fill_diagonal_(0).abs().max())) < 0.08
        neighbours = torch.stack((x[:, 1:].flatten(), x[:, :-1].flatten()))
        assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01

    def test_each_part_of_the_key_counts(self) -> None:
        base = draw(key(), 8, CPU)
        assert torch.equal(base, draw(key(), 8, CPU))
        others = (key(step=1), key(number=1), key(seed=1))
        draws = [draw(other, 8, CPU) for other in others] + [draw(key(), 8, CPU, kind=1)]
        draws.append(draw_by_example(key(rows=[0]), 1, 8, CPU)[0])
        assert all(not torch.isin(other, base).any() for other in draws)

    def test_examples_draw_by_their_position(self) -> None:
        whole = draw_by_example(key(rows=[0, 1, 2, 3]), 4, 16, CPU)
        for rows in ([1, 3], [0], [2, 0]):
            assert torch.equal(draw_by_example(key(rows=rows), len(rows), 16, CPU), whole[rows])
        assert torch.equal(draw_by_example(key(), 4, 16, CPU), whole)

    def test_rows_that_stand_for_groups(self) -> None:
        assert draw_by_example(key(rows=[0, 1]), 6, 4, CPU).unique(dim=0).shape[0] == 6

    def test_another_number_of_examples_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match="the draw key has 2 rows: must have one for each of 3"
        ):
            draw_by_example(key(rows=[0, 1]), 3, 4, CPU)

    def test_without_a_key_torch_draws(self) -> None:
        def drawn() -> tuple[Tensor, Tensor]:
            torch.manual_seed(3)
            return draw(None, 4, CPU), draw_by_example(None, 2, 4, CPU)

        assert all(torch.equal(*pair) for pair in zip(drawn(), drawn(), strict=True))
        torch.manual_seed(3)
        assert torch.equal(torch.rand(4), drawn()[0])


class TestModels:
    def test_parts_of_a_model_keep_their_numbers(self) -> None:
        whole = model()
        number_attentions(whole)
        part = nn.ModuleList([copy.deepcopy(whole[2])])
        set_draw_key(part, 0, 5)
        set_draw_key(whole, 0, 5)
        assert torch.equal(part[0].draw_key.step, whole[2].draw_key.step)

    def test_a_cleared_key_and_a_copy_draw_freely(self) -> None:
        attentions = model()
        set_draw_key(attentions, 0, 0)
        assert copy.deepcopy(attentions[0]).draw_key is None
        clear_draw_key(attentions)
        assert attentions[0].draw_key is None

    def test_compiled_draws_do_not_compile_again_for_each_step(self) -> None:
        compiled = torch.compile(lambda k: draw(k, 8, CPU), fullgraph=True, backend="eager")
        for step in range(4):
            assert torch.equal(compiled(key(step)), draw(key(step), 8, CPU))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
