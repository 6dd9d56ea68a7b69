"""DANON attention inside Hugging Face models: prefill, generate, caches, parameters, refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from danon.config import ConfigError  # noqa: E402
from danon.integrations.hf_cache import claim  # noqa: E402
from danon.integrations.hf_layer import LayerAttention  # noqa: E402
from danon.integrations.transformers import StreamLayer, attach, register  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

register()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N, VOCAB = 60, 90
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
NO_END = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **NO_END, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **NO_END, num_key_value_heads=1),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, **NO_END),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        initializer_range=0.3,
        **NO_END,
        attn_pdrop=0.0,
    ),
    "bert": lambda: transformers.BertConfig(**SIZES, attention_probs_dropout_prob=0.0),
}
DECODERS = [name for name in CONFIGS if name != "bert"]
SMALL = {
    "msra": {"window": 8, "global_tokens": 4},
    "dala": {
        "block_size": 4,
        "state_update_frequency": 2,
        "memory_size": 6,
        "global_tokens": 4,
        "window_max": 8,
    },
    "ucsa": {
        "local_window_size": 8,
        "query_block": 8,
        "leaf_max": 4,
        "global_tokens": 4,
        "candidate_blocks": 8,
        "selected_blocks": 2,
    },
}
EXACT = {
    "msra": {"window": 64},
    "dala": {"block_size": 64, "decay_rate": 0.0, "window": 1_000_000},
    "ucsa": {
        "local_window_size": 8,
        "query_block": 8,
        "leaf_max": 4,
        "global_tokens": 4,
        "candidate_blocks": 64,
        "selected_blocks": 64,
    },
}
MECHANISMS = list(SMALL)


def build(name: str, mechanism: str | None = None, settings: dict[str, Any] | None = None) -> Any:
    """A tiny random model, the same weights for every attention."""
    config = CONFIGS[name]()
    if settings is not None:
        config.danon = settings
    torch.manual_seed(0)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    implementation = "sdpa" if mechanism is None else f"danon_{mechanism}"
    return auto.from_config(config, attn_implementation=implementation).eval()


def tokens(batch: int = 2, length: int = N, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def padded(left: int, batch: int = 2, length: int = N) -> tuple[Tensor, Tensor]:
    """Tokens and a mask that hides the first ``left`` tokens of the last row."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[-1, :left], mask[-1, :left] = 0, 0
    return ids, mask


def output(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out = model(ids, **kwargs)
    result: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result


def greedy(model: Any, ids: Tensor, count: int = 12, **kwargs: Any) -> Tensor:
    """The new tokens that generate adds."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    out: Tensor = model.generate(ids, max_new_tokens=count, do_sample=False, **kwargs)
    return out[:, ids.shape[1] :]


def danon_parameters(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".danon." in name}


def randomise(model: Any) -> None:
    """Parameters as training could leave them: those that start at zero start to matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in danon_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


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


def test_wrong_settings_are_errors_and_change_nothing() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match=r"'selekted_blocks'.*fields are.*selected_blocks"):
        attach(model, "ucsa", selekted_blocks=3)
    with pytest.raises(ConfigError, match="num_heads: the model decides"):
        attach(model, "ucsa", num_heads=3)
    with pytest.raises(ConfigError, match="'longformer': must be one of msra, dala, ucsa"):
        attach(model, "longformer")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention layer with one of"):
        attach(model)
    assert model.config._attn_implementation == "sdpa" and not danon_parameters(model)
    with pytest.raises(ConfigError, match=r"config.danon = .*window = 1: must be divisible"):
        build("llama", "msra", {"window": 1})


def mistral(**more: Any) -> Any:
    return transformers.MistralConfig(**SIZES, **NO_END, num_key_value_heads=2, **more)


REFUSED: dict[str, tuple[Any, str]] = {
    "sliding window": (lambda: mistral(sliding_window=16), "without sliding windows"),
    "some windows": (
        lambda: transformers.ModernBertConfig(**SIZES, **NO_END, cls_token_id=1, sep_token_id=2),
        "ModernBertAttention: danon attention cannot serve a sliding window",
    ),
    "narrow values": (
        lambda: transformers.DeepseekV3Config(
            **SIZES,
            **NO_END,
            num_key_value_heads=4,
            first_k_dense_replace=2,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        r"values have shape \(2, 4, 60, 8\): must be \(2, 4, 60, 16\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unservable_models_are_refused(what: str) -> None:
    config, message = REFUSED[what]
    encoder = what == "some windows"
    auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config(), attn_implementation="danon_ucsa").eval()
    with pytest.raises(ValueError, match=message):
        output(model, tokens())


def test_cross_attention_is_refused() -> None:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_ffn_dim=32,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation="danon_ucsa"
    ).eval()
    with pytest.raises(ValueError, match="BartAttention: danon attention is no cross attention"):
        output(model, tokens(), decoder_input_ids=tokens())


def test_unservable_calls_are_refused() -> None:
    model, ids = build("llama", "msra", SMALL["msra"]), tokens()
    packed = torch.arange(N // 2).repeat(2)[None]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": torch.ones(2, 1, N, N)}, r"shape \(2, 1, 60, 60\): must be padding"),
        ({"attention_mask": torch.ones(2, N - 1)}, r"shape \(2, 59\): must be \(2, 60\)"),
        ({"position_ids": packed, "use_cache": False}, "packs several sequences"),
        ({"cu_seq_lens_q": torch.tensor([0, 30, 60])}, "packed sequences"),
        ({"softcap": 30.0}, "cannot serve soft-capped logits"),
        ({"s_aux": torch.zeros(4)}, "cannot serve learned attention sinks"),
        ({"sliding_window": 16}, "cannot serve a sliding window"),
        ({"output_attentions": True}, "no attention weights"),
        ({"is_causal": False}, "not causal: a stream cannot see later tokens"),
    ]
    for kwargs, message in refused:
        with pytest.raises(ValueError, match=message):
            output(model, ids, **kwargs)
    config = CONFIGS["llama"]()
    config.attention_dropout = 0.1
    dropping = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="danon_msra"
    )
    assert output(dropping.eval(), ids).isfinite().all()
    with pytest.raises(ValueError, match=r"attention dropout is 0.1: must be 0"):
        dropping.train()(ids)


def test_unservable_caches_are_refused() -> None:
    model, ids = build("llama", "msra", SMALL["msra"]), tokens()
    with pytest.raises(ValueError, match=r"for 71 keys: must be 60.*no static cache"):
        greedy(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="cannot go back"):
        greedy(model, ids[:1], prompt_lookup_num_tokens=2)
    cache = transformers.DynamicCache()
    output(build("llama"), ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 60 keys of another attention"):
        output(model, ids[:, :1], past_key_values=cache)
    cache = transformers.DynamicCache()
    output(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="q has batch 1: must be 2 like the state"):
        output(model, ids[:1, :1], past_key_values=cache)
    assert cache.get_seq_length() == N  # a failed step leaves the state as it was
    want = output(model, torch.cat((ids, ids[:, :1]), 1))[:, -1:]
    got = output(model, ids[:, :1], past_key_values=cache)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_step_that_failed_between_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", "msra", SMALL["msra"]), tokens()
    cache = transformers.DynamicCache()
    output(model, ids[:, :-1], past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
        patch.setattr(model.model.layers[0].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output(model, ids[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"have read 61 and 60 tokens.*begin a new cache"):
        output(model, ids[:, -1:], past_key_values=cache)


def test_changed_keys_after_caching_are_refused() -> None:
    cache = transformers.DynamicCache()
    claim(cache, 0)
    keys, values = cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    claim(cache, 0)
    with pytest.raises(ValueError, match="never reached danon attention"):
        cache.update(keys, values, 0)


def test_missing_transformers_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import danon, danon.models, danon.integrations\n"
        "import danon.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install danon[transformers]" in done.stderr
