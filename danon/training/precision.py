"""Levels of precision, O0 to O3: which tensors of a training are narrow.

    precision = apply_level(model, "O2")
    optimizer = precision.optimizer(lambda: torch.optim.AdamW(model.parameters(), lr=1e-3))
    with precision.autocast("cuda"):
        loss = model(batch)

| level | weights | computation | optimizer | norms |
| --- | --- | --- | --- | --- |
| O0 | float32 | float32 | float32 | float32 |
| O1 | float32 | autocast: products narrow, sums float32 | float32 | float32 |
| O2 | narrow | narrow | float32 copies of the weights | float32 |
| O3 | narrow | narrow | narrow | narrow |

The names are those of NVIDIA's apex. Narrow is bfloat16, or float16 on a GPU without it. A float16
gradient below 6e-8 is zero: O1 and O2 multiply the loss by a scale that finds itself; O3 does not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only

from danon.training.master_weights import MasterWeights

__all__ = ["Level", "Precision", "apply_level", "enable_mixed_precision", "narrow_dtype", "norms"]

Level = Literal["O0", "O1", "O2", "O3"]
NARROW = (torch.bfloat16, torch.float16)
LEAST_EPS = 1e-4
"""Adam's eps in float16: squares of gradients below 2.4e-4 are zero."""


def narrow_dtype(device_type: str | None = None) -> torch.dtype:
    """Return bfloat16, or float16 on a CUDA GPU without it.

    Args:
        device_type: type of the device; None: the CUDA GPU if there is one, else the CPU.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


@dataclass(frozen=True)
class Precision:
    """A level that was applied to a model, and what it asks of the training around it.

    Attributes:
        level: O0 to O3.
        dtype: the narrow type.
        keeps_norms: True if layers of normalization stay in float32.
        wide_gradients: True if narrow weights have float32 gradients.
        sharded: True if FSDP makes the weights narrow, see :meth:`shard_policy`.
        originals: float32 weights before they were made narrow, until :meth:`optimizer` takes them.
    """

    level: Level
    dtype: torch.dtype
    keeps_norms: bool
    wide_gradients: bool
    sharded: bool
    originals: dict[nn.Parameter, Tensor]

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """Return a context for the forward pass and the loss.

        Args:
            device_type: type of the device of the model.
        """
        if self.level != "O1":
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.dtype)

    def scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """Return the scaler of the loss that float16 needs; None where it needs none.

        Args:
            device_type: type of the device of the model.

        Raises:
            ValueError: float16 gradients, which cannot be scaled back without loss.
        """
        if self.dtype != torch.float16 or self.level not in ("O1", "O2"):
            return None
        if self.level == "O2" and not self.wide_gradients:
            raise ValueError(
                "level = 'O2' in torch.float16 without wide gradients: must be torch.bfloat16, "
                "or level = 'O1'"
            )
        return torch.amp.GradScaler(device_type)

    def optimizer(
        self, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """Return the optimizer of the training: in O2 one that moves float32 copies.

        In O3 with float16, where Adam's ``eps`` of 1e-8 would be zero, it is 1e-4 or more.

        Args:
            make_optimizer: returns an optimizer over the parameters that the model has now.
        """
        made = make_optimizer()
        if self.level == "O3" and self.dtype == torch.float16:
            for group in made.param_groups:
                if "betas" in group:
                    group["eps"] = max(group["eps"], LEAST_EPS)
        if self.level != "O2" or self.sharded:  # shards are float32 themselves
            return made
        made = MasterWeights(made, self.originals)
        self.originals.clear()  # its copies are those of the optimizer now
        return made

    def shard_policy(self, norm: bool = False) -> MixedPrecisionPolicy:
        """Return the policy with which ``fully_shard`` computes in this level.

        In O2 a rank keeps float32 shards, gathers them narrow, and sums gradients in float32.

        Args:
            norm: for one of :func:`norms`, which in O2 has to be sharded on its own.
        """
        if self.level != "O2" or (norm and self.keeps_norms):
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)


def apply_level(
    model: nn.Module,
    level: Level,
    keep_batchnorm_fp32: bool | None = None,
    *,
    dtype: torch.dtype | None = None,
    wide_gradients: bool = True,
    sharded: bool = False,
) -> Precision:
    """Make the weights of a model as narrow as a level says, in place.

    With several ranks call it when their weights are equal and before the model is wrapped.

    Args:
        model: its parameters are float32 or wider.
        level: O0 to O3, see the module. Under O2 and O3 the model takes float32 inputs and returns
            float32 outputs all the same.
        keep_batchnorm_fp32: layers of normalization, those of batches and others, keep float32
            weights and compute in float32; None: as the level says, True in O2 and False in O3.
        dtype: bfloat16 or float16; None: :func:`narrow_dtype`.
        wide_gradients: narrow weights of O2 get float32 gradients, whose sums lose nothing.
            ``DistributedDataParallel`` cannot have them.
        sharded: the model will be sharded by FSDP with :meth:`Precision.shard_policy`. Its weights
            stay in float32 in O2.

    Returns:
        What the training has to do.

    Raises:
        ValueError: an unknown level, a type that is not narrow, a model that is narrow already, or
            ``keep_batchnorm_fp32=False`` in O0 and O1, which make no weight narrow.
    """
    if level not in get_args(Level):
        raise ValueError(f"level = {level!r}: must be one of {', '.join(get_args(Level))}")
    if dtype is not None and dtype not in NARROW:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, NARROW))}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype in NARROW:
            raise ValueError(f"{name} is {parameter.dtype}: must be torch.float32 or wider")
    narrows = level in ("O2", "O3")
    if keep_batchnorm_fp32 is False and not narrows:
        raise ValueError(
            f"keep_batchnorm_fp32 = False with level = {level!r}: must be True or None, all "
            "weights stay in float32"
        )
    keeps = level != "O3" if keep_batchnorm_fp32 is None else keep_batchnorm_fp32
    dtype = narrow_dtype() if dtype is None else dtype
    originals: dict[nn.Parameter, Tensor] = {}
    wide = level == "O2" and (wide_gradients or sharded)
    if narrows:
        kept = norms(model) if keeps else []
        _cast_buffers(model, dtype, kept)
        _cast_calls(model, dtype, kept)
        if not (sharded and level == "O2"):
            originals = _cast_weights(model, dtype, kept)
            if wide:
                for parameter in originals:
                    parameter.grad_dtype = torch.float32
        if level == "O3":
            originals = {}
    return Precision(level, dtype, keeps, wide, sharded, originals)


def norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers of normalization: torch's, and those whose class is called so.

    Args:
        model: any module.
    """
    own = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return [m for m in model.modules() if isinstance(m, own) or type(m).__name__.endswith("Norm")]


def enable_mixed_precision(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """Run the forward pass of a model under autocast; its weights stay as they are.

    A second call changes the type at most. float16 needs a ``torch.amp.GradScaler`` in training.

    Example::

        >>> import torch
        >>> from danon.utils import enable_mixed_precision
        >>> model = torch.nn.Linear(4, 2)
        >>> undo = enable_mixed_precision(model)
        >>> model(torch.zeros(1, 4)).dtype, model.weight.dtype
        (torch.bfloat16, torch.float32)
        >>> undo()
        >>> model(torch.zeros(1, 4)).dtype
        torch.float32

    Args:
        model: any module; parts of it may be called on their own, and then compute as before.
        dtype: bfloat16 or float16; None: :func:`narrow_dtype` of the model's device.

    Returns:
        A function that makes the model compute as before.

    Raises:
        ValueError: another type.
    """
    if dtype is not None and dtype not in NARROW:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, NARROW))}")
    current = model.__dict__.get("forward")
    own = current.own if isinstance(current, _UnderAutocast) else current
    model.forward = _UnderAutocast(model, own, dtype)

    def undo() -> None:
        if isinstance(model.__dict__.get("forward"), _UnderAutocast):
            del model.forward
            if own is not None:
                model.forward = own

    return undo


class _UnderAutocast:
    """The forward pass of a module, under autocast; a copy of the module gets one of its own."""

    def __init__(
        self, module: nn.Module, own: Callable[..., Any] | None, dtype: torch.dtype | None
    ) -> None:
        self.module, self.own, self.dtype = module, own, dtype

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward pass itself, whose signature others look at."""
        forward: Callable[..., Any] = (
            type(self.module).forward.__get__(self.module) if self.own is None else self.own
        )
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = (*self.module.parameters(), *(x for x in args if isinstance(x, Tensor)))
        kind = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(kind, self.dtype or narrow_dtype(kind)):
            return self.__wrapped__(*args, **kwargs)


def _cast_weights(
    model: nn.Module, dtype: torch.dtype, kept: list[nn.Module]
) -> dict[nn.Parameter, Tensor]:
    """Cast the weights but those of some layers, and return them as they were."""
    wide = {id(x) for m in kept for x in m.parameters()}
    originals: dict[nn.Parameter, Tensor] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in wide:
            originals[parameter] = parameter.detach().float()
            parameter.data = parameter.detach().to(dtype)
    return originals


def _cast_buffers(model: nn.Module, dtype: torch.dtype, kept: list[nn.Module]) -> None:
    """Cast the buffers but those of some layers."""
    wide = {id(x) for m in kept for x in m.buffers()}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and id(buffer) not in wide:
                setattr(module, name, buffer.to(dtype))


def _cast_calls(model: nn.Module, dtype: torch.dtype, kept: list[nn.Module]) -> None:
    """Cast what the model gets and returns, and what the layers in float32 do."""
    for norm in kept:
        norm.register_forward_pre_hook(functools.partial(_cast_inputs, torch.float32))
        norm.register_forward_hook(functools.partial(_cast_output, dtype))
    model.register_forward_pre_hook(
        functools.partial(_cast_arguments, dtype), with_kwargs=True, prepend=True
    )
    model.register_forward_hook(functools.partial(_cast_output, torch.float32))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _cast_tree(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, functools.partial(_cast, dtype=dtype), tree)


def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: tuple[Any, ...]) -> Any:
    return _cast_tree(args, dtype)


def _cast_arguments(
    dtype: torch.dtype, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    return _cast_tree(args, dtype), _cast_tree(dict(kwargs), dtype)


def _cast_output(dtype: torch.dtype, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _cast_tree(output, dtype)
