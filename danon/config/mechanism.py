"""The record of each of danon's mechanisms: what the report, the gate and the studies say of it.

It is made where the mechanism's configuration is defined and needs no torch, so a report is written
without importing an attention::

    @mechanism("msra", section=1, colors=("#0b5fc0", "#6cb4ff"))
    @dataclass(frozen=True, kw_only=True)
    class MSRAConfig(AttentionConfig): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from danon.config.base import AttentionConfig

__all__ = ["Complexity", "Mechanism", "mechanism", "mechanisms"]

_RECORDS: dict[str, Mechanism] = {}
_C = TypeVar("_C", bound=type[AttentionConfig])


@dataclass(frozen=True)
class Complexity:
    """Growth with the number of tokens N that the specification claims (5.1).

    Attributes:
        time: of a forward pass, for example ``N log N``.
        state: of what a stream keeps.
    """

    time: str
    state: str


@dataclass(frozen=True)
class Mechanism:
    """One of danon's mechanisms; all that is not one is a baseline or a user's attention.

    Attributes:
        name: of the attention in the registry.
        config: class of its configuration.
        section: of the specification that defines it; mechanisms are listed in this order.
        colors: of its curve, on a light and on a dark background.
        complexity: None where the specification claims nothing.
        combines: it is made of the others, so it is no component of a hybrid, no layer in a study
            of architectures and no attention of a Hugging Face model.
        aliases: other names that ``danon tune --mechanism`` takes.
    """

    name: str
    config: type[AttentionConfig]
    section: int
    colors: tuple[str, str]
    complexity: Complexity | None = None
    combines: bool = False
    aliases: tuple[str, ...] = ()


def mechanism(
    name: str,
    *,
    section: int,
    colors: tuple[str, str],
    complexity: Complexity | None = None,
    combines: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[_C], _C]:
    """Class decorator of a configuration: record the mechanism that it configures.

    The arguments are the attributes of :class:`Mechanism`.

    Raises:
        ValueError: another configuration has the name.
    """

    def add(config: _C) -> _C:
        taken = _RECORDS.get(name)
        if taken is not None and taken.config.__qualname__ != config.__qualname__:
            raise ValueError(f"mechanism {name!r} is recorded already: {taken.config!r}")
        config.attention = name
        _RECORDS[name] = Mechanism(name, config, section, colors, complexity, combines, aliases)
        return config

    return add


def mechanisms(*, combining: bool = True) -> dict[str, Mechanism]:
    """Return the records by name, in the order of the specification.

    Args:
        combining: include mechanisms that are made of the others.
    """
    ordered = sorted(_RECORDS.values(), key=lambda record: record.section)
    return {record.name: record for record in ordered if combining or not record.combines}
