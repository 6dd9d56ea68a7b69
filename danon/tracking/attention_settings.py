"""The settings of an attention as MLflow keeps them: parameters and a file."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from danon.config import AttentionConfig
from danon.config.mechanism import mechanisms
from danon.report import configuration, tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from danon.runs.case import CaseResult

__all__ = ["as_text", "changed_settings", "every_configuration"]


def changed_settings(result: CaseResult) -> dict[str, Any]:
    """Return the settings of a case that are not the defaults of its configuration.

    Args:
        result: outcome of the case.
    """
    ours = mechanisms().get(tables.mechanism(result.case.attention))
    defaults = {"causal": "true"}  # as benches have it
    for one in dataclasses.fields(AttentionConfig if ours is None else ours.config):
        factory = one.default_factory
        default = one.default if factory is dataclasses.MISSING else factory()
        defaults.setdefault(one.name, as_text(default))
    settings = configuration.settings(result)
    return {name: x for name, x in settings.items() if defaults.get(name) != as_text(x)}


def as_text(value: object) -> str:
    """Return a setting as text, the same for a list and a tuple.

    Args:
        value: value of the setting.
    """
    return json.dumps(value, sort_keys=True, default=str).strip('"')


def every_configuration(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Return the configurations of an attention with the ids of their cases.

    Args:
        results: outcomes of its cases.
    """
    by_digest: dict[str, dict[str, Any]] = {}
    for result in results:
        if not result.config:
            continue
        one = by_digest.setdefault(
            configuration.digest(result),
            {
                "settings": configuration.settings(result),
                "semantics": result.semantics,
                "cases": list[str](),
            },
        )
        one["cases"].append(result.case.id)
    return [{"digest": digest, **one} for digest, one in by_digest.items()]
