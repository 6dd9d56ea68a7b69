"""The danon commands of a shell script or a Markdown page, and what the command line knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import typer.main

from danon.cli.app import app

FENCE = re.compile(r"^```(?:sh|yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:danon|nox -s) [^`\n]+)`")
SESSIONS = ("bench", "calibrate", "gate", "history", "report", "tune")
"""Sessions of nox that hand what follows ``--`` to the command of their name."""
ENDS = {"&&", "||", ";", "|", ">", ">>"}


def commands(script: str) -> Iterator[list[str]]:
    """Yield the words after ``danon`` of each call in a shell script, ``nox -s`` included."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quote over several lines: no call of danon
            continue
        for start, word in enumerate(words):
            end = next((n for n in range(start, len(words)) if words[n] in ENDS), len(words))
            called, first = words[start + 1 : end], start == 0 or words[start - 1] in ENDS
            if word == "danon" and called and (first or words[start - 1] == "-"):
                yield called
            elif word == "nox" and first and called[:1] == ["-s"] and called[1] in SESSIONS:
                yield [called[1], *called[3:]]


def page_commands(markdown: str) -> Iterator[list[str]]:
    """Yield the danon commands of a page: those of its blocks of shell and YAML, and inline."""
    for block in FENCE.findall(markdown):
        yield from commands(re.sub(r"^ *- (?=danon|nox)", "", block, flags=re.MULTILINE))
    for inline in INLINE.findall(FENCE.sub("", markdown)):
        yield from commands(inline)


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def unknown(words: list[str]) -> list[str]:
    """Return the command or the options among words that ``danon`` does not have."""
    command: Any = command_line()
    rest = list(words)
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        name = rest.pop(0)
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    known = {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
    options = (word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word))
    return [option for option in options if option not in known]
