"""Commands and options that the documentation and the CI examples name exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from shell_commands import commands, page_commands, unknown

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "log.md"),
]
"""All but the log, which quotes commands as they were."""

PAGE = """Run `danon gate --against main`, or `nox -s tune -- --mechanism ucsa --trials 3`:

```sh
pip install danon[bench] && danon bench --profile smoke \\
  --only msra > out.txt --not-an-option
nox -s tests -- -k union
# danon comment --no
```

```yaml
  script:
    - danon report --tables
```
"""


def test_commands_of_a_page() -> None:
    assert list(page_commands(PAGE)) == [
        ["bench", "--profile", "smoke", "--only", "msra"],
        ["report", "--tables"],
        ["gate", "--against", "main"],
        ["tune", "--mechanism", "ucsa", "--trials", "3"],
    ]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("danon bench --profile smoke --resume", []),
        ("danon tune worker --study x", []),
        ("danon gate --against=main --minuets 3", ["--minuets"]),
        ("danon tune --kind schedule --sampler=tpe --seeds 1", ["--seeds"]),
        ("danon benhc --profile smoke", ["benhc"]),
        ("nox -s gate -- --dirtier", ["--dirtier"]),
    ],
)
def test_unknown_commands_and_options(command: str, missing: list[str]) -> None:
    (words,) = commands(command)
    assert unknown(words) == missing


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_commands_of_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = {" ".join(words): unknown(words) for words in page_commands(text) if unknown(words)}
    assert wrong == {}


def test_the_documentation_has_commands() -> None:
    found = [words[0] for page in DOCUMENTS for words in page_commands(page.read_text("utf-8"))]
    assert len(found) > 80 and {"bench", "gate", "tune", "choose", "doctor"} <= set(found)
