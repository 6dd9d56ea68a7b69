"""The table of attention kernels that a union of branches can run on.

A kernel computes one branch and its log-sum-exp, and the branch's gradients from the *merged*
output and log-sum-exp. All are other people's kernels; ``dense`` is the readable reference.

Shapes: q (T, H, C, D), k and v (T, G, L, D), bias float (1|T, 1|H, 1|C, L) or None,
lse (T, H, C). T is a batch of tiles. ``causal`` is used with C == L only.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

import torch

from danon.attention import kernels
from danon.attention.kernels.base import HALF, REGISTERED, Kernel
from danon.console.reasons import located
from danon.runs.entry_points import entry_points, package_of

__all__ = ["available", "keeps_bias", "names", "resolve"]

for _module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
    if _module.name != __name__:
        importlib.import_module(_module.name)  # a file here is a backend, and registers it
GROUP = "danon.kernels"
"""Entry points of installed packages: the value is a module that registers a backend."""
_AUTO = ("cpu-flash", "cuda-flash", "cuda-efficient", "dense")


def names() -> tuple[str, ...]:
    """Return the names of all kernels, also of those that cannot run here."""
    _load_installed()
    return tuple(REGISTERED)


def available() -> dict[str, str | None]:
    """Return kernel name -> None if it can run on this machine, else the reason why not."""
    left_out = _load_installed()
    return {name: kernel.missing() for name, kernel in REGISTERED.items()} | left_out


@functools.cache
def _load_installed() -> dict[str, str]:
    """Import the backends of installed packages, once.

    They are imported when a kernel is looked for that danon has not: importing danon costs nothing.

    Returns:
        Why a backend is left out, by its name.
    """
    left_out = dict[str, str]()
    for point in entry_points(GROUP):
        package = package_of(point)
        if point.name in REGISTERED:
            owner = type(REGISTERED[point.name]).__module__
            if owner.partition(".")[0] != point.module.partition(".")[0]:
                left_out[f"{point.name} of {package}"] = f"the name is taken by {owner}"
            continue
        which = f"kernel {point.name!r} of the installed package {package}"
        try:
            point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001  nobody may have asked for it
            left_out[point.name] = f"{which} does not import: {located(error)}"
        else:
            if point.name not in REGISTERED:
                left_out[point.name] = f"{which}: {point.value} registers no kernel of that name"
    return left_out


@functools.lru_cache(maxsize=256)
def resolve(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, bias: bool
) -> Kernel:
    """Return the kernel for a call.

    Args:
        name: a kernel, or ``auto``: the first of cpu-flash, cuda-flash, cuda-efficient, dense that
            takes this device, dtype, head dimension and bias. So float64 on CUDA is dense; a biased
            branch on CUDA is cuda-efficient.
        device: of q, k and v.
        dtype: of q, k and v.
        head_dim: D, spare columns included.
        bias: True if the call has a logit bias.

    Raises:
        ValueError: an unknown name, or a kernel that cannot run this call; nothing else is tried.
    """
    if name == "auto":
        for candidate in _AUTO:
            if REGISTERED[candidate].refuses(device, dtype, head_dim, bias) is None:
                return REGISTERED[candidate]
    if name not in REGISTERED and (reason := _load_installed().get(name)):
        raise ValueError(reason)
    if name not in REGISTERED:
        raise ValueError(f"unknown kernel {name!r}; known: auto, {', '.join(REGISTERED)}")
    if reason := REGISTERED[name].refuses(device, dtype, head_dim, bias):
        able = [
            n for n, k in REGISTERED.items() if k.refuses(device, dtype, head_dim, bias) is None
        ]
        raise ValueError(
            f"kernel {name!r} cannot run this call: {reason}; these can: {', '.join(able)}"
        )
    return REGISTERED[name]


def keeps_bias(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if the kernel for a call adds a logit bias in float32 or wider."""
    if name != "auto" and name not in REGISTERED:
        _load_installed()
    if name in REGISTERED and REGISTERED[name].refuses(device, dtype, head_dim, True) is not None:
        return False
    return not resolve(name, device, dtype, head_dim, True).rounds_bias or dtype not in HALF
