"""The mask of DANON attention in Hugging Face models, a description that other layers refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["MaskDescription", "MaskUseError", "describe_mask"]


class MaskUseError(ValueError, AttributeError):
    """Use of the mask of DANON attention by a layer that computes its attention itself.

    An AttributeError too, so that ``hasattr`` of a mask returns False.
    """


@dataclass(frozen=True, eq=False)
class MaskDescription:
    """Description of the tokens that a call may see.

    Models give the mask that they build to their attention layers. A layer that computes its
    attention itself would misread one without the causal pattern. So this is no tensor, and any
    computation with it raises an error.

    Attributes:
        causal: True if later tokens are hidden.
        padding: (B, n), nonzero for the real ones of the new tokens; None if all are real.
        cached: number of real tokens before them in each row; None without an attention mask.
        unserved: the model's pattern in words where DANON attention cannot serve it; else None.
        family: ``model_type`` of the model.
    """

    causal: bool
    padding: Tensor | None
    cached: list[int] | None
    unserved: str | None
    family: str

    def _refusal(self, use: str) -> MaskUseError:
        family = self.__dict__.get("family")  # a copy in the making has none yet
        return MaskUseError(
            f"{family} computes with the attention mask itself ({use}), outside of danon "
            "attention: the model cannot be served"
        )

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Refuse a function of torch that is given the mask."""
        given = (*args, *(kwargs or {}).values())
        name = getattr(function, "__name__", str(function))
        for x in given:
            if isinstance(x, cls):
                raise x._refusal(name)
        raise MaskUseError(f"{name} is given a mask of danon attention")

    def __getitem__(self, index: Any) -> NoReturn:
        """Refuse indexing."""
        raise self._refusal("a part of it")

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse attributes that a tensor would have."""
        raise self._refusal(name)


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **more: Any,
) -> MaskDescription:
    """Describe a mask; the mask function that models call, as in ``transformers.masking_utils``.

    A pattern that cannot be served is an error of the layer that is given it. The model that builds
    the mask is not refused, since some build masks that no layer uses.

    Args:
        batch_size: rows B.
        q_length: new tokens n.
        kv_length: new and cached tokens.
        q_offset: cached tokens.
        mask_function: pattern of visible keys, one of transformers' own for causal or bidirectional
            attention.
        attention_mask: (B, kv_length), nonzero for real tokens; None if all are real.
        local_size: tokens of a window or a chunk of the model.
        more: ``config`` names the model; the others are not used.

    Raises:
        ValueError: the number of keys, or of columns of the attention mask, is not that of the
            tokens.
    """
    unserved = None
    if mask_function is causal_mask_function and kv_length != q_offset + q_length:
        raise ValueError(
            f"the mask is for {kv_length} keys: must be {q_offset + q_length}, one for each token; "
            "danon attention knows no static cache and no attention_mask of another length"
        )
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        pattern = f"a window or chunks of {local_size} tokens" if local_size else "its own pattern"
        unserved = f"{pattern} (or packs several sequences in a row)"
    padding = cached = None
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch_size, kv_length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: must be "
                f"{(batch_size, kv_length)}, a column for each token, cached ones included"
            )
        cached = (attention_mask[:, : kv_length - q_length] != 0).sum(1).tolist()
        padding = attention_mask[:, kv_length - q_length :]
        padding = None if bool(padding.all()) else padding
    family = getattr(more.get("config"), "model_type", "the model")
    return MaskDescription(
        mask_function is not bidirectional_mask_function, padding, cached, unserved, family
    )
