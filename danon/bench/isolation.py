"""Isolation of cases: exceptions become rows, changes of the process are undone."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from danon.attention import registry
from danon.console.reasons import located, one_line
from danon.measure.memory_limit import out_of_memory
from danon.measure.process_state import Changes, ProcessState
from danon.measure.torch_settings import SEED
from danon.processes.interruption import Interruption
from danon.runs.case import Case, CaseResult

__all__ = ["Isolation"]


@dataclass
class _Open:
    """A case being measured, the state of the process before it, and its changes."""

    case: Case
    state: ProcessState
    described: dict[str, str] = field(default_factory=dict)


class Isolation:
    """Isolates cases from each other.

    Args:
        on_trace: called with the traceback of a case that raised.
        on_change: called with what an attention changed in the process, in short and in full.

    Attributes:
        needs_new_process: True once a case has left a change that cannot be undone.
    """

    def __init__(
        self,
        on_trace: Callable[[Case, str], object] = lambda case, text: None,
        on_change: Callable[[str, str], object] = lambda key, text: None,
    ) -> None:
        self._on_trace, self._on_change = on_trace, on_change
        self._reported: set[tuple[str, str]] = set()
        self._open: list[_Open] = []
        self.needs_new_process = False

    def outcome(self, case: Case, measure: Callable[[Case], CaseResult]) -> CaseResult:
        """Measure a case; cases that it needs start from the same state of the process.

        Args:
            case: the one to measure.
            measure: returns its outcome, or raises.

        Returns:
            The outcome, with the changes of the process as notes.

        Raises:
            Interruption: the session ends.
        """
        if self._open:
            self._restore(self._open[-1])
        opened = _Open(case, ProcessState())
        self._open.append(opened)
        try:
            result = measure(case)
            result.to_json()  # a configuration may hold what cannot be stored
        except Interruption:
            raise
        except BaseException as error:  # noqa: BLE001  its row says so; the others go on
            result = self._failed(case, error)
        finally:
            self._open.pop()
            self._restore(opened)
        self._check_device(case)
        return (
            replace(result, notes=result.notes | opened.described) if opened.described else result
        )

    def _restore(self, opened: _Open) -> None:
        changes = opened.state.restore()
        if opened.case.task:
            changes.described.pop(SEED, None)  # training sets it
        opened.described |= changes.described
        self._report(opened.case.attention, changes, "the process is replaced")
        self.needs_new_process |= bool(changes.unrestored)

    def prepare(self, attention: str, state: ProcessState) -> None:
        """Undo what the import or the contract check of an attention has changed.

        What cannot be undone would be the same in a new process.

        Args:
            attention: registered name.
            state: state of the process before.
        """
        self._report(attention, state.restore(), "stays for the whole run")

    def _report(self, attention: str, changes: Changes, lasting: str) -> None:
        """Report each change of an attention once.

        Args:
            attention: registered name.
            changes: changes of the process.
            lasting: words for a change that could not be undone.
        """
        for name, words in changes.described.items():
            if (attention, name) not in self._reported:
                self._reported.add((attention, name))
                after = lasting if name in changes.unrestored else "set back"
                key = f"{attention} changed {name}"
                self._on_change(key, f"{key} ({words}): {after}")

    def _failed(self, case: Case, error: BaseException) -> CaseResult:
        self._on_trace(case, "".join(traceback.format_exception(error)))
        shortage = out_of_memory(error)
        reason = shortage or located(error, registry.get(case.attention))
        semantics = registry.get(case.attention).description
        return CaseResult(case, "over budget" if shortage else "failed", reason, semantics)

    def _check_device(self, case: Case) -> None:
        """Replace the process after an illegal access: the GPU would fail every later call."""
        if case.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.needs_new_process = True
            key = f"{case.attention} broke the CUDA context"
            self._on_change(key, f"{key} ({one_line(error)}): the process is replaced")
