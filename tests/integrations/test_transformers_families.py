"""Families of decoders in transformers are served rightly or refused by name, in every way in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from hf_families import FAMILIES, VOCAB, NoTinyModelError, tiny_model  # noqa: E402
from hf_models import CONFIGS, EXACT, SMALL, build, danon_parameters  # noqa: E402
from hf_models import tokens as llama_tokens  # noqa: E402

from danon.integrations.hf_layer import LayerAttention  # noqa: E402
from danon.integrations.hf_mask import MaskUseError, describe_mask  # noqa: E402
from danon.integrations.transformers import attach, register  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

register()

NOT_REPLACED = r"danon_ucsa would not replace {}.* since they do not dispatch through"
NOTHING_TO_REPLACE = "has no attention layer that danon_ucsa could replace"
SERVED = ["gemma", "gpt2", "gpt_neox", "jamba", "llama", "mistral", "phi", "qwen2", "qwen2_moe"]
REFUSED = {
    "bloom": NOT_REPLACED.format("BloomAttention"),
    "doge": "doge computes with the attention mask itself",
    "falcon": NOT_REPLACED.format("FalconAttention"),
    "git": NOT_REPLACED.format("GitSelfAttention"),
    "gptj": NOT_REPLACED.format("GPTJAttention"),
    "gemma2": "Gemma2Attention: danon attention cannot serve soft-capped logits",
    "mamba": "MambaForCausalLM " + NOTHING_TO_REPLACE,
    "minimax": NOT_REPLACED.format("MiniMaxLightningAttention"),
    "mpt": NOT_REPLACED.format("MptAttention"),
    "xglm": NOT_REPLACED.format("XGLMAttention"),
    "xlnet": NOT_REPLACED.format("XLNetRelativeAttention"),
}


def tokens() -> tuple[Tensor, Tensor]:
    """Two rows of tokens, and the same with another last token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 48), generator=generator)
    late = ids.clone()
    late[:, -1] = 3 + (late[:, -1] - 2) % (VOCAB - 3)
    return ids, late


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def reference(family: str) -> tuple[Any, Tensor]:
    """Return a model with the family's own attention, and its logits.

    Raises:
        NoTinyModelError: it cannot be built small, or does not run.
    """
    errors = []
    for implementation in ("sdpa", "eager"):
        try:
            model = tiny_model(family, implementation)
            return model, logits(model, tokens()[0])
        except Exception as error:  # noqa: BLE001 - whatever a family does without us
            errors.append(error)
    raise NoTinyModelError(f"{family}: {errors[0]}") from errors[0]


def check_family(family: str) -> str | None:
    """Check that a family is served rightly; the reason if it is refused.

    Raises:
        NoTinyModelError: there is no small model of it to be served.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that nobody uses like this
        own, want = reference(family)
        ids, late = tokens()
        try:
            whole = tiny_model(family, "danon_ucsa", EXACT["ucsa"])
            model = tiny_model(family, "danon_ucsa", SMALL["ucsa"])
            exact, small, changed = logits(whole, ids), logits(model, ids), logits(model, late)
        except ValueError as error:
            if "danon" not in str(error):
                raise
            return str(error)
        largest = float(want.abs().max())
        assert float((exact - want).abs().max()) <= 1e-3 * largest
        assert float((small - changed)[:, :-1].abs().max()) <= 1e-5 * largest
        assert float((small - changed)[:, -1].abs().max()) > 0
        assert any(part.attended for part in model.modules() if isinstance(part, LayerAttention))
        check_step(whole, own, 1e-3 * largest)
    return None


def step(model: Any) -> Tensor:
    """Logits of the last token, read after a cache of the others."""
    ids = tokens()[0]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    result: Tensor = out.logits[:, -1]
    return result


def check_step(model: Any, own: Any, tolerance: float) -> None:
    """Check that a step with a cache gives the logits of a model's own attention, or is refused.

    Some families disagree with themselves about a step, by more than any tolerance.
    """
    try:
        got = step(model)
    except ValueError as error:
        if "cache" not in str(error).lower():
            raise
    else:
        assert float((got - step(own)).abs().max()) <= tolerance


@pytest.mark.parametrize("family", SERVED)
def test_family_is_served(family: str) -> None:
    assert check_family(family) is None


@pytest.mark.parametrize("family", REFUSED)
def test_family_is_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family]):
        raise ValueError(check_family(family))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_family_is_served_or_refused() -> None:
    served, refused, failed = [], {}, {}
    for family in FAMILIES:
        try:
            reason = check_family(family)
        except NoTinyModelError:
            continue
        except Exception as error:  # noqa: BLE001 - all of them are reported together
            failed[family] = repr(error)
        else:
            if reason is None:
                served.append(family)
            else:
                refused[family] = reason
    print(f"{len(served)} served: {', '.join(served)}", *refused.items(), sep="\n")
    assert not failed, "\n".join(f"{family}: {error}" for family, error in failed.items())
    assert len(served) >= 80 and len(served) + len(refused) >= 160


def test_from_pretrained_refuses_before_weights_are_read(tmp_path: Any) -> None:
    tiny_model("bloom", "eager").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match=REFUSED["bloom"]):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="danon_ucsa"
        )


WAYS: dict[str, Callable[[Any], None]] = {
    "name": lambda model: model.set_attn_implementation("danon_ucsa"),
    "dictionary": lambda model: model.set_attn_implementation({"": "danon_ucsa"}),
    "attach": lambda model: attach(model, "ucsa"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bloom", "falcon", "git", "minimax", "xglm", "xlnet"])
def test_switching_over_is_refused_and_changes_nothing(family: str, way: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, (ids, _) = tiny_model(family, "eager"), tokens()
        want = logits(model, ids)
        names = [part.config._attn_implementation for part in parts(model)]
        with pytest.raises(ValueError, match=r"would not replace|could be switched"):
            WAYS[way](model)
        assert [part.config._attn_implementation for part in parts(model)] == names
        assert torch.equal(logits(model, ids), want) and not danon_parameters(model)


def parts(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]


@pytest.mark.parametrize("family", ["bloom", "mamba", "xlnet"])
def test_live_model_switched_by_its_configuration_is_refused(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, (ids, _) = tiny_model(family, "eager"), tokens()
        logits(model, ids)
        model.config._attn_implementation = "danon_ucsa"
        for part in (model, model.base_model):
            with pytest.raises(ValueError, match=r"would not replace|no attention layer"):
                part(input_ids=ids)
        model.config._attn_implementation = "eager"
        logits(model, ids)


def test_encoders_without_the_interface_are_refused() -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
    }
    for config, name in (
        (transformers.DebertaV2Config(**small), "DisentangledSelfAttention"),
        (transformers.LongformerConfig(**small), "LongformerSelfAttention"),
    ):
        with pytest.raises(ValueError, match=NOT_REPLACED.format(f".*{name}")):
            transformers.AutoModel.from_config(config, attn_implementation="danon_ucsa")


def test_part_of_a_model_can_be_switched_over() -> None:
    config = transformers.LlavaConfig(
        text_config=CONFIGS["llama"](),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
        ),
        image_token_index=1,
    )
    auto = transformers.AutoModelForImageTextToText
    built = auto.from_config(config, attn_implementation={"text_config": "danon_ucsa"}).eval()
    switched = auto.from_config(config).eval()
    switched.load_state_dict(built.state_dict(), strict=False)
    switched.set_attn_implementation({"text_config": "danon_ucsa"})
    attach(switched)
    switched.load_state_dict(built.state_dict())
    for model in (built, switched):
        assert model.config.text_config._attn_implementation == "danon_ucsa"
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert all("language_model" in name for name in danon_parameters(model))
    assert torch.equal(logits(built, llama_tokens()), logits(switched, llama_tokens()))


def test_layer_that_skips_the_attention_function_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama", "ucsa")
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(ValueError, match="LlamaAttention did not call danon_ucsa but computed"):
        logits(model, llama_tokens())


def test_mask_refuses_other_uses() -> None:
    mask = describe_mask(2, 5, 5, config=CONFIGS["llama"]())
    scores = torch.zeros(2, 4, 5, 5)
    for use in (
        lambda: scores + mask,
        lambda: mask[:, :, :, :5],
        lambda: scores.masked_fill(mask, -torch.inf),
        lambda: torch.where(mask, scores, 0),
        lambda: mask.to(torch.float32),
        lambda: nn.functional.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
    ):
        with pytest.raises(MaskUseError, match="llama computes with the attention mask itself"):
            use()
    assert not hasattr(mask, "to")


def test_window_mask_that_no_layer_uses_is_no_error() -> None:
    """Models that can have windows build both masks, whichever their layers are given."""
    assert check_family("qwen2_moe") is None
    config = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="danon_ucsa"
    ).eval()
    with pytest.raises(ValueError, match="Qwen2Attention: danon attention cannot serve a sliding"):
        logits(model, tokens()[0])
