"""Files are UTF-8 and the terminal is what it is, whatever the locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from danon.processes.interpreter import bundle
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo

ROOT = Path(__file__).parents[1]
CODE = [
    *(
        file
        for name in ("danon", "suites", "baselines", "examples")
        for file in sorted((ROOT / name).rglob("*.py"))
    ),
    ROOT / "noxfile.py",
]
TEXT = {"read_text", "write_text"}


def unspecified(source: str) -> Iterator[int]:
    """Lines whose text is in whatever encoding the locale has."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name == "read_text" and node.args:  # an encoding, or a file of a distribution: UTF-8
            continue
        text = any(
            k.arg in ("text", "universal_newlines")
            and isinstance(k.value, ast.Constant)
            and k.value.value is True
            for k in node.keywords
        )
        if name in TEXT or text:
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", [1]),
        ("x = 1\nplace('a').write_text(x, errors='replace')", [2]),
        ("subprocess.run(a, text=True)", [1]),
        ("path.read_text(encoding='utf-8')", []),
        ("path.read_bytes()", []),
    ],
)
def test_an_unspecified_encoding_is_found(source: str, found: list[int]) -> None:
    assert list(unspecified(source)) == found


def test_every_text_has_an_encoding() -> None:
    """Ruff's rule PLW1514 sees only what it can tell to be a path."""
    assert len(CODE) > 150
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in CODE
        for line in unspecified(file.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_a_report_in_an_ascii_locale(tmp_path: Path) -> None:
    info = RunInfo.capture("smoke", 0, "danon bench", {"id": "x", "cpu": "Prüfstand → 1"})
    journal = Journal.create(tmp_path / "Läufe", info)
    case = Case("speed", "sdpa", 64, "float32", "forward")
    journal.append(CaseResult(case, "measured", "", "genau ≈ dicht", {"time_s": 1e-3}))
    case = Case("speed", "window", 64, "float32", "forward")
    journal.append(CaseResult(case, "failed", "Schlüssel → Wert"))
    journal.set_status("FINISHED")
    code = "from danon.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(journal.run_dir)],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONIOENCODING": "",
            "PYTHONPATH": str(bundle()),
        },
    )
    said = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert "Schl?ssel ? Wert" in said and "Pr?fstand ? 1" in said
    page = (journal.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Schlüssel → Wert" in page and "genau ≈ dicht" in page
