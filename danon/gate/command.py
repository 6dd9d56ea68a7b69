"""``danon gate --against REV``: check both commits out, compare, say it in every form."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.markup import escape

from danon.bench.child import bundle
from danon.gate import output
from danon.gate.against import against
from danon.gate.cases import HEAD_DIM, HEADS, LONGEST, MECHANISMS, gate_cases
from danon.gate.checkout import CheckoutError, DirtyError, Repository, RevisionError
from danon.gate.comparison import UNDECIDED, Comparison
from danon.gate.pair import Side, WorkerError
from danon.gate.worker import NEW
from danon.measure.fingerprint import fingerprint

__all__ = ["Options", "gate"]

UNKNOWN_REVISION, DIRTY, NO_REPOSITORY, NO_START, INTERRUPTED = 3, 4, 5, 6, 130
"""Exit statuses beside those of a :class:`Comparison`."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        against: revision that is the base.
        attentions: ``file.py:Class`` in the repository, gated instead of danon's own mechanisms.
        only: registered names, comma separated, to gate.
        dirty: measure changes that no commit has.
        minutes: after which no new pair of processes begins.
        results: folder that gets gate.json, gate.md and gate.xml.
    """

    against: str
    attentions: tuple[str, ...]
    only: str
    dirty: bool
    minutes: float
    results: Path


def gate(options: Options, console: Console) -> int:
    """Compare; returns the exit status."""
    start = perf_counter()
    if options.minutes <= 0:
        return _refuse(console, f"--minutes {options.minutes:g}: must be positive", UNDECIDED)
    with tempfile.TemporaryDirectory(prefix="danon-gate-") as name:
        scratch = Path(name)
        log = scratch / "workers.log"
        try:
            repository = Repository(Path.cwd())
            base = repository.base(options.against, scratch / "base")
            head = repository.head(scratch / "head", dirty=options.dirty)
            inputs = _inputs(scratch / "inputs.pt")
            with console.status("starting", spinner="line") as status:
                rows = against(
                    Side("base", base.root, options.attentions),
                    Side("head", head.root, options.attentions),
                    list(gate_cases(_attentions(options))), inputs, log,
                    budget_s=60 * options.minutes,
                    say=lambda stage, done, of: status.update(f"{stage}: {done} of {of} cases"),
                )  # fmt: skip
        except RevisionError as error:
            return _refuse(console, str(error), UNKNOWN_REVISION)
        except DirtyError as error:
            return _refuse(console, str(error), DIRTY)
        except CheckoutError as error:
            return _refuse(console, str(error), NO_REPOSITORY)
        except WorkerError as error:
            return _refuse(console, str(error), NO_START)
        except KeyboardInterrupt:  # not 1, which is a regression
            return _refuse(console, "interrupted: nothing is decided", INTERRUPTED)
    found = Comparison(
        base.commit, head.commit, base.subject, head.subject, tuple(rows),
        perf_counter() - start, fingerprint(torch.device("cpu")),
    )  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "gate.json").write_text(found.to_json() + "\n", encoding="utf-8")
    (options.results / "gate.md").write_text(output.markdown(found), encoding="utf-8")
    (options.results / "gate.xml").write_bytes(output.junit(found))
    output.render(found, console)
    console.print(f"Written   {options.results}/gate.json, gate.md, gate.xml", soft_wrap=True)
    return found.status


def _attentions(options: Options) -> list[str]:
    own = [target.rpartition(":")[2] for target in options.attentions]
    named = [name for name in options.only.split(",") if name]
    return own + named or list(MECHANISMS)


def _inputs(place: Path) -> Path:
    """The suites' text as q, k and v, which both sides are measured with."""
    code = (
        "import sys, torch; from suites.inputs import text_qkv; "
        f"torch.save(list(text_qkv(1, {HEADS}, {LONGEST + NEW}, {HEAD_DIM})), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(place.resolve())], cwd=bundle(), check=True)
    return place


def _refuse(console: Console, reason: str, status: int) -> int:
    console.print(f"[bold red]danon gate:[/] {escape(reason)}", soft_wrap=True)
    return status
