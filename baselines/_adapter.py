"""The base class of the adapters: input checks, lazy packages and reasons for not running.

Dimension suffixes as in :mod:`danon.attention.base`.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from baselines._bridging import quiet_import
from baselines._memory import memory_reason
from danon.attention.base import BaseAttention, without_autocast
from danon.attention.padding import right_padded
from danon.attention.union.first_order import first_order_only
from danon.config import AttentionConfig

__all__ = ["Adapter"]


class Adapter(BaseAttention):
    """A baseline that checks its inputs, then calls :meth:`attend`.

    A subclass states what it needs in class attributes, so that every reason for not running
    is worded in one place.

    Args:
        shape: configuration of the attention.
    """

    takes_mask: ClassVar[bool] = True
    """True if a mask with padded tokens is accepted."""
    package: ClassVar[str] = ""
    """Distribution to install; empty for none beyond torch."""
    module: ClassVar[str] = ""
    """Module of ``package`` that is imported, by the constructor at the earliest."""
    extra: ClassVar[str] = "baselines"
    """Extra of danon that brings ``package``."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
    """Dtypes that the package takes."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Device types that the package runs on."""

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(shape)

    @without_autocast
    @right_padded
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, as in :meth:`BaseAttention.forward`.

        Args:
            q: (B, H, N, D).
            k: (B, G, N, D).
            v: (B, G, N, D).
            mask: (B, N), nonzero for real tokens; None if all are real.

        Returns:
            (B, H, N, D).

        Raises:
            ValueError: wrong shapes, dtypes or devices; or padded tokens where the package has
                no padding mask.
        """
        if mask is not None and not self.takes_mask:
            raise ValueError(
                f"{self.package} has no padding mask: mask must be None or mark every token real"
            )
        if self.config.is_causal and self.causal_capable:
            mask = None  # the padding is behind all that a real token sees
        return self.attend(q, k, v, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend after the checks of :meth:`forward`.

        Args:
            q: (B, H, N, D).
            k: (B, G, N, D).
            v: (B, G, N, D).
            mask: (B, N) boolean with padding at the end of some row; None if all are real.

        Returns:
            (B, H, N, D).
        """
        raise NotImplementedError(f"{type(self).__name__} defines no attend")

    def once(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of a kernel so that a second derivative is an error, not zero."""
        message = f"second derivatives through {self.package}: there are none; sdpa-math has them"
        return first_order_only(message, *tensors)

    @classmethod
    def load(cls) -> ModuleType:
        """Import ``module``.

        Raises:
            ImportError: in one line, what is missing and the extra that brings it.
        """
        try:
            with quiet_import():
                return importlib.import_module(cls.module)
        except ImportError as error:
            reason = f"{cls.package} does not import here: {' '.join(str(error).split())}"
            raise ImportError(cls._missing() or reason) from error

    @classmethod
    def _missing(cls) -> str | None:
        if not cls.module or importlib.util.find_spec(cls.module.partition(".")[0]) is not None:
            return None
        return f"{cls.package} is not installed (pip install danon[{cls.extra}])"

    @classmethod
    def peak_bytes(
        cls, shape: AttentionConfig, length: int, dtype: torch.dtype, backward: bool
    ) -> int:
        """Return about the bytes of one sequence beyond inputs and output; 0 if they are few."""
        return 0

    @classmethod
    def limit(
        cls,
        shape: AttentionConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        """Return a further reason not to run, once package, device and dtype are fine."""
        return None

    @classmethod
    def unavailable(
        cls,
        shape: AttentionConfig,
        *,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        backward: bool,
    ) -> str | None:
        """Return the reason why this baseline cannot run; None if it can."""
        missing = cls._missing()
        if missing is not None:
            return missing
        if device.type not in cls.devices:
            return f"runs on {' or '.join(cls.devices)} only, not on {device.type}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if dtype not in cls.dtypes:
            return f"takes {', '.join(map(_name, cls.dtypes))} only, not {_name(dtype)}"
        if cls.module:
            try:
                cls.load()
            except ImportError as error:
                return str(error)
        return cls.limit(shape, length, dtype, device, backward) or memory_reason(
            cls.peak_bytes(shape, length, dtype, backward), length, device
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
