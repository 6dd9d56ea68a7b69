"""create_msra_model, create_dala_model, create_ucsa_model: the backbone with that mixer."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from danon.attention.dala.layer import DALA
from danon.attention.msra.layer import MSRA
from danon.attention.ucsa.layer import UCSA
from danon.config import AttentionConfig, ConfigError, DALAConfig, MSRAConfig, UCSAConfig
from danon.models.backbone import Backbone, Task

__all__ = ["create_dala_model", "create_msra_model", "create_ucsa_model"]

_C = TypeVar("_C", bound=AttentionConfig)


def create_msra_model(
    config: MSRAConfig | None = None, *, task: Task = "encoder", num_classes: int = 2, **fields: Any
) -> Backbone:
    """A model with multi-scale recursive attention.

    Args:
        config: the configuration; or give its fields as keywords.
        task: ``encoder`` (bidirectional unless the config says causal), ``lm`` (causal) or
            ``classifier``; see :class:`~danon.models.backbone.Backbone`.
        num_classes: outputs of the classifier.
        **fields: fields of :class:`~danon.config.MSRAConfig`.

    Raises:
        ConfigError: a field that does not exist, or a value that is not allowed.
    """
    made = made_config(MSRAConfig, config, task, fields)
    return Backbone(made, lambda: MSRA(made), task, num_classes)


def create_dala_model(
    config: DALAConfig | None = None, *, task: Task = "encoder", num_classes: int = 2, **fields: Any
) -> Backbone:
    """A model with dynamic adaptive long-range attention; see :func:`create_msra_model`."""
    made = made_config(DALAConfig, config, task, fields)
    return Backbone(made, lambda: DALA(made), task, num_classes)


def create_ucsa_model(
    config: UCSAConfig | None = None, *, task: Task = "encoder", num_classes: int = 2, **fields: Any
) -> Backbone:
    """A model with unified compressed sparse attention; see :func:`create_msra_model`."""
    made = made_config(UCSAConfig, config, task, fields)
    return Backbone(made, lambda: UCSA(made), task, num_classes)


def made_config(kind: type[_C], config: _C | None, task: Task, fields: dict[str, Any]) -> _C:
    if config is not None and fields:
        raise ConfigError(f"give a config or its fields, not both: {', '.join(sorted(fields))}")
    if config is not None and not isinstance(config, kind):
        raise ConfigError(f"config is a {type(config).__name__}: must be a {kind.__name__}")
    made = kind.from_dict(fields) if config is None else config
    if task == "lm" and made.causal is None and not made.is_causal:
        made = dataclasses.replace(made, causal=True)
    return made
