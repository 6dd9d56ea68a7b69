"""Tuned settings as attentions of their own: ``msra-balanced`` is MSRA with those of a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from danon import tuned
from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.config import AttentionConfig

__all__ = ["register", "settings"]


def register(folder: Path | None = None) -> tuple[str, ...]:
    """Make an attention of all that studies found for those that are registered.

    Args:
        folder: where the files are; None: those of danon and of the repository one stands in.

    Returns:
        Their names.

    Raises:
        ValueError: a file there is none of ``danon tune``, or a name is taken.
    """
    made = []
    for attention in registry.names():
        cls = registry.get(attention)
        if issubclass(cls, _Variant):
            continue
        rows = tuned.known_rows(attention) if folder is None else tuned.rows(attention, folder)
        for row in rows.values():
            namespace = {
                "kind": cls,
                "row": row,
                "description": row.about,
                "tuned_length": row.length,
                "__module__": __name__,
            }
            registry.register(row.name)(type(row.name, (_Variant, cls), namespace))
            made.append(row.name)
    return tuple(made)


def settings(kind: type[BaseAttention]) -> Mapping[str, Any]:
    """Return the tuned settings that an attention stands for; none if it is no variant."""
    return kind.row.settings if issubclass(kind, _Variant) else {}


class _Variant(BaseAttention):
    """An attention built with tuned settings."""

    kind: ClassVar[type[BaseAttention]]
    row: ClassVar[tuned.TunedSettings]

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Any:
        """Build the attention itself, so that a model with it needs no study to be loaded again."""
        made = cls.kind.build(shape, **{**cls.row.settings, **settings})
        made.description = f"{cls.row.about}: {made.description}"
        return made

    @classmethod
    def search_space(cls) -> None:
        """Return None: the settings have been searched already."""

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Any:
        """Build it as it is, if that is within the budget: other sizes were not tuned.

        Raises:
            NotImplementedError: queries see more.
        """
        made, length = cls.build(shape), shape.max_sequence_length
        pairs = made.visible_pairs(length)
        if pairs is not None and pairs > entries * length:
            raise NotImplementedError(
                f"has the sizes it was tuned to for {cls.row.length} tokens: a query sees "
                f"{pairs / length:.0f} of {length} tokens on average, {entries} are asked for"
            )
        return made
