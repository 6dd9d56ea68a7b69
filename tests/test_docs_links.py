"""Files, folders and headings that the documentation names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "results/README")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "danon|suites|baselines|gate_validation|tests|docs|results"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*(?:/|\.\w+))`")
WRITTEN = ("results/gate/", "results/runs/", "results/tune/")
"""Folders that commands write, which no clone has."""


def anchors(file: Path) -> set[str]:
    """Return the names by which links reach the headings of a Markdown file."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def broken(file: Path, text: str) -> list[str]:
    """Return the links and paths of a text in a file that lead nowhere."""
    text, wrong = FENCE.sub("", text), []
    for link in LINK.findall(text):
        target, _, heading = link.partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        place = (file.parent / target).resolve() if target else file
        if not place.exists() or (heading and heading not in anchors(place)):
            wrong.append(link)
    paths = (path for path in PATH.findall(text) if not path.startswith(WRITTEN))
    return wrong + [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_and_paths_of_a_document(file: Path) -> None:
    assert broken(file, file.read_text(encoding="utf-8")) == []


def test_wrong_links_and_paths_are_found() -> None:
    text = "[a](docs/none.md) [b](#no-such-heading) `danon/none.py` [c](docs/gate.md#outcomes)"
    assert broken(ROOT / "README.md", text) == ["docs/none.md", "#no-such-heading", "danon/none.py"]
