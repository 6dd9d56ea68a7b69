"""Docstrings begin with a verb or name the thing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("danon", "suites", "baselines", "gate_validation", "examples", "tests")
CODE = [ROOT / "noxfile.py", *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))]
REFUSED = re.compile(r"\s*(What|Whether|Of|That|How)\s")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of docstrings, those below attributes and constants included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        for before, statement in zip([None, *body], body, strict=False):
            first = before is None and documented
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
                and (first or isinstance(before, ast.Assign | ast.AnnAssign))
            ):
                yield statement.lineno, statement.value.value


def refused(source: str) -> list[tuple[int, str]]:
    """Return line and first line of the docstrings that begin with a refused word."""
    return [
        (line, text.strip().splitlines()[0])
        for line, text in docstrings(source)
        if REFUSED.match(text)
    ]


EXAMPLE = '''"""What a module is."""
SIZE = 1
"""Of a page, in bytes."""


class A:
    """Whether it is."""

    width: int = 2
    """Width in columns."""

    def method(self):
        """
        How it goes on.
        """
        "That is no docstring."

    async def other(self):
        """Whatever returns, of which nothing is said."""


def function():
    """That somebody did."""
    return "What"
'''


def test_refused_docstrings() -> None:
    assert refused(EXAMPLE) == [
        (1, "What a module is."),
        (3, "Of a page, in bytes."),
        (7, "Whether it is."),
        (23, "That somebody did."),
        (13, "How it goes on."),
    ]


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    offenders = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in sorted(CODE)
        for line, text in refused(file.read_text(encoding="utf-8"))
    ]
    assert not offenders, f"{len(offenders)} docstrings:\n" + "\n".join(offenders)
