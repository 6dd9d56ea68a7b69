"""Linear layers in fewer bits, each as a plan says; the arithmetic is torchao's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KINDS", "model_bytes", "quantize", "quantize_dynamic"]

KINDS = ("float32", "bfloat16", "int8-dynamic", "int8-weight-only")
"""Kinds of linear layers: as they are, narrow, or in eight bits.

``int8-dynamic`` multiplies in eight bits, activations scaled by token as they come;
``int8-weight-only`` keeps weights in eight bits and multiplies in the model's own type.
"""
_M = TypeVar("_M", bound=nn.Module)


def quantize(model: _M, plan: Mapping[str, str]) -> _M:
    """Copy a float32 model for inference, with linear layers as a plan says.

    Args:
        model: any; only its ``nn.Linear`` layers change.
        plan: from the name of a part, as ``named_modules`` has it, to one of :data:`KINDS`. Where
            parts contain each other the inner one decides; ``""`` is the whole model.

    Raises:
        ValueError: an unknown kind, a part that the model does not have or that has no linear
            layer, or a linear layer that is not float32.
        ImportError: torchao is not installed; names the extra.
    """
    made = copy.deepcopy(model)
    linear = {name: m for name, m in made.named_modules() if isinstance(m, nn.Linear)}
    for part, kind in plan.items():
        if kind not in KINDS:
            raise ValueError(f"{part!r}: {kind!r}: must be one of {', '.join(KINDS)}")
        if not any(_inside(name, part) for name in linear):
            raise ValueError(
                f"the model has no linear layer in {part!r}; it has {_first_names(linear)}"
            )
    for name, layer in linear.items():
        parts = [part for part in plan if _inside(name, part)]
        kind = plan[max(parts, key=len)] if parts else KINDS[0]
        if kind == KINDS[0]:
            continue
        if layer.weight.dtype != torch.float32:
            raise ValueError(f"{name} is {layer.weight.dtype}: must be torch.float32")
        if kind == "bfloat16":
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, _Narrow(layer))
        else:
            _to_int8(layer, kind)
    return made


def quantize_dynamic(model: _M) -> _M:
    """Copy a model with every linear layer ``int8-dynamic``.

    Args:
        model: any float32 model.

    Raises:
        ValueError: no linear layer, or one that is not float32.
        ImportError: torchao is not installed; names the extra.
    """
    return quantize(model, {"": "int8-dynamic"})


def model_bytes(model: nn.Module) -> int:
    """Sum the bytes of a model's parameters and buffers as stored, shared ones once.

    Args:
        model: any.
    """
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _stored(tensor.detach()):
            sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(sizes.values())


class _Narrow(nn.Linear):
    """A linear layer that multiplies in bfloat16, and takes and gives what the others do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        self.weight = nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class _EightBits(nn.Linear):
    """A linear layer with torchao's eight-bit weights, which may get no tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # torchao finds no scale for activations that are not there
            return x.new_empty(*x.shape[:-1], self.out_features)
        return super().forward(x)


def _to_int8(layer: nn.Linear, kind: str) -> None:
    """Quantize a layer in place."""
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise ImportError(f"{kind} needs torchao: pip install 'danon[quantization]'") from error
    weight_only = kind == "int8-weight-only"
    config = ao.Int8WeightOnlyConfig if weight_only else ao.Int8DynamicActivationInt8WeightConfig
    ao.quantize_(layer, config())
    if type(layer) is nn.Linear:  # a subclass has a forward of its own
        layer.__class__ = _EightBits


def _stored(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))


def _inside(name: str, part: str) -> bool:
    """Return True if a module is a part of the model, or inside it."""
    return not part or name == part or name.startswith(f"{part}.")


def _first_names(names: Mapping[str, object]) -> str:
    """Return the first eight names in words."""
    words = list(names)
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "") if words else "none"
