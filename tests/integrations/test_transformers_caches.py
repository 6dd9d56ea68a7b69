"""Caches of DANON attention in Hugging Face models are selected, copied and saved."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import MECHANISMS, SMALL, build, output, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 3
SELECTIONS: dict[str, Any] = {
    "boolean mask": torch.tensor([True, False, True]),
    "boolean list": [False, True, True],
    "list": [2, 0, 0],
    "slice": slice(1, None),
    "backward": torch.tensor([-1, -3]),
    "range": torch.arange(ROWS),
    "one row": [1],
}


def filled(mechanism: str | None, length: int = 50) -> tuple[Any, Any]:
    """Return a llama and its cache of the first ``length`` tokens of each row."""
    model = build("llama", mechanism, SMALL[mechanism] if mechanism else None)
    cache = transformers.DynamicCache()
    output(model, tokens(ROWS)[:, :length], past_key_values=cache)
    return model, cache


@pytest.mark.parametrize("what", SELECTIONS)
def test_rows_are_selected_as_a_dynamic_cache_selects_them(what: str) -> None:
    for mechanism in (None, "msra"):
        model, cache = filled(mechanism)
        cache.batch_select_indices(SELECTIONS[what])
        ids = tokens(ROWS)[SELECTIONS[what]]
        got = output(model, ids[:, 50:], past_key_values=cache)
        torch.testing.assert_close(got, output(model, ids)[:, 50:], rtol=0, atol=1e-4)


def test_rows_are_repeated_and_reordered_as_in_a_dynamic_cache() -> None:
    order = torch.tensor([5, 0, 3, 3])
    for mechanism in (None, "msra"):
        model, cache = filled(mechanism)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(order)
        ids = tokens(ROWS).repeat_interleave(2, 0)[order]
        got = output(model, ids[:, 50:], past_key_values=cache)
        torch.testing.assert_close(got, output(model, ids)[:, 50:], rtol=0, atol=1e-4)


def test_missing_rows_are_refused() -> None:
    for mechanism in (None, "msra"):
        _, cache = filled(mechanism)
        for rows in (torch.tensor([0, 3]), [-4], torch.tensor([True, False])):
            with pytest.raises(IndexError):
                cache.batch_select_indices(rows)
        for rows in (torch.tensor([0, 3]), torch.tensor([-1])):
            with pytest.raises((IndexError, RuntimeError)):
                cache.reorder_cache(rows)
    for nothing in ([], torch.zeros(3, dtype=torch.bool), 1, torch.zeros(1, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rows of shape .* chosen of a cache: must be one or"):
            cache.batch_select_indices(nothing)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_caches_are_copied_and_saved(mechanism: str) -> None:
    model, cache = filled(mechanism)
    rest = tokens(ROWS)[:, 50:]
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    copies = (
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),  # noqa: S301 - written a line before
        torch.load(file, weights_only=False),
    )
    want = output(model, rest, past_key_values=cache)
    for again in copies:
        assert again.get_seq_length() == 50
        assert again.layers[1].before is again.layers[0]
        assert torch.equal(output(model, rest, past_key_values=again), want)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cache_of_inference_mode_continues_outside(mechanism: str) -> None:
    with torch.inference_mode():
        model, cache = filled(mechanism)
    ids = tokens(ROWS)
    model = build("llama", mechanism, SMALL[mechanism])
    got = [output(model, ids[:, i : i + 1], past_key_values=cache) for i in range(50, 60)]
    torch.testing.assert_close(torch.cat(got, 1), output(model, ids)[:, 50:], rtol=0, atol=5e-4)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_mask_that_hides_read_tokens_is_refused(mechanism: str) -> None:
    ids, whole = tokens(ROWS), torch.ones(ROWS, 51, dtype=torch.long)
    model, cache = filled(mechanism)
    hidden = whole.clone()
    hidden[1, 20:30] = 0
    said = r"has \[50, 40, 50\] real tokens .* has read \[50, 50, 50\]"
    with pytest.raises(ValueError, match=said):
        output(model, ids[:, 50:51], past_key_values=cache, attention_mask=hidden)
    model, cache = filled(mechanism)
    for mask in (whole, None):  # None: of all tokens
        again = copy.deepcopy(cache)
        output(model, ids[:, 50:51], past_key_values=again, attention_mask=mask)


def test_cache_of_danon_attention_is_not_continued_by_another() -> None:
    _, cache = filled("msra")
    with pytest.raises(ValueError, match="a danon state of 50 tokens and no keys, which another"):
        output(build("llama"), tokens(ROWS)[:, 50:51], past_key_values=cache)
    model, _ = filled("dala")
    with pytest.raises(ValueError, match="state is of MSRA: must be of DALA"):
        output(model, tokens(ROWS)[:, 50:51], past_key_values=cache)
