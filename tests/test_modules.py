"""The size of files and functions, and the names of modules."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ("danon", "suites", "baselines", "gate_validation")
MAX_CODE_LINES, MAX_PARAMETERS = 400, 8
ONE_FILE_A_THING = {"baselines", "cli", "kernels", "suites", "targets", "tasks"}
"""Folders whose files are called by what they add: a command, a baseline ..."""
ROLES = {"base", "command", "layer", "oracle", "sequence_parallel", "streaming"}
"""Names that say what a module is to its folder."""


def code_lines(source: str) -> int:
    """Count the lines that are neither blank nor only a comment or a docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                documentation |= {*range(part.lineno, (part.end_lineno or 0) + 1)}
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped and token.type != tokenize.ENDMARKER
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - documentation)


def test_code_lines_of_a_known_text() -> None:
    assert code_lines('"""Two\nlines."""\n\n# a comment\nx = (\n    1\n)  # 3 lines\n') == 3


def test_no_file_has_too_many_lines_of_code() -> None:
    files = (file for folder in (*SHIPPED, "tests") for file in (ROOT / folder).rglob("*.py"))
    long = {
        str(file.relative_to(ROOT)): count
        for file in files
        if (count := code_lines(file.read_text(encoding="utf-8"))) > MAX_CODE_LINES
    }
    assert long == {}


def test_no_function_has_too_many_parameters() -> None:
    many = []
    for file in (file for folder in SHIPPED for file in (ROOT / folder).rglob("*.py")):
        if file.parent.name == "cli":  # the options of a command
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                count = len(names) + len(node.args.kwonlyargs) - (names[:1] in (["self"], ["cls"]))
                if count > MAX_PARAMETERS:
                    many.append(f"{file.relative_to(ROOT)}: {node.name} has {count}")
    assert many == []


def test_no_two_modules_have_one_name() -> None:
    modules: dict[str, list[str]] = {}
    for file in (file for folder in SHIPPED for file in (ROOT / folder).rglob("*.py")):
        if file.parent.name not in ONE_FILE_A_THING and not file.stem.startswith("__"):
            modules.setdefault(file.stem, []).append(str(file.relative_to(ROOT)))
    shared = {name: files for name, files in modules.items() if len(files) > 1}
    assert {name: files for name, files in shared.items() if name not in ROLES} == {}
