"""Refuse Hugging Face models whose attention would not be replaced, however they are made.

Models whose layers do not dispatch through ``transformers.AttentionInterface`` silently accept any
name of an implementation. So the constructor, ``set_attn_implementation`` and the call of every
model are wrapped. The first two refuse early; the last refuses a model that was switched over by
its configuration.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from danon.integrations.hf_layer import LayerAttention

__all__ = ["PREFIX", "check_model", "count_served", "dispatches", "guard_models", "requested"]

PREFIX = "danon_"
_CHECKED = "_danon_checked"
# Classes that end in Layer hold what attends in a class of its own, or adapt something else.
_ATTENTION = re.compile(r"(attention|attn)(?!.*layer$)", re.IGNORECASE)


def requested(module: nn.Module) -> str | None:
    """Return the DANON implementation that a module's configuration names; None for any other."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name if isinstance(name, str) and name.startswith(PREFIX) else None


def dispatches(layer_class: type[nn.Module]) -> bool:
    """Return True if the forward of a layer class takes its attention from the interface."""
    return _looks_up(layer_class.forward)


@functools.cache
def _looks_up(forward: Callable[..., Any]) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def guard_models() -> None:
    """Wrap the constructor, ``set_attn_implementation`` and the call of all models."""
    construct: Any = PreTrainedModel.__init__
    switch: Any = PreTrainedModel.set_attn_implementation

    @functools.wraps(construct)
    def guarded_construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name.startswith(PREFIX):
            _refuse_class(type(self), name)
        construct(self, config, *args, **kwargs)

    @functools.wraps(switch)
    def guarded_switch(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        switched = {name for name in _names(attn_implementation) if name.startswith(PREFIX)}
        before = [(config, config._attn_implementation) for config in _configs(self)]
        switch(self, attn_implementation, *args, **kwargs)
        if not switched:
            return
        try:
            _check_switched(self, switched, whole=isinstance(attn_implementation, str))
        except ValueError:
            for config, name in before:
                config._attn_implementation_internal = name
            raise

    def guarded_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = requested(self)
        if name is not None and self.__dict__.get(_CHECKED) != name:
            check_model(self)
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    model: Any = PreTrainedModel
    model.__init__ = guarded_construct
    model.set_attn_implementation = guarded_switch
    model.__call__ = guarded_call


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def check_model(model: PreTrainedModel) -> None:
    """Check a model that names a DANON implementation, and mark it as checked.

    Args:
        model: a whole model, or a part with a configuration of its own.

    Raises:
        ValueError: an attention layer computes its attention itself, or there is none.
    """
    name = requested(model)
    if name is None or count_served(model, name) == 0:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that {name or 'danon attention'} could "
            "replace: none dispatches through transformers.AttentionInterface"
        )
    for part in _models(model):
        if requested(part) == name:
            setattr(part, _CHECKED, name)


def count_served(
    module: nn.Module, name: str, *, owner: str | None = None, everywhere: bool = False
) -> int:
    """Count the attention layers in a module that dispatch through the interface.

    Args:
        module: a model or a part of one.
        name: implementation that the module is to have.
        owner: class that an error names; None for the module's own.
        everywhere: True includes parts whose configuration names another implementation.

    Raises:
        ValueError: an attention layer computes its attention itself.
    """
    served: list[str] = []
    unserved: list[str] = []
    _sort_layers(module, True, everywhere, served, unserved)
    if unserved:
        raise _refusal(owner or type(module).__name__, unserved, name)
    return len(served)


def _sort_layers(
    module: nn.Module, included: bool, everywhere: bool, served: list[str], unserved: list[str]
) -> bool:
    """Collect the classes of attention layers; True if the module is one or holds one."""
    if isinstance(module, LayerAttention):
        return False
    if isinstance(module, PreTrainedModel):
        included = everywhere or requested(module) is not None
    layer_class = type(module)
    if dispatches(layer_class):
        if included:
            served.append(layer_class.__name__)
        return True
    inside = [
        _sort_layers(child, included, everywhere, served, unserved) for child in module.children()
    ]
    if any(inside):
        return True
    if _ATTENTION.search(layer_class.__name__) is None:
        return False
    if included:
        unserved.append(layer_class.__name__)
    return True


def _refuse_class(model_class: type[PreTrainedModel], name: str) -> None:
    """Refuse a model of transformers before it is built, if its module's attention cannot dispatch.

    Some modules choose a class by the name of the implementation, from a table of their own, and
    would fail there with an obscure error.

    Raises:
        ValueError: no attention of the module dispatches, or none of such a table.
    """
    if not model_class.__module__.startswith("transformers"):
        return  # other classes beside a user's model say nothing about it
    members = vars(sys.modules[model_class.__module__]).values()
    defined = [x for x in members if inspect.isclass(x) and x.__module__ == model_class.__module__]
    tables = [list(x.values()) for x in members if isinstance(x, dict) and "eager" in x]
    for classes in (defined, *tables):
        layers = [x for x in classes if _is_attention(x)]
        if layers and not any(dispatches(layer) for layer in layers):
            raise _refusal(model_class.__name__, [layer.__name__ for layer in layers], name)


def _is_attention(candidate: Any) -> bool:
    return (
        inspect.isclass(candidate)
        and issubclass(candidate, nn.Module)
        and not issubclass(candidate, PreTrainedModel)
        and _ATTENTION.search(candidate.__name__) is not None
    )


def _check_switched(model: PreTrainedModel, names: set[str], *, whole: bool) -> None:
    """Check that a model was switched over: transformers only logs a warning where it fails.

    Raises:
        ValueError: a part of the model was not switched, or computes its attention itself.
    """
    for name in names:
        parts = [part for part in _models(model) if requested(part) == name]
        for part in [model] if whole else parts:
            count_served(part, name, everywhere=whole)
        if not parts:
            raise ValueError(f"{type(model).__name__}: no part of it could be switched to {name}")


def _refusal(owner: str, layers: list[str], name: str) -> ValueError:
    return ValueError(
        f"{name} would not replace {', '.join(dict.fromkeys(layers))} of {owner}, since they do not"
        " dispatch through transformers.AttentionInterface; where a model has several parts, name "
        f'the one to be served, as in attn_implementation={{"text_config": "{name}"}}'
    )


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not isinstance(part, LayerAttention):
            yield part


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return the configurations of a model and all its parts, each once."""
    configs: dict[int, Any] = {}
    waiting: list[Any] = [part.config for part in _models(model)]
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in configs:
            configs[id(config)] = config
            waiting += [getattr(config, name) for name in config.sub_configs]
    return list(configs.values())


def _names(attn_implementation: Any) -> Iterator[str]:
    """Yield the names in a string, or in a dictionary of them, which may be nested."""
    if isinstance(attn_implementation, str):
        yield attn_implementation
    elif isinstance(attn_implementation, Mapping):
        for value in attn_implementation.values():
            yield from _names(value)
