"""The mask of DANON attention in Hugging Face models: a description that no other layer can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["MaskDescription", "MaskUseError", "describe_mask"]


class MaskUseError(ValueError, AttributeError):
    """A layer that is no danon attention computes with the mask of one.

    An AttributeError too, so that ``hasattr`` of a mask stays a question.
    """


@dataclass(frozen=True, eq=False)
class MaskDescription:
    """What the tokens of a call may see.

    Models hand the mask that they build to their attention layers. A layer that computes its
    attention itself would misread one without the causal pattern, so this is no tensor: whatever
    computes with it raises an error.

    Attributes:
        causal: whether later tokens are hidden.
        padding: (B, n) bool, True for the real ones of the new tokens; None if all are real.
        cached: of each row, how many of the tokens before them are real; None if nothing says it.
        unserved: the model's own pattern that DANON attention does not know; None if there is none.
        family: the model's ``model_type``.
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
        given = (*args, *(kwargs or {}).values())
        name = getattr(function, "__name__", str(function))
        for x in given:
            if isinstance(x, cls):
                raise x._refusal(name)
        raise MaskUseError(f"{name} is given a mask of danon attention")

    def __getitem__(self, index: Any) -> NoReturn:
        raise self._refusal("a part of it")

    def __getattr__(self, name: str) -> NoReturn:
        raise self._refusal(name)


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **more: Any,
) -> MaskDescription:
    """The mask function that models call; arguments as in ``transformers.masking_utils``.

    A pattern that cannot be served is an error of the layer that is given it, not of the model that
    builds it: some build masks that no layer uses.

    Raises:
        ValueError: there are not as many keys, or columns of the attention mask, as tokens.
    """
    unserved = None
    if mask_function is causal_mask_function and kv_length != q_offset + q_length:
        raise ValueError(
            f"the mask is for {kv_length} keys: must be {q_offset + q_length}, one for each token; "
            "danon attention knows no static cache and no attention_mask of another length"
        )
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        what = f"a window or chunks of {local_size} tokens" if local_size else "its own pattern"
        unserved = f"{what} (or packs several sequences in a row)"
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
    family = getattr(config, "model_type", "the model")
    return MaskDescription(
        mask_function is not bidirectional_mask_function, padding, cached, unserved, family
    )
