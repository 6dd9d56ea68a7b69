"""One case at a time: what it raises becomes its row, what it changes in the process goes back."""

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
    """A case that is being measured, the process as it found it, and what it has changed."""

    case: Case
    state: ProcessState
    described: dict[str, str] = field(default_factory=dict)


class Isolation:
    """Keeps cases from each other.

    Args:
        on_trace: hears the traceback of a case that raised.
        on_change: hears what an attention changed in the process: in short, and in full.

    Attributes:
        needs_new_process: a case has left something that only a new process is without.
    """

    def __init__(
        self,
        on_trace: Callable[[Case, str], object] = lambda case, text: None,
        on_change: Callable[[str, str], object] = lambda key, text: None,
    ) -> None:
        self._on_trace, self._on_change = on_trace, on_change
        self._told: set[tuple[str, str]] = set()
        self._open: list[_Open] = []
        self.needs_new_process = False

    def outcome(self, case: Case, measure: Callable[[Case], CaseResult]) -> CaseResult:
        """Measure a case; it may need others, which find the process as this one found it.

        Returns:
            Its result, with what it changed in the process as notes.

        Raises:
            Interruption: somebody ends the session.
        """
        if self._open:
            self._restore(self._open[-1])
        mine = _Open(case, ProcessState())
        self._open.append(mine)
        try:
            result = measure(case)
            result.to_json()  # a configuration may hold what cannot be stored
        except Interruption:
            raise
        except BaseException as error:  # noqa: BLE001  its row says so; the others go on
            result = self._failed(case, error)
        finally:
            self._open.pop()
            self._restore(mine)
        self._check_device(case)
        return replace(result, notes=result.notes | mine.described) if mine.described else result

    def _restore(self, mine: _Open) -> None:
        changes = mine.state.restore()
        if mine.case.task:
            changes.described.pop(SEED, None)  # training sets it
        mine.described |= changes.described
        self._report(mine.case.attention, changes, "the process is replaced")
        self.needs_new_process |= bool(changes.unrestored)

    def prepare(self, attention: str, state: ProcessState) -> None:
        """Set back what the import or the contract check of an attention has changed.

        What lasts would be so in a new process, too.
        """
        self._report(attention, state.restore(), "stays for the whole run")

    def _report(self, attention: str, changes: Changes, lasting: str) -> None:
        """Say what an attention has changed, once.

        Args:
            lasting: what becomes of what could not be set back.
        """
        for name, words in changes.described.items():
            if (attention, name) not in self._told:
                self._told.add((attention, name))
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
        """After an illegal access a GPU fails every later call of the process."""
        if case.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.needs_new_process = True
            key = f"{case.attention} broke the CUDA context"
            self._on_change(key, f"{key} ({one_line(error)}): the process is replaced")
