"""Tiny random configurations of the families of decoders that transformers has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["FAMILIES", "VOCAB", "NoTinyModelError", "tiny_config", "tiny_model"]

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 90
MOST_PARAMETERS = 7_000_000
FIRST_TOKEN = 3  # of those without a meaning

_SIZES: Mapping[str, Any] = {
    name: value
    for value, names in {
        VOCAB: "vocab_size vocab_size_per_layer_input",
        32: "hidden_size d_model n_embd embedding_size emb_dim word_embed_proj_dim lru_width",
        48: "intermediate_size ffn_dim ffn_hidden_size d_ff d_inner dff decoder_ffn_dim "
        "encoder_ffn_dim",
        2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers "
        "num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads "
        "num_experts_per_tok moe_k max_window_layers linear_num_key_heads index_n_heads "
        "n_mamba_heads",
        4: "num_attention_heads num_heads n_head n_heads decoder_attention_heads "
        "encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "mamba_n_heads mamba_num_heads linear_num_value_heads time_step_rank",
        8: "head_dim d_head d_kv kv_channels rotary_dim kv_lora_rank q_lora_rank qk_rope_head_dim "
        "qk_nope_head_dim v_head_dim global_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim hidden_size_per_layer_input mamba_d_state ssm_state_size "
        "state_size",
        16: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head mamba_head_dim "
        "moe_shared_expert_intermediate_size sliding_window",
        64: "mamba_d_ssm",
        256: "max_position_embeddings n_positions",
        1: "bos_token_id mamba_n_groups n_groups n_group topk_group first_k_dense_replace "
        "n_shared_experts moe_layer_start_index",
    }.items()
    for name in names.split()
} | {
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_pdrop": 0.0,
}

_MLA = {"num_key_value_heads": 4}  # one for each head: they share a latent vector, not heads
_PARTICULAR: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
            "bailing_hybrid",
            "kimi_linear",
        ),
        _MLA,
    ),
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v4": {"sliding_window": 16},
    "falcon": {"alibi": False},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "laguna": {"sliding_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


class NoTinyModelError(Exception):
    """A family that cannot be made small, or does not run, without any attention of ours."""


def tiny_config(family: str) -> Any:
    """Return the smallest configuration that has each kind of layer of the family once."""
    return _tiny(CONFIG_MAPPING[family], _PARTICULAR.get(family, {}))


def _tiny(kind: Any, particular: Mapping[str, Any]) -> Any:
    default = kind()
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(default))
    known |= set(kind.attribute_map)
    given = {name: x for name, x in _SIZES.items() if name in known}
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(default, name, None)
        chosen = getattr(kind, kind.attribute_map.get(name, name), None)
        if isinstance(kinds, list) and not isinstance(chosen, property):
            given[name] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
            given["num_hidden_layers"] = len(given[name])
    kinds = vars(default).get("layer_types") or ()
    if "sliding_window" in given and not any("sliding" in one for one in kinds):
        given["sliding_window"] = None
    for name in kind.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            given[name] = _tiny(type(part), {})
    for name, x in given.items():
        if type(vars(default).get(name)) is int and isinstance(x, float):
            given[name] = int(x)
    return kind(**{**given, **particular})


def tiny_model(family: str, implementation: str, settings: Mapping[str, Any] | None = None) -> Any:
    """Build a random model of the family, with the same weights for every implementation.

    Args:
        family: model type in transformers.
        implementation: name of the attention in transformers.
        settings: ``danon`` settings of all its configurations.

    Raises:
        MemoryError: the model is too large.
    """
    config = tiny_config(family)
    if settings is not None:
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.danon = dict(settings)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    if (size := sum(p.numel() for p in skeleton.parameters())) > MOST_PARAMETERS:
        raise MemoryError(f"{family} has {size} parameters: must have at most {MOST_PARAMETERS}")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    ).eval()
