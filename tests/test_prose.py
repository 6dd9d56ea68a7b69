"""The documentation is written in short sentences."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from prose import count_words, sentences

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MAX_MEAN_WORDS = 20
MAX_WORDS = 45


def complaint(text: str) -> str:
    """Return what is too long in a Markdown text, with its five longest sentences, or nothing."""
    longest = sorted(((count_words(x), x) for x in sentences(text)), reverse=True)
    mean = statistics.mean(words for words, _ in longest)
    if mean <= MAX_MEAN_WORDS and longest[0][0] <= MAX_WORDS:
        return ""
    lines = [
        f"{mean:.1f} words a sentence, {MAX_MEAN_WORDS} at most; "
        f"the longest {longest[0][0]}, {MAX_WORDS} at most",
        *(f"{words:4d} {sentence}" for words, sentence in longest[:5]),
    ]
    return "\n".join(lines)


MARKDOWN = """# A heading of five words

<p align="center"><img src="a.png" alt="not counted"></p>
<!-- neither is this. Nor this. -->

Two words. Four words, not five, see
e.g. Smith et al. 2023! Is `danon bench --device cuda` one [word of a link](docs/a.md#b c.)?

    pip install nothing

| a table | has words |
| --- | --- |

Before a list:
- an item without a full stop
  that goes on here
- another - 22 % of 3.5 words

  with a paragraph. And two sentences.

```python
code = "is left out. Always."
```

![An image. Left out.](a.png)
"""


def test_sentences_of_markdown() -> None:
    assert [(count_words(x), x.split()[0]) for x in sentences(MARKDOWN)] == [
        (2, "Two"),
        (10, "Four"),
        (7, "Is"),
        (3, "Before"),
        (10, "an"),
        (5, "another"),
        (3, "with"),
        (3, "And"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three. " * 9, ""),
        ("word " * 20 + ". ", ""),
        ("word " * 21 + ". ", "21.0 words a sentence, 20 at most; the longest 21, 45 at most"),
        ("Short. " * 9 + "word " * 46, "5.5 words a sentence"),
    ],
)
def test_complaint(text: str, expected: str) -> None:
    assert complaint(text).startswith(expected) and bool(complaint(text)) == bool(expected)


def test_complaint_lists_the_five_longest_sentences() -> None:
    text = " ".join("word " * words + "end." for words in range(20, 40))
    listed = [int(line.split()[0]) for line in complaint(text).splitlines()[1:]]
    assert listed == [40, 39, 38, 37, 36]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda x: x.name)
def test_sentences_are_short(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not complaint(text), f"{document.relative_to(ROOT)}: {complaint(text)}"
