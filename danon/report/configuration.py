"""The configuration behind a figure; figures of different ones are never combined."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from danon.config import AttentionConfig
from danon.config.base import DIRECT_SIZES

if TYPE_CHECKING:
    from danon.runs.case import CaseResult

__all__ = ["digest", "same", "settings"]

SHAPE_FIELDS = {field.name for field in dataclasses.fields(AttentionConfig)} - {"causal", "kernel"}
"""Fields of the model around an attention, length included; the case has their values."""

LENGTH_FIELDS = {"select_length"}
"""Fields of a mechanism that hold the length it was built for."""

DIGEST_LENGTH = 12


def settings(result: CaseResult) -> dict[str, Any]:
    """Return the configuration of an attention without shape and length.

    Args:
        result: result of any suite.

    Returns:
        Field -> value; empty if the result carries no configuration.
    """
    ignored = SHAPE_FIELDS | LENGTH_FIELDS
    # None decides nothing, and records of before there were these fields stay comparable.
    ignored |= {name for name in DIRECT_SIZES if result.config.get(name) is None}
    return {name: value for name, value in result.config.items() if name not in ignored}


def digest(result: CaseResult) -> str:
    """Return a short hash of the settings, equal for two results of one configuration.

    The description of an attention is included: the configuration of a baseline lacks its window,
    its ``semantics`` has it.

    Args:
        result: result of any suite.

    Returns:
        Twelve hexadecimal digits; empty if the result carries no configuration.
    """
    if not result.config:
        return ""
    text = json.dumps([settings(result), result.semantics], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def same(one: str, other: str) -> bool:
    """Return True if two digests are of one configuration; an empty digest equals none."""
    return one == other != ""
