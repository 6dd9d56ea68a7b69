"""Models, calls, caches and settings that DANON attention refuses in Hugging Face models."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    CONFIGS,
    NO_END,
    SIZES,
    SMALL,
    VOCAB,
    N,
    build,
    danon_parameters,
    greedy,
    output,
    tokens,
)

from danon.config import ConfigError  # noqa: E402
from danon.integrations.hf_cache import claim  # noqa: E402
from danon.integrations.transformers import attach  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
