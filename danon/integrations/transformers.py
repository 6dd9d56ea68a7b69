"""MSRA, DALA and UCSA as attention implementations of Hugging Face models.

Example:
    >>> import torch
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from danon.integrations.transformers import attach, register
    >>> register()
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="danon_ucsa")
    >>> prompt = torch.arange(3, 23)[None]  # (1, 20)
    >>> model.generate(prompt, max_new_tokens=4, min_new_tokens=4).shape
    torch.Size([1, 24])
    >>> attach(model, "ucsa", selected_blocks=2)  # other settings

Every attention layer gets parameters of its own, under the name ``danon``: they are trained, moved,
saved and loaded with the model. Settings of a mechanism are the dictionary ``config.danon``, which
is saved with the model, or the arguments of :func:`attach`. Untrained, MSRA and UCSA are defined by
their settings alone. DALA's importance network and state start at random values, the same each
time.

A model of which any attention layer would not be replaced is refused when it is built, switched
over or first called: ``register`` wraps the three in ``PreTrainedModel``. To serve a part of a
model, name it: ``attn_implementation={"text_config": "danon_ucsa"}``.

With a cache, each layer keeps the mechanism's stream state instead of keys and values. An empty
``DynamicCache``, which is what ``generate`` makes, becomes such a cache at the first tokens.
Padding is no part of a sequence: the result of a row does not depend on the other rows.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache, EncoderDecoderCache
except ImportError as error:
    raise ImportError(
        "danon.integrations.transformers needs transformers 5: pip install danon[transformers] "
        f"({error})"
    ) from error

from danon.attention.streaming import StreamingAttention
from danon.config import ConfigError
from danon.integrations.hf_cache import StreamLayer, cache_layer_of, claim
from danon.integrations.hf_guard import PREFIX, count_served, dispatches, guard_models, requested
from danon.integrations.hf_layer import MECHANISMS, LayerAttention, head_width, settings_config
from danon.integrations.hf_mask import MaskDescription, describe_mask

__all__ = ["StreamLayer", "attach", "register"]

CHILD = "danon"
_CROSS_ATTENTION = ("encoder_hidden_states", "key_value_states")
"""Arguments of a layer whose keys come from another sequence."""
_UNSERVED = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window (sliding_window = None in the model's configuration lifts "
    "it)",
    "indices": "keys chosen by the model",
    "block_indices": "keys chosen by the model",
    "cu_seq_lens_q": "packed sequences",
    "cu_seqlens": "packed sequences",
    "cache": "a paged cache",
}
"""Arguments of an attention function that ask for another attention, and what they ask for."""


@functools.cache
def register() -> None:
    """Register ``attn_implementation="danon_msra" | "danon_dala" | "danon_ucsa"``.

    Models built with one of them afterwards have their DANON parameters from the start. For a model
    that is switched over later (``set_attn_implementation``), call :func:`attach`. Calling it again
    changes nothing.
    """
    for mechanism in MECHANISMS:
        AttentionInterface.register(PREFIX + mechanism, functools.partial(_attend, mechanism))
        AttentionMaskInterface.register(PREFIX + mechanism, describe_mask)
    register_module_module_registration_hook(_on_registration)
    guard_models()


def attach(model: PreTrainedModel, mechanism: str | None = None, **settings: Any) -> None:
    """Give the attention layers of a model their DANON parameters, and set mechanism and settings.

    Layers that have parameters for the same mechanism and settings keep them; others get new ones.

    Args:
        model: model whose attention goes through ``transformers.AttentionInterface``.
        mechanism: ``msra``, ``dala`` or ``ucsa``, to which the model is switched; None keeps its
            mechanism.
        settings: fields of the mechanism's configuration, such as ``selected_blocks``. With a
            mechanism or any setting, they replace ``config.danon``.

    Raises:
        ConfigError: a setting that does not exist or is not allowed; the model is left as it was.
        ValueError: the model has no attention layer that could be served, or one that could not.
    """
    register()
    if mechanism is not None:
        settings_config(mechanism, settings, 64)  # errors before anything is changed
        model.set_attn_implementation(PREFIX + mechanism)
    layers: list[Any] = [layer for layer in model.modules() if _mechanism(layer) is not None]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention layer with one of "
            f"{', '.join(PREFIX + name for name in MECHANISMS)}"
        )
    count_served(model, PREFIX + str(_mechanism(layers[0])))
    chosen = None if mechanism is None and not settings else settings
    made: list[Any] = [_make(layer, chosen) for layer in layers]
    for layer, attention in zip(layers, made, strict=True):
        like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        if chosen is not None:
            layer.config.danon = dict(chosen)
        _equip(layer, attention.to(device=like.device, dtype=like.dtype))


def _mechanism(layer: nn.Module) -> str | None:
    """Return the mechanism of an attention layer; None for any other module."""
    name = requested(layer)
    return name.removeprefix(PREFIX) if name is not None and dispatches(type(layer)) else None


def _make(layer: nn.Module, settings: Mapping[str, Any] | None) -> LayerAttention:
    """Return the DANON attention of a layer, a new one if mechanism or settings have changed."""
    mechanism, config = _mechanism(layer), layer.config
    assert mechanism is not None
    if settings is None:
        settings = getattr(config, "danon", None) or {}
    old = getattr(layer, CHILD, None)
    if isinstance(old, LayerAttention) and (old.mechanism, old.settings) == (mechanism, settings):
        return old
    seed = getattr(layer, "layer_idx", None) or 0
    try:
        return LayerAttention(mechanism, settings, head_width(layer), seed)
    except ConfigError as error:
        raise ConfigError(f"config.danon = {settings}: {error}") from error


def _equip(layer: nn.Module, attention: LayerAttention) -> None:
    """Make a DANON attention the child of a layer, and watch the layer's calls."""
    if not hasattr(layer, CHILD):
        layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        layer.register_forward_hook(_after_layer)
    setattr(layer, CHILD, attention.train(layer.training))


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Equip an attention layer; torch calls it for every module that becomes part of another."""
    if child is None:
        return
    if not hasattr(child, CHILD) and _mechanism(child) is not None:
        _equip(child, _make(child, None))
    if isinstance(parent, PreTrainedModel) and (name_of_parent := requested(parent)) is not None:
        # Early: before weights are loaded into a model that cannot be served.
        count_served(child, name_of_parent, owner=type(parent).__name__)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _before_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Claim the cache and refuse cross attention: the attention function is given neither."""
    if _mechanism(layer) is None:
        return
    layer.danon.attended = False
    given = {**dict(zip(_parameters(type(layer).forward), args, strict=False)), **kwargs}
    if any(given.get(name) is not None for name in _CROSS_ATTENTION):
        raise ValueError(f"{type(layer).__name__}: danon attention is no cross attention")
    for value in given.values():
        if isinstance(value, Cache):
            cache = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
            claim(cache, layer.layer_idx)


def _after_layer(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    """Refuse a layer that did not call the attention function."""
    if not layer.danon.attended and _mechanism(layer) is not None:
        raise ValueError(
            f"{type(layer).__name__} did not call {requested(layer)} but computed its attention "
            "itself: the model cannot be served as it is configured"
        )


def _attend(
    mechanism: str,
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend; the attention function that models call.

    Args:
        mechanism: a name of :data:`MECHANISMS`.
        layer: the model's attention layer.
        query: (B, H, n, D).
        key: (B, G, n, D).
        value: (B, G, n, D).
        attention_mask: of :func:`describe_mask`; None if all tokens are real.
        dropout: must be 0.
        scaling: factor of the logits; None for D ** -0.5.
        more: other arguments of a model, such as ``is_causal``.

    Returns:
        (B, n, H, D), and None for the attention weights.

    Raises:
        ValueError: an attention that cannot be served; says why.
    """
    stream = cache_layer_of(key)
    query, key, value = _as_autocast(query, key, value)
    try:
        holder = _checked_child(mechanism, layer, query, key, value, {"dropout": dropout, **more})
        causal, padding = _visible(layer, query, attention_mask, more.get("is_causal"))
        attention = holder.fit(query, key, causal)
    except ValueError as error:
        raise ValueError(f"{type(layer).__name__}: {error}") from error
    holder.attended = True
    D = query.shape[-1]
    if scaling is not None and not math.isclose(scaling, D**-0.5):
        query = query * (scaling * D**0.5)
    learns = torch.is_grad_enabled() and any(
        x.requires_grad for x in (query, key, value, *holder.parameters())
    )
    if stream is not None and not learns:
        cached = attention_mask.cached if isinstance(attention_mask, MaskDescription) else None
        out = stream.step(attention, query, key, value, padding, cached)
    else:
        if stream is not None:
            stream.skip(query.shape[2])
        out = _attend_in_rows(attention, query, key, value, padding)
    return out.transpose(1, 2).contiguous(), None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype in which scaled_dot_product_attention would run them here.

    Models give keys and queries that rotary embedding left in float32, and values of a linear layer
    that autocast ran in its own dtype.
    """
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _visible(
    layer: nn.Module, query: Tensor, mask: Any, is_causal: bool | None
) -> tuple[bool, Tensor | None]:
    """Return True if later tokens are hidden, and the real tokens (B, n), None for all.

    As in scaled_dot_product_attention, a mask decides before the layer does.

    Raises:
        ValueError: a pattern that is not causal or bidirectional with padding.
    """
    if mask is None:
        return bool(getattr(layer, "is_causal", True) if is_causal is None else is_causal), None
    if not isinstance(mask, MaskDescription):
        raise ValueError(
            f"attention mask of shape {tuple(mask.shape)}: must be padding, (batch, tokens), given "
            "to the model"
        )
    if mask.unserved:
        raise ValueError(
            f"the model masks with {mask.unserved}: danon attention knows causal and bidirectional "
            "attention, with padding"
        )
    if is_causal is not None and bool(is_causal) != mask.causal:
        raise ValueError(f"is_causal = {is_causal}: must be {mask.causal} like the model's mask")
    if mask.padding is None:
        return mask.causal, None
    if mask.padding.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"padding has shape {tuple(mask.padding.shape)}: must be "
            f"{(query.shape[0], query.shape[2])}, (batch, tokens)"
        )
    return mask.causal, mask.padding.to(query.device)


def _checked_child(
    mechanism: str,
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Mapping[str, Any],
) -> LayerAttention:
    """Return the DANON attention of a layer once it can serve a call.

    Raises:
        ValueError: it is missing, or cannot do what the options ask for.
    """
    child = getattr(layer, CHILD, None)
    if not isinstance(child, LayerAttention) or child.mechanism != mechanism:
        raise ValueError(
            f"no parameters for {PREFIX}{mechanism}: call "
            "danon.integrations.transformers.attach(model) after switching a model over"
        )
    for name, feature in _UNSERVED.items():
        if options.get(name) is not None:
            raise ValueError(f"danon attention cannot serve {feature}")
    if options.get("output_attentions"):
        raise ValueError("danon attention returns no attention weights: output_attentions=False")
    if options["dropout"]:
        raise ValueError(
            f"attention dropout is {options['dropout']}: must be 0 in the model's configuration "
            "(danon_dala has a setting of its own, attention_dropout)"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries with {key.shape[2]} keys: danon attention is self-attention,"
            " with a DynamicCache or none"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"values have shape {tuple(value.shape)}: must be {tuple(key.shape)} like the keys, "
            "for danon attention"
        )
    return child


def _attend_in_rows(
    attention: StreamingAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Attend in each row among its real tokens only; return zeros for the others."""
    if mask is None:
        out: Tensor = attention(q, k, v)
        return out
    real = mask.to(torch.bool)
    out = torch.zeros_like(q)
    for rows, count in _batches(real, attention.config.is_causal):
        order = (~real[rows]).int().argsort(dim=1, stable=True)[:, :count]  # real tokens first
        at = order[:, None, :, None]
        packed = [x[rows].gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v)]
        result = attention(*packed) * real[rows].gather(1, order)[:, None, :, None]
        whole = torch.zeros_like(q[rows]).scatter(2, at.expand_as(result), result)
        out = out.index_copy(0, rows, whole)
    return out


def _batches(real: Tensor, causal: bool) -> Iterator[tuple[Tensor, int]]:
    """Yield rows that can go in one call, and the most tokens of a row.

    Rows of unequal length can share a call of causal attention only, which hides later padding.
    """
    counts = real.sum(1)
    if causal:
        yield torch.arange(len(real), device=real.device), max(1, int(counts.max()))
        return
    for count in counts.unique().tolist():
        if count:
            yield (counts == count).nonzero().flatten(), count
