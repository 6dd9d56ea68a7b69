"""The check of the files in a run's folder; docs/results.md describes their schema.

A run is read as a whole or not at all. An error names the file and the place in it.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any, TypeVar

from danon.runs import task_registry
from danon.runs.case import SCHEMA, CaseResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import TypeAdapter, ValidationError

__all__ = [
    "SchemaError",
    "check_date",
    "check_tasks",
    "first_problem",
    "parse",
    "parse_case",
    "parse_versioned",
]

RATIOS = ("time_ratio", "time_ratio_low", "time_ratio_high", "time_ratio_extrapolated")
"""Metrics that readers divide by."""

_T = TypeVar("_T")
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


class SchemaError(ValueError):
    """A file that this danon cannot read; the message names the file and the fault."""


def parse(kind: type[_T], content: bytes, where: object) -> _T:
    """Read a dataclass from JSON with strict types.

    Args:
        kind: the dataclass; its ``__pydantic_config__`` may forbid unknown fields.
        content: JSON.
        where: the file and its line, for the message.

    Raises:
        SchemaError: the content is something else.
    """
    from pydantic import ValidationError

    try:
        value = _adapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        raise SchemaError(f"{where}: {first_problem(error)}") from None
    return value


def parse_versioned(kind: type[_T], content: bytes, where: object) -> _T:
    """Read a dataclass that has the version of the schema in its field ``schema``.

    Args:
        kind: the dataclass.
        content: JSON.
        where: the file, for the message.

    Raises:
        SchemaError: another version, or the content is something else.
    """
    try:
        values = json.loads(content)
    except ValueError as error:  # UnicodeDecodeError, too
        raise SchemaError(f"{where}: not whole JSON: {error}") from None
    version = values.get("schema") if isinstance(values, dict) else None
    if version != SCHEMA or isinstance(version, bool):
        described = "no version of its schema" if version is None else f"schema {version!r}"
        raise SchemaError(f"{where}: has {described}; this danon reads schema {SCHEMA}")
    return parse(kind, content, where)


def parse_case(line: bytes, where: object) -> CaseResult:
    """Read a line of ``cases.jsonl``.

    Args:
        line: JSON.
        where: the file and its line, for the message.

    Raises:
        SchemaError: the line is no case, or has figures that no measurement has.
    """
    result = parse(CaseResult, line, where)
    for name in RATIOS:
        if result.metrics.get(name, 1.0) <= 0:
            value = result.metrics[name]
            raise SchemaError(f"{where}: metrics -> {name} = {value:g}: must be positive")
    for part, names, types, word in (
        ("check", ("error", "tolerance"), (float, int), "a number"),
        ("place", ("host", "node"), (str,), "text"),
        ("place", ("machine",), (dict,), "a fingerprint"),
    ):
        values: dict[str, Any] = getattr(result, part)
        for name in names:
            if name in values and not isinstance(values[name], types):
                raise SchemaError(f"{where}: {part} -> {name} = {values[name]!r}: must be {word}")
    return result


def check_date(started: str, where: object) -> None:
    """Check a date in ISO 8601.

    Args:
        started: the text.
        where: the file, for the message.

    Raises:
        SchemaError: the text is no date.
    """
    try:
        dt.datetime.fromisoformat(started)
    except ValueError:
        raise SchemaError(f"{where}: info -> started = {started!r}: must be a date") from None


def check_tasks(results: Sequence[CaseResult], where: object) -> None:
    """Check that the metric of every pretrained task is known.

    Args:
        results: of a run.
        where: the file, for the message.

    Raises:
        SchemaError: nothing that is installed registers a task.
    """
    for result in results:
        case = result.case
        if case.suite == "pretrained" and task_registry.find(case.suite, case.task) is None:
            known = ", ".join(task_registry.names("pretrained"))
            raise SchemaError(f"{where}: {case.id}: task {case.task!r}: must be one of {known}")


def first_problem(error: ValidationError) -> str:
    """Return the place of the first fault, what is allowed there, and the number of further ones.

    Args:
        error: of pydantic.
    """
    first, more = error.errors()[0], error.error_count() - 1
    place = " -> ".join(map(str, first["loc"])) or "the file"
    return f"{place}: {first['msg']}{f' ({more} more)' if more else ''}"


def _adapter(kind: type[_T]) -> TypeAdapter[_T]:
    from pydantic import TypeAdapter

    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
