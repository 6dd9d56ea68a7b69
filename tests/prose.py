"""Count the words of sentences in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator

CODE_BLOCK = re.compile(r"^ *(```|~~~).*?^ *\1[`~]* *$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
TAG = re.compile(r"</?[A-Za-z][^>]*>")
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
MARKUP = re.compile(r"[\s<>\[\]]+")
IMAGE = re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])")
LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")

QUOTE = re.compile(r"^ *(?:> ?)+")
ITEM = re.compile(r"^ *(?:[-*+]|\d+[.)])\s+(?:\[[ x]\]\s+)?")
LEFT_OUT = re.compile(r"^ *(?:\||#{1,6} |\[[^\]]+\]:\s|(?:[-*_=] *){3,}$)")
"""Rows of tables, headings, targets of links, rules."""

END = re.compile(r"[.!?][)\]\"'*_]*(?:\s+|$)")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|al|cf|vs|approx|eq|fig)|\.\.)\.\s*$", re.IGNORECASE)


def paragraphs(markdown: str) -> Iterator[str]:
    """Yield the text of each paragraph and each list item."""
    lines: list[str] = []
    in_list = False
    text = COMMENT.sub("", CODE_BLOCK.sub("", markdown))
    for line in [*(QUOTE.sub("", line) for line in text.splitlines()), ""]:
        item = ITEM.match(line)
        indented = line.startswith(("    ", "\t")) and not lines and not in_list
        skipped = not line.strip() or indented or bool(LEFT_OUT.match(line))
        if lines and (skipped or item):
            yield " ".join(lines)
            lines = []
        if skipped:
            # A blank line does not end a list, a heading or a table at the margin does.
            in_list = in_list and (not line.strip() or line.startswith(" "))
            continue
        in_list = bool(item) or (in_list and (bool(lines) or line.startswith(" ")))
        lines.append((line[item.end() :] if item else line).strip())


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a Markdown document, without markup of links and HTML.

    The end of a paragraph or of a list item ends a sentence, as a full stop, a question mark and an
    exclamation mark do. Code blocks, tables and headings are left out. Code between backticks is
    one word, whatever stands in it.
    """
    complete = []
    for paragraph in paragraphs(markdown):
        text = CODE.sub(lambda code: f"`{MARKUP.sub('_', code[2])}`", paragraph)
        text = TAG.sub("", LINK.sub(r"\1", IMAGE.sub("", text)))
        start = 0
        for end in END.finditer(text):
            if not ABBREVIATION.search(text[start : end.end()]):
                complete.append(text[start : end.end()].strip())
                start = end.end()
        complete.append(text[start:].strip())
    return [sentence for sentence in complete if count_words(sentence)]


def count_words(sentence: str) -> int:
    """Return the number of words, which have a letter or a digit."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())
