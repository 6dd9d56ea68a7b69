"""One bench: start the suites, store each outcome as it comes, show the scoreboard."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from danon.bench.child import Child
from danon.bench.progress import Display
from danon.bench.session import REFUSED, Options, Session
from danon.cluster.connection import ClusterError, check_engine
from danon.experiment.runs import UNWRITABLE

__all__ = ["Options", "bench"]


def bench(options: Options, console: Console) -> int:
    """Run the suites.

    Returns:
        Exit status: 0; 1 when a case failed; 2 when nothing could be measured; 74 when the results
        cannot be written; 128 + the signal that ended it.
    """
    session = Session(options, console)
    try:
        check_engine(options.engine, options.address)
    except ValueError as error:
        return _refused(console, str(error))
    try:
        if options.engine == "ray":
            return _spread(session, options, console)
        with (
            tempfile.TemporaryDirectory(prefix="danon-") as scratch,
            Child(options.arguments(), Path(scratch)) as child,
        ):
            return _measured(session, child, console)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return session.unwritten(error)


def _spread(session: Session, options: Options, console: Console) -> int:
    from danon.bench.spread import spread

    with stopping(lambda: None) as stopped:
        try:
            return spread(session, options, console, stopped)
        except ClusterError as error:
            return _refused(console, str(error))


def _measured(session: Session, child: Child, console: Console) -> int:
    with stopping(child.stop) as stopped, Display(console) as display:
        for event in child.events():
            if event["event"] == "plan":
                run_dir = session.open(event["fingerprint"])
                display.plan(event["cases"])
                child.answer(run=os.fspath(run_dir.resolve()))
                continue
            session.handle(event, display)
            if event["event"] == "result":
                child.answer()
        status = child.wait()
    signalled = stopped[0] if stopped else -status if status < 0 else 0
    if session.refusal:
        return _refused(console, session.refusal)
    if session.journal is None and not signalled:
        console.print(child.tail(), markup=False)
        return _refused(console, "the suites ended before they measured anything")
    unfinished = ""
    if session.journal and not Child.finished(status):
        unfinished = f"pytest ended with status {status}: {session.journal.run_dir}/pytest.log"
    return session.close((child.log, child.benchmark), unfinished, signalled)


def _refused(console: Console, reason: str) -> int:
    console.print(f"[bold red]danon bench:[/] {escape(reason)}", soft_wrap=True)
    return REFUSED


@contextlib.contextmanager
def stopping(end: Callable[[], object]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end what measures; what it had measured is then written as usual."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        end()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C insists

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
