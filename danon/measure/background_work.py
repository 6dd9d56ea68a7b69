"""Threads and processes that a measured function leaves behind.

What goes on beside a measurement can do a call's work after it has returned, or slow down what it
is compared with.
"""

from __future__ import annotations

import concurrent.futures.thread
import sys
import threading
from dataclasses import dataclass
from typing import Self

__all__ = ["BackgroundWork"]

_COMPILER = "torch/_inductor"
"""In the command of the processes that torch.compile keeps."""
_PROGRESS_BAR = "tqdm_monitor"
"""Name of a thread that wakes every ten seconds to look at progress bars."""
_POOL = concurrent.futures.thread.__file__
"""Where a thread of a pool waits for work."""


@dataclass(frozen=True)
class BackgroundWork:
    """The threads and the child processes of this process at one moment.

    Attributes:
        threads: identifier of a Python thread -> its name.
        processes: identifier of a child process -> its command.
    """

    threads: dict[int, str]
    processes: dict[int, str]

    @classmethod
    def now(cls) -> Self:
        """Collect them, without torch.compile's processes and idle threads of pools."""
        import psutil

        processes = {}
        for child in psutil.Process().children(recursive=True):
            try:
                command = " ".join(child.cmdline()) or child.name()
            except psutil.Error:  # it has ended meanwhile
                continue
            if _COMPILER not in command and child.status() != psutil.STATUS_ZOMBIE:
                processes[child.pid] = command
        frames = sys._current_frames()
        threads = {
            thread.ident: thread.name
            for thread in threading.enumerate()
            if thread.ident in frames
            and frames[thread.ident].f_code.co_filename != _POOL
            and thread.name != _PROGRESS_BAR
        }
        return cls(threads, processes)

    def since(self, before: BackgroundWork) -> str:
        """Return the first new thread and process, in a few words; empty if there is none.

        Args:
            before: an earlier state.
        """
        threads = [self.threads[i] for i in sorted(self.threads.keys() - before.threads.keys())]
        processes = [
            f"{pid} ({self.processes[pid][:60]})"
            for pid in sorted(self.processes.keys() - before.processes.keys())
        ]
        return ", ".join(
            f"a {kind} that goes on after the call: {names[0]}"
            for kind, names in (("thread", threads), ("process", processes))
            if names
        )
