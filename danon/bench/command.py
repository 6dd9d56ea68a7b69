"""The command ``danon bench``: run the suites, store each outcome, show the scoreboard."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from danon.bench.progress import Display
from danon.bench.session import Options, ResumeError, Session
from danon.bench.supervisor import Supervisor
from danon.cluster.connection import ClusterError, check_engine
from danon.console.exit_status import REFUSED
from danon.console.messages import refuse
from danon.console.signals import ENDING
from danon.runs.files import UNWRITABLE

__all__ = ["Options", "bench"]


def bench(options: Options, console: Console) -> int:
    """Run the suites.

    Args:
        options: options of the command.
        console: for messages and tables.

    Returns:
        Exit status: 0; 1 if a case failed; 2 if not all cases have an outcome; 74 if the results
        cannot be written; 128 + the number of the signal that ended it.
    """
    session = Session(options, console)
    try:
        check_engine(options.engine, options.address)
    except ValueError as error:
        return _refused(console, str(error))
    try:
        if options.engine == "ray":
            return _run_on_cluster(session, options, console)
        with (
            tempfile.TemporaryDirectory(prefix="danon-") as scratch,
            Supervisor([*options.arguments(), "--danon-fewer-threads"], Path(scratch)) as suites,
        ):
            return _run_here(session, suites, console)
    except ResumeError as error:
        return _refused(console, str(error))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return session.unwritten(error)


def _run_on_cluster(session: Session, options: Options, console: Console) -> int:
    from danon.bench.ray_runner import run_on_cluster

    with stopping(lambda: None) as stopped:
        try:
            return run_on_cluster(session, options, console, stopped)
        except (ClusterError, ResumeError) as error:
            return _refused(console, str(error))


def _run_here(session: Session, suites: Supervisor, console: Console) -> int:
    with stopping(suites.stop) as stopped, Display(console) as display:
        for event in suites.events():
            if event["event"] == "plan":
                planned = [case for case, _ in event["cases"]]
                session.open(
                    event["fingerprint"],
                    event["basis"],
                    planned,
                    event["most_threads"],
                    event["suites"],
                )
                display.plan(event["cases"])
                assert session.journal is not None
                suites.go(session.journal, session.threads)
                continue
            session.handle(event, display)
            if event["event"] == "result":
                suites.stored()
    signalled = stopped[0] if stopped else 0
    if session.refusal:
        return _refused(console, session.refusal)
    if session.journal is None and not signalled:
        print(suites.tail(), file=sys.stderr)
        return _refused(
            console, f"the suites ended before they measured anything: {suites.failure}"
        )
    if session.journal is None or not suites.failure:
        return session.close(suites.files, "", signalled)
    unfinished = f"{suites.failure}; see {session.journal.run_dir}/pytest.log; --resume continues"
    return session.close(suites.files, unfinished, signalled, status="KILLED")


def _refused(console: Console, reason: str) -> int:
    refuse(console, reason)
    return REFUSED


@contextlib.contextmanager
def stopping(end: Callable[[], object]) -> Iterator[list[int]]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the measurement; results so far are written as usual.

    Args:
        end: called at each signal.

    Yields:
        A list that gets the number of each signal.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        end()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C insists

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    before = {n: h for n, h in handlers.items() if h is not signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
