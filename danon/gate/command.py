"""``danon gate`` and ``danon calibrate``: check commits out, measure, say it in every form."""

from __future__ import annotations

import contextlib
import datetime as dt
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danon.bench.child import bundle
from danon.experiment.runs import replace_file
from danon.experiment.store import StoreError
from danon.gate import output
from danon.gate.accept import accept, allowances, recalibrated
from danon.gate.against import against
from danon.gate.cases import HEAD_DIM, HEADS, LONGEST, MECHANISMS, gate_cases
from danon.gate.checkout import Checkout, CheckoutError, DirtyError, Repository, RevisionError
from danon.gate.comparison import UNDECIDED, Comparison
from danon.gate.history import HistoryError, changes, draw, points
from danon.gate.pair import Side, WorkerError
from danon.gate.record import record, register
from danon.gate.standing import WIDER, calibrated, standing
from danon.gate.thresholds import Thresholds, ThresholdsError
from danon.gate.trial import Say
from danon.gate.worker import NEW
from danon.measure.case import Case
from danon.measure.fingerprint import fingerprint

__all__ = ["Options", "acceptance", "calibrate", "gate", "history"]

INTERRUPTED, INTERNAL = 130, 70
STATUSES: tuple[tuple[type[BaseException], int], ...] = (
    (RevisionError, 3), (DirtyError, 4), (CheckoutError, 5), (WorkerError, 6),
    (ThresholdsError, 7), (HistoryError, 8), (StoreError, 8), (KeyboardInterrupt, INTERRUPTED),
)  # fmt: skip
"""Exit statuses beside those of a :class:`Comparison`."""
THRESHOLDS = Path("results") / "thresholds.json"
"""In the repository."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        attentions: ``file.py:Class`` in the repository, measured instead of danon's own mechanisms.
        only: registered names, comma separated, to measure.
        dirty: measure changes that no commit has.
        minutes: after which no new processes begin.
        results: folder that gets gate.json, gate.md and gate.xml.
        against: revision that is the base; empty compares with the thresholds.
    """

    attentions: tuple[str, ...]
    only: str
    dirty: bool
    minutes: float
    results: Path
    against: str = ""

    @property
    def cases(self) -> list[Case]:
        own = [target.rpartition(":")[2] for target in self.attentions]
        named = [name for name in self.only.split(",") if name]
        return list(gate_cases(own + named or MECHANISMS))


@dataclass(frozen=True)
class _Bench:
    """Where it all happens, and what every measurement needs."""

    repository: Repository
    head: Checkout
    side: Side
    scratch: Path
    inputs: Path
    log: Path
    say: Say


def gate(options: Options, console: Console) -> int:
    """Compare; returns the exit status."""
    if options.minutes <= 0:
        _refuse(console, f"--minutes {options.minutes:g}: must be positive")
        return UNDECIDED
    return _guarded(console, lambda: _gate(options, console))


def calibrate(options: Options, pairs: int, console: Console) -> int:
    """Measure the thresholds of what is checked out; returns the exit status."""
    if pairs < 2:
        _refuse(console, f"--pairs {pairs}: must be at least 2")
        return UNDECIDED
    return _guarded(console, lambda: _calibrate(options, pairs, console))


def history(name: str, results: Path, console: Console) -> int:
    """Show where the time of a case changed over the runs of the gate."""

    def run() -> int:
        some = points(name)
        path = results / f"history-{name.replace('/', '-')}.png"
        found = changes(some)
        draw(name, some, found, path)
        at = {change.at: change for change in found}
        table = Table("run", "commit", "time over dense", "change", box=None, pad_edge=False)
        for number, point in enumerate(some):
            when = dt.datetime.fromtimestamp(point.when / 1000, dt.UTC)
            change = f"{at[number].ratio - 1:+.1%} from here on" if number in at else ""
            table.add_row(f"{when:%Y-%m-%d %H:%M}", point.commit[:10],
                          f"{point.relative_time:.4g}", f"[bold red]{change}[/]")  # fmt: skip
        console.print(table)
        _say(console, "Written", str(path))
        return 0

    return _guarded(console, run)


def acceptance(name: str, why: str, results: Path, console: Console) -> int:
    """Move the threshold of a case to what the last comparison measured."""

    def run() -> int:
        repository = Repository(Path.cwd())
        place = repository.root / THRESHOLDS
        moved = accept(
            Thresholds.read(place), results / "gate.json", name, why=why, by=repository.user
        )
        moved.write(place)
        new, old = moved.cases[name], moved.cases[name].history[-1]
        change = f"{old.relative_time:.4g} -> {new.relative_time:.4g} of dense attention's time"
        _say(console, "Accepted", f"{name}: {change}")
        _say(console, "Written", f"{place}: commit it with what costs it")
        _say(console, "MLflow", register(moved, why))
        return 0

    return _guarded(console, run)


def _gate(options: Options, console: Console) -> int:
    start, here = perf_counter(), fingerprint(torch.device("cpu"))
    with _bench(options, console) as bench:
        accepted: Thresholds | None = None
        if options.against:
            base = bench.repository.base(options.against, bench.scratch / "base")
            commit, subject, remark = base.commit, base.subject, ""
            rows = against(
                Side("base", base.root, options.attentions), bench.side, options.cases,
                bench.inputs, bench.log, budget_s=60 * options.minutes, say=bench.say,
                allowed=allowances(_thresholds(base), _thresholds(bench.head)),
            )  # fmt: skip
        else:
            accepted = Thresholds.read(bench.head.root / THRESHOLDS)
            commit, subject = accepted.commit, f"thresholds of {accepted.when}"
            remark = _remark(accepted, here)
            rows = standing(
                bench.side, accepted, options.cases, bench.inputs, bench.log, fingerprint=here,
                budget_s=60 * options.minutes, say=bench.say,
            )  # fmt: skip
    found = Comparison(
        commit, bench.head.commit, subject, bench.head.subject, tuple(rows),
        perf_counter() - start, here, remark,
    )  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    replace_file(options.results / "gate.json", f"{found.to_json()}\n".encode())
    replace_file(options.results / "gate.md", output.markdown(found).encode())
    replace_file(options.results / "gate.xml", output.junit(found))
    output.render(found, console)
    _say(console, "Written", f"{options.results}/gate.json, gate.md, gate.xml")
    _say(console, "MLflow", record(found, options.results, accepted))
    if accepted is not None:
        _say(console, "", register(accepted, "read from the repository"))
    return found.status


def _calibrate(options: Options, pairs: int, console: Console) -> int:
    start = perf_counter()
    with _bench(options, console) as bench:
        found, without = calibrated(
            bench.side, options.cases, bench.inputs, bench.log, pairs=pairs, say=bench.say
        )
        place, before = bench.repository.root / THRESHOLDS, _thresholds(bench.head)
        commit, by = bench.head.commit, bench.repository.user
        known = {} if before is None else before.cases
        thresholds = Thresholds(
            commit=commit, when=dt.datetime.now(dt.UTC).date().isoformat(), pairs=pairs,
            fingerprint=fingerprint(torch.device("cpu")),
            cases=recalibrated(known, found, commit=commit, by=by),
        )  # fmt: skip
        thresholds.write(place)
    for name, reason in without.items():
        _say(console, "", f"{name}: {reason}")
    took = f"{perf_counter() - start:.0f} s"
    console.print(f"{len(found)} of {len(options.cases)} cases calibrated in {took}")
    _say(console, "Written", f"{place}: commit it")
    _say(console, "MLflow", register(thresholds, "calibrated"))
    return 0


@contextlib.contextmanager
def _bench(options: Options, console: Console) -> Iterator[_Bench]:
    with tempfile.TemporaryDirectory(prefix="danon-gate-") as name:
        scratch = Path(name)
        repository = Repository(Path.cwd())
        head = repository.head(scratch / "head", dirty=options.dirty)
        with console.status("starting", spinner="line") as status:
            told = ""

            def say(stage: str, done: int, of: int) -> None:
                nonlocal told
                status.update(f"{stage}: {done} of {of} cases")
                if stage != told and not console.is_terminal:  # a log has no spinner
                    _say(console, "", f"{stage}: {of} cases")
                told = stage

            yield _Bench(
                repository, head, Side("head", head.root, options.attentions), scratch,
                _inputs(scratch / "inputs.pt"), scratch / "workers.log", say,
            )  # fmt: skip


def _inputs(place: Path) -> Path:
    """The suites' text as q, k and v, which all sides are measured with."""
    code = (
        "import sys, torch; from suites.inputs import text_qkv; "
        f"torch.save(list(text_qkv(1, {HEADS}, {LONGEST + NEW}, {HEAD_DIM})), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(place.resolve())], cwd=bundle(), check=True)
    return place


def _thresholds(checkout: Checkout) -> Thresholds | None:
    """Those of a checkout, if it has any.

    Raises:
        ThresholdsError: it has, and they are wrong.
    """
    place = checkout.root / THRESHOLDS
    return Thresholds.read(place) if place.exists() else None


def _remark(accepted: Thresholds, here: dict[str, str]) -> str:
    if accepted.same_machine(here):
        return ""
    exact = "" if accepted.comparable(here) else "; bytes and graph breaks are not compared"
    return (
        f"The thresholds are of another machine ({accepted.fingerprint.get('cpu')}, torch "
        f"{accepted.fingerprint.get('torch')}): times may differ {WIDER:g} times as much{exact}."
    )


def _guarded(console: Console, run: Callable[[], int]) -> int:
    """Errors as messages with statuses of their own: 1 would be a regression."""
    try:
        return run()
    except tuple(kind for kind, _ in STATUSES) as error:
        _refuse(console, str(error) or "interrupted: nothing is decided")
        return next(status for kind, status in STATUSES if isinstance(error, kind))
    except Exception:  # noqa: BLE001  told in full, and not with the status of a regression
        traceback.print_exc()
        _refuse(console, "this is an error of the gate itself: nothing is decided")
        return INTERNAL


def _say(console: Console, what: str, words: str) -> None:
    console.print(f"{what:<9} {escape(words)}", soft_wrap=True, highlight=False)


def _refuse(console: Console, reason: str) -> None:
    console.print(f"[bold red]danon:[/] {escape(reason)}", soft_wrap=True)
