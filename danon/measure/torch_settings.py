"""Settings of torch, and the random generators of the process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as hooks
from torch import Tensor

from danon.measure.process_setting import (
    Setting,
    describe_change,
    describe_changed_entries,
    describe_nothing,
)

__all__ = ["SEED", "TORCH_SETTINGS", "open_autocast_regions"]

DEVICE_TYPES = ("cpu", "cuda")
SEED = "torch's seed"
_inference_guards: list[object] = []  # modes that are entered again and never left
_memory_filling: Any = torch.utils.deterministic


def open_autocast_regions() -> int:
    """Return the depth of nested autocast regions: until it is 0, torch keeps casts of weights."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _default_device() -> object:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _set_inference(value: bool) -> None:
    _inference_guards.append(torch._C._InferenceMode(value))


def _autocast() -> dict[str, Any]:
    by_device = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in DEVICE_TYPES
    }
    cache = torch.is_autocast_cache_enabled()
    return {**by_device, "cache": cache, "open regions": open_autocast_regions()}


def _set_autocast(value: dict[str, Any]) -> None:
    for device in DEVICE_TYPES:
        enabled, dtype = value[device]
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(value["cache"])
    for _ in range(open_autocast_regions() - value["open regions"]):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _deterministic() -> dict[str, bool]:
    return {
        "enabled": torch.are_deterministic_algorithms_enabled(),
        "only warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill memory": _memory_filling.fill_uninitialized_memory,
    }


def _set_deterministic(value: dict[str, bool]) -> None:
    torch.use_deterministic_algorithms(value["enabled"], warn_only=value["only warn"])
    _memory_filling.fill_uninitialized_memory = value["fill memory"]


def _backends() -> dict[str, Any]:
    """Return the settings of the backends of matrix products, under torch's names."""
    backends = torch.backends
    values = {
        "fp32_precision": backends.fp32_precision,  # type: ignore[attr-defined]
        "bf16 reduction": backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16 reduction": backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "cudnn.benchmark": backends.cudnn.benchmark,
        "cudnn.deterministic": backends.cudnn.deterministic,
        "cudnn.enabled": backends.cudnn.enabled,
        "mkldnn.enabled": torch._C._get_mkldnn_enabled(),
    }
    precisions = _backends_with_precision().items()
    return values | {name: backend.fp32_precision for name, backend in precisions}


def _backends_with_precision() -> dict[str, Any]:
    backends: Any = torch.backends
    return {
        "cuda.matmul": backends.cuda.matmul,
        "cudnn": backends.cudnn,
        "mkldnn": backends.mkldnn,
        "mkldnn.matmul": backends.mkldnn.matmul,
    }


def _set_backends(value: dict[str, Any]) -> None:
    backends: Any = torch.backends
    backends.fp32_precision = value["fp32_precision"]
    for name, backend in _backends_with_precision().items():
        backend.fp32_precision = value[name]
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = value["bf16 reduction"]
    backends.cuda.matmul.allow_fp16_reduced_precision_reduction = value["fp16 reduction"]
    backends.cudnn.benchmark = value["cudnn.benchmark"]
    backends.cudnn.deterministic = value["cudnn.deterministic"]
    backends.cudnn.enabled = value["cudnn.enabled"]
    torch._C._set_mkldnn_enabled(value["mkldnn.enabled"])


def _dense_kernels() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "memory efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


def _set_dense_kernels(value: dict[str, bool]) -> None:
    cuda: Any = torch.backends.cuda
    cuda.enable_flash_sdp(value["flash"])
    cuda.enable_mem_efficient_sdp(value["memory efficient"])
    cuda.enable_math_sdp(value["math"])
    cuda.enable_cudnn_sdp(value["cudnn"])


def _flushes_denormals() -> bool:
    tiny = torch.full((1,), 1e-310, dtype=torch.float64, device="cpu")
    return float(tiny * 0.5) == 0.0


def _anomaly_detection() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _set_anomaly_detection(value: tuple[bool, bool]) -> None:
    torch.set_anomaly_enabled(*value)


def _module_hooks() -> dict[str, dict[Any, Any]]:
    tables = {name: value for name, value in vars(hooks).items() if name.startswith("_global_")}
    return {name: dict(value) for name, value in tables.items() if isinstance(value, dict)}


def _set_module_hooks(value: dict[str, dict[Any, Any]]) -> None:
    for name, entries in value.items():
        table = getattr(hooks, name)
        table.clear()
        table.update(entries)


def _pop_function_modes(count: int) -> None:
    while torch._C._len_torch_function_stack() > count:
        torch.overrides._pop_mode()


def _keep_seed(value: int) -> None:
    """Do nothing: the generators hold the seed and are set back as a whole."""


def _generators() -> tuple[Any, ...]:
    states = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    legacy: Any = np.random.get_state()  # noqa: NPY002  what is measured may draw from it
    states += [(legacy[0], legacy[1].tobytes(), *legacy[2:])]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [x.numpy().tobytes() for x in torch.cuda.get_rng_state_all()]
    return tuple(states)


def _set_generators(value: tuple[Any, ...]) -> None:
    cpu, python, (algorithm, keys, *rest), *cuda = value

    def tensor(content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    torch.set_rng_state(tensor(cpu))
    random.setstate(python)
    legacy = (algorithm, np.frombuffer(keys, dtype=np.uint32), *rest)
    np.random.set_state(legacy)  # noqa: NPY002
    for index, state in enumerate(cuda):
        torch.cuda.set_rng_state(tensor(state), index)


TORCH_SETTINGS = (
    Setting("torch's default device", _default_device, torch.set_default_device),
    Setting("torch's function modes", torch._C._len_torch_function_stack, _pop_function_modes),
    Setting("torch's threads", torch.get_num_threads, torch.set_num_threads),
    Setting("torch's inter-op threads", torch.get_num_interop_threads, None),
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("inference mode", torch.is_inference_mode_enabled, _set_inference),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("autocast", _autocast, _set_autocast, describe_changed_entries),
    Setting("anomaly detection", _anomaly_detection, _set_anomaly_detection, describe_change),
    Setting(
        "deterministic algorithms", _deterministic, _set_deterministic, describe_changed_entries
    ),
    Setting(
        "float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    # After the precision, which sets some of the backends too.
    Setting("torch's backends", _backends, _set_backends, describe_changed_entries),
    Setting(
        "kernels of dense attention", _dense_kernels, _set_dense_kernels, describe_changed_entries
    ),
    Setting("flushing of denormal numbers", _flushes_denormals, torch.set_flush_denormal),
    Setting("hooks of all modules", _module_hooks, _set_module_hooks, describe_changed_entries),
    Setting(SEED, torch.initial_seed, _keep_seed, describe_change),
    Setting("random generators", _generators, _set_generators, describe_nothing),
)
"""In the order in which they are set back."""
