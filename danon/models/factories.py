"""Factories of models: the backbone with MSRA, DALA or UCSA as its mixer."""

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
    """Build a model with multi-scale recursive attention.

    Args:
        config: the configuration; or give its fields as keywords.
        task: ``encoder`` (bidirectional unless the config says causal), ``lm`` (causal) or
            ``classifier``; see :class:`~danon.models.backbone.Backbone`.
        num_classes: outputs of the classifier.
        **fields: fields of :class:`~danon.config.MSRAConfig`.

    Example::

        >>> import torch
        >>> from danon import create_msra_model
        >>> model = create_msra_model(hidden_size=64, num_layers=2, vocab_size=100, task="lm")
        >>> model(torch.randint(100, (1, 50))).shape
        torch.Size([1, 50, 100])

    Raises:
        ConfigError: a field that does not exist, or a value that is not allowed.
    """
    made = made_config(MSRAConfig, config, task, fields)
    return Backbone(made, lambda: MSRA(made), task, num_classes)


def create_dala_model(
    config: DALAConfig | None = None, *, task: Task = "encoder", num_classes: int = 2, **fields: Any
) -> Backbone:
    """Build a model with dynamic adaptive long-range attention.

    Args:
        config: the configuration; or give its fields as keywords.
        task: as in :func:`create_msra_model`.
        num_classes: outputs of the classifier.
        **fields: fields of :class:`~danon.config.DALAConfig`.

    Example::

        >>> import torch
        >>> from danon import create_dala_model
        >>> model = create_dala_model(hidden_size=64, num_layers=1, task="classifier")
        >>> model(torch.randint(1000, (3, 50))).shape
        torch.Size([3, 2])

    Raises:
        ConfigError: a field that does not exist, or a value that is not allowed.
    """
    made = made_config(DALAConfig, config, task, fields)
    return Backbone(made, lambda: DALA(made), task, num_classes)


def create_ucsa_model(
    config: UCSAConfig | None = None, *, task: Task = "encoder", num_classes: int = 2, **fields: Any
) -> Backbone:
    """Build a model with unified compressed sparse attention.

    Args:
        config: the configuration; or give its fields as keywords.
        task: as in :func:`create_msra_model`.
        num_classes: outputs of the classifier.
        **fields: fields of :class:`~danon.config.UCSAConfig`.

    Example::

        >>> import torch
        >>> from danon import create_ucsa_model
        >>> model = create_ucsa_model(hidden_size=64, num_layers=1, leaf_size=8)
        >>> model(torch.randint(1000, (3, 50))).shape
        torch.Size([3, 50, 64])

    Raises:
        ConfigError: a field that does not exist, or a value that is not allowed.
    """
    made = made_config(UCSAConfig, config, task, fields)
    return Backbone(made, lambda: UCSA(made), task, num_classes)


def made_config(kind: type[_C], config: _C | None, task: Task, fields: dict[str, Any]) -> _C:
    """Return the configuration of a model, causal for a language model.

    Args:
        kind: class of the configuration.
        config: the configuration, or None.
        task: as in :func:`create_msra_model`.
        fields: its fields, if ``config`` is None.

    Raises:
        ConfigError: both are given, or a configuration of another class, or a wrong value.
    """
    if config is not None and fields:
        raise ConfigError(f"give a config or its fields, not both: {', '.join(sorted(fields))}")
    if config is not None and not isinstance(config, kind):
        raise ConfigError(f"config is a {type(config).__name__}: must be a {kind.__name__}")
    made = kind.from_dict(fields) if config is None else config
    if task == "lm" and made.causal is None and not made.is_causal:
        made = dataclasses.replace(made, causal=True)
    return made
