"""Figures that the documentation quotes from files under results/ agree with these files.

``quoted_figures`` has the quoted texts, each with the values of its numbers, in order. A text has
to stand in its document (whatever the line breaks), and each number has to be the value, rounded as
it is written. A renewed file fails the test of every sentence that quotes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from quoted_figures import QUOTES
from recorded_figures import error_rates

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", *(x.relative_to(ROOT).as_posix() for x in PAGES))

NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w]|\.\d)")

RECORDS = re.compile(r"\bcpu-(?:quick|standard)[\w-]*")
"""Names of recorded runs, as documents mention them."""

QUOTED = [
    pytest.param(document, text, values, id=f"{Path(document).stem}: {text[:40]}")
    for document, rows in QUOTES.items()
    for text, values in rows
]


def flat(text: str) -> str:
    return " ".join(text.split())


def disagreements(text: str, values: list[float]) -> list[str]:
    """Return the numbers of a text that are not the values, rounded to as many decimals."""
    written = NUMBER.findall(text)
    assert len(written) == len(values), f"{written} for {values}"
    wrong = []
    for number, value in zip(written, values, strict=True):
        unit = 10.0 ** -len(number.partition(".")[2])
        if abs(float(number) - value) > unit / 2 * (1 + 1e-9):
            wrong.append(f"{number} should be {value:.6g}")
    return wrong


@pytest.mark.parametrize(("document", "text", "values"), QUOTED)
def test_quoted_figure(document: str, text: str, values: Callable[[], list[float]]) -> None:
    quoted = flat(text) in flat((ROOT / document).read_text(encoding="utf-8"))
    assert quoted, f"{document} does not contain {text!r}"
    wrong = disagreements(text, values())
    assert not wrong, f"{document}, {text!r}: {'; '.join(wrong)}"


def test_disagreements_of_a_wrong_figure() -> None:
    assert disagreements("MSRA 2.10 (3.3)", [2.097, 3.559]) == ["3.3 should be 3.559"]
    assert disagreements("a share of 0.875, at most 62 %, 1e-5 off", [0.875, 61.5]) == []


# The table of how often the gate errs

METHODS = (
    "danon gate",
    "pytest-benchmark min:5%",
    "pytest-benchmark mean:5%",
    "pytest-benchmark mean:10%",
    "asv compare, factor 1.05",
    "asv compare, factor 1.1",
)


def table_of_errors() -> Iterator[tuple[str, list[str]]]:
    """Yield the label and the cells of each row."""
    lines = (ROOT / "docs/gate.md").read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("| planted in one mechanism"))
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        yield label, cells


def test_table_of_how_often_the_gate_errs() -> None:
    wrong, seen = [], []
    for label, (runs, *cells) in table_of_errors():
        planted, _, load = label.partition(", ")
        slowdown = 0.0 if planted == "nothing" else float(planted.strip("+ %")) / 100
        load = load.removeprefix("beside ").removeprefix("a ")
        for method, cell in zip(METHODS, cells, strict=True):
            key = (method, load, slowdown)
            (rate,) = [
                x for x in error_rates()["time"] if (x["method"], x["load"], x["slowdown"]) == key
            ]
            values = [rate["alarms"], *(100 * end for end in rate["interval"])]
            numbers = len(NUMBER.findall(cell))
            assert numbers in (1, 3) and int(runs) == rate["runs"], (label, cell)
            wrong += [f"{label}, {method}: {x}" for x in disagreements(cell, values[:numbers])]
            seen.append(key)
    assert not wrong, "\n".join(wrong)
    assert len(seen) == len(set(seen)) == len(error_rates()["time"])


def passages(text: str) -> list[str]:
    """Return paragraphs and list items, each with the table that follows it."""
    return re.split(r"\n(?=- |#)|\n\n(?!\|)", text)


def unchecked(text: str, quotes: list[str]) -> list[str]:
    """Return the passages that name a recorded run and have figures, but no quoted text."""
    return [
        passage
        for passage in passages(text)
        if RECORDS.search(passage)
        and len(NUMBER.findall(RECORDS.sub("", passage))) > 3
        and not any(flat(quote) in flat(passage) for quote in quotes)
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_passages_with_figures_of_a_record_are_checked(document: str) -> None:
    quotes = [text for text, _ in QUOTES.get(document, [])]
    offenders = unchecked((ROOT / document).read_text(encoding="utf-8"), quotes)
    assert not offenders, f"{document} quotes unchecked: {flat(offenders[0])[:300]}"


def test_unchecked_table_after_the_name_of_a_record() -> None:
    table = "| a | 1.0 | 2.0 |\n| b | 3.0 | 4.0 |"
    text = f"No record: 1, 2, 3, 4.\n\n- Of cpu-quick:\n\n{table}\n\n- Something else."
    assert unchecked(text, []) == [f"- Of cpu-quick:\n\n{table}"]
    assert unchecked(text, ["| b | 3.0 | 4.0 |"]) == []
