"""DANON attention inside Hugging Face models: prefill, generate, caches and parameters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    CONFIGS,
    DECODERS,
    EXACT,
    MECHANISMS,
    SMALL,
    VOCAB,
    N,
    build,
    danon_parameters,
    greedy,
    output,
    padded,
    randomise,
    tokens,
)

from danon.integrations.hf_layer import LayerAttention  # noqa: E402
from danon.integrations.transformers import StreamLayer, attach  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_cover_everything_equal_sdpa(name: str, mechanism: str) -> None:
    exact, model = build(name), build(name, mechanism, EXACT[mechanism])
    ids, mask = padded(11)
    for given in (None, mask, mask.flip(1)):
        real = torch.ones_like(mask) if given is None else given
        want = output(exact, ids, attention_mask=given)[real == 1]
        got = output(model, ids, attention_mask=given)[real == 1]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        small = build(name, mechanism, SMALL[mechanism])
        assert (output(small, ids, attention_mask=given)[real == 1] - want).abs().max() > 1e-2


def test_scaling_of_the_model_is_used() -> None:
    exact, model = build("llama"), build("llama", "ucsa", EXACT["ucsa"])
    before = output(exact, tokens())
    for each in (exact, model):
        for layer in each.model.layers:
            layer.self_attn.scaling = 0.1
    want = output(exact, tokens())
    assert (want - before).abs().max() > 1e-2
    torch.testing.assert_close(output(model, tokens()), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", DECODERS)
def test_generate_equals_full_forward_passes(name: str, mechanism: str) -> None:
    model = build(name, mechanism, SMALL[mechanism])
    randomise(model)
    ids = tokens()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert all(isinstance(layer, StreamLayer) for layer in out.past_key_values.layers)
    grown = out.sequences
    for step, logits in enumerate(out.logits):
        again = output(model, grown[:, : N + step], use_cache=False)[:, -1]
        torch.testing.assert_close(logits, again, rtol=0, atol=1e-3)
        assert torch.equal(grown[:, N + step], again.argmax(-1))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cache_holds_a_state_and_no_keys(mechanism: str) -> None:
    bound = {"max_cache_size": 16} if mechanism == "ucsa" else {}
    model = build("llama", mechanism, SMALL[mechanism] | bound)
    sizes = []
    for length in (400, 1600):
        cache = transformers.DynamicCache(config=model.config)
        output(model, tokens(1, length), past_key_values=cache)
        assert cache.get_seq_length() == length and cache.layers[0].keys is None
        sizes.append(sum(layer.nbytes for layer in cache.layers))
    keys = 2 * 2 * 1200 * 16 * 4  # layers, keys and values, tokens, width of two heads, bytes
    assert sizes[1] - sizes[0] < keys / 3, sizes


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_padded_rows_equal_single_rows(mechanism: str) -> None:
    model = build("llama", mechanism, SMALL[mechanism])
    randomise(model)
    ids, mask = padded(17, batch=3)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = output(model, ids[2:, 17:])
    for use_cache in (False, True):
        got = output(model, ids, attention_mask=mask, position_ids=places, use_cache=use_cache)
        # DALA's router magnifies rounding by its temperature's inverse, in each layer.
        torch.testing.assert_close(got[2:, 17:], alone, rtol=0, atol=5e-4)
        torch.testing.assert_close(got[:1], output(model, ids[:1]), rtol=0, atol=5e-4)
    together = greedy(model, ids, attention_mask=mask)
    assert torch.equal(together[2:], greedy(model, ids[2:, 17:]))
    assert torch.equal(together[:2], greedy(model, ids[:2]))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_padded_rows_of_an_encoder_equal_single_rows(mechanism: str) -> None:
    model = build("bert", mechanism, SMALL[mechanism])
    ids, mask = padded(0, batch=3)
    mask[1, 23:] = 0
    mask[2, 40:] = 0
    got = output(model, ids, attention_mask=mask)
    torch.testing.assert_close(got[1:2, :23], output(model, ids[1:2, :23]), rtol=0, atol=1e-4)
    torch.testing.assert_close(got[2:, :40], output(model, ids[2:, :40]), rtol=0, atol=1e-4)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    moved = output(model, changed, attention_mask=mask)
    assert not torch.equal(moved[0, 0], got[0, 0])  # both sides are seen


def test_beam_search_and_chunked_prompts() -> None:
    model = build("llama", "ucsa", SMALL["ucsa"])
    ids, mask = padded(9)
    with_cache = greedy(model, ids, attention_mask=mask, num_beams=3)
    without = greedy(model, ids, attention_mask=mask, num_beams=3, use_cache=False)
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, greedy(model, ids, attention_mask=mask))
    in_chunks = greedy(model, ids, attention_mask=mask, prefill_chunk_size=13)
    assert torch.equal(in_chunks, greedy(model, ids, attention_mask=mask))


def test_cache_is_copied_repeated_and_selected() -> None:
    model = build("llama", "msra", SMALL["msra"])
    ids = tokens(2)
    cache = transformers.DynamicCache()
    output(model, ids[:, :50], past_key_values=cache)
    fork = copy.deepcopy(cache)
    want = output(model, ids)[:, 50:]
    got = output(model, ids[:, 50:], past_key_values=cache)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (N, 50)
    fork.batch_repeat_interleave(2)
    fork.batch_select_indices(torch.tensor([3, 0]))
    got = output(model, ids[:, 50:].flip(0), past_key_values=fork)
    torch.testing.assert_close(got, want.flip(0), rtol=0, atol=1e-4)
    fork.reset()
    torch.testing.assert_close(
        output(model, ids, past_key_values=fork), output(model, ids), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_parameters_are_saved_and_loaded(mechanism: str, tmp_path: Path) -> None:
    model = build("llama", mechanism, SMALL[mechanism])
    untrained = output(model, tokens())
    randomise(model)
    want = output(model, tokens())
    assert (want - untrained).abs().max() > 1e-3
    again = build("llama", mechanism, SMALL[mechanism])
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again, tokens()), want)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=f"danon_{mechanism}", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.danon == SMALL[mechanism]
    assert torch.equal(output(loaded, tokens()), want)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_checkpoint_without_danon_parameters_gets_initial_ones(
    mechanism: str, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path)
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=f"danon_{mechanism}"
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    fresh = build("llama", mechanism)
    assert danon_parameters(loaded) and len(danon_parameters(fresh)) == len(
        danon_parameters(loaded)
    )
    for name, p in loaded.named_parameters():
        assert torch.equal(p, fresh.get_parameter(name)), name
    for name, p in build("llama").named_parameters():
        assert torch.equal(p, fresh.get_parameter(name)), name
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=f"danon_{mechanism}", dtype=torch.bfloat16
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert output(half, tokens()).isfinite().all()
    assert greedy(half, tokens()).shape == (2, 12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients_reach_every_parameter(mechanism: str) -> None:
    model = build("llama", mechanism, SMALL[mechanism]).train()
    randomise(model)
    ids, mask = padded(7)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)  # with a cache, as models default to
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match=r"begun with gradients.*no_grad"), torch.no_grad():
        model(ids[:, :1], past_key_values=out.past_key_values)
    cache = transformers.DynamicCache()
    output(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"no gradients.*no_grad"):
        model(ids[:, :1], past_key_values=cache)


def test_attach_switches_a_model_over() -> None:
    model = build("llama")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.set_attn_implementation("danon_msra")
    with pytest.raises(ValueError, match=r"no parameters for danon_msra: call .*attach\(model\)"):
        model(tokens())
    attach(model)
    assert model.config._attn_implementation == "danon_msra"
    attach(model, "ucsa", **SMALL["ucsa"])
    assert model.config.danon == SMALL["ucsa"]
    fresh = build("llama", "ucsa", SMALL["ucsa"])
    assert torch.equal(output(model, tokens()), output(fresh, tokens()))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in weights.items())
    randomise(model)
    trained = {name: p.clone() for name, p in danon_parameters(model).items()}
    attach(model)
    attach(model, "ucsa", **SMALL["ucsa"])
    assert all(torch.equal(model.get_parameter(name), p) for name, p in trained.items())
    attach(model, selected_blocks=3)
    assert model.config.danon == {"selected_blocks": 3}
    assert torch.equal(
        greedy(model, tokens()), greedy(build("llama", "ucsa", {"selected_blocks": 3}), tokens())
    )
    model.set_attn_implementation("sdpa")
    assert torch.equal(output(model, tokens()), output(build("llama"), tokens()))
    assert greedy(model, tokens()).shape == (2, 12)


def test_parameters_do_not_depend_on_heads_or_direction() -> None:
    own = LayerAttention("dala", {}, width=8)
    before = list(own.parameters())
    for heads, groups, causal in ((4, 2, True), (6, 1, False)):
        q, k = torch.randn(1, heads, 5, 8), torch.randn(1, groups, 5, 8)
        attention = own.fit(q, k, causal)
        direct = type(attention)(attention.config)
        direct.load_state_dict(attention.state_dict())
        assert torch.equal(attention(q, k, k), direct(q, k, k))
    assert all(a is b for a, b in zip(own.parameters(), before, strict=True))
