"""Trained models of a run as versions in MLflow's model registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from danon.report.suite_infos import suite_info
from danon.runs.files import replace_file
from danon.runs.saved_model import SavedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mlflow import MlflowClient

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["make", "register"]

CHAMPION, BASELINE = "champion", "baseline"


def register(
    client: MlflowClient,
    run_dir: Path,
    info: RunInfo,
    results: Sequence[CaseResult],
    run_of: Callable[[CaseResult], str],
) -> int:
    """Make a version of ``danon-<attention>-<task>`` of every model that has its figures.

    The alias ``champion`` is kept on the best version of a plan, and goes from one plan to another
    only if that trains on more tokens. ``baseline`` is given to a first version and not moved.

    Args:
        run_of: id of the MLflow run that a result is recorded in.

    Returns:
        How many versions are new; one that is there already stays as it is.

    Raises:
        Exception: one of store.failures(), when the store has no registry or cannot be written.
    """
    new = 0
    for saved, folder in SavedModel.all(run_dir):
        found = [r for r in results if saved.of(r.case) and r.status == "measured"]
        if not found:
            continue  # the run was killed before
        name, run_id = f"danon-{saved.name}", run_of(found[-1])
        if not client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
            _complete(folder, saved)
            client.log_artifacts(run_id, str(folder), f"models/{saved.task}")
            make(client, name)
            client.create_model_version(
                name,
                f"runs:/{run_id}/models/{saved.task}",
                run_id,
                _tags(saved, found[-1], info),
                description=_words(saved, info),
                await_creation_for=0,
            )
            new += 1
        _give_aliases(client, name)
    return new


def make(client: MlflowClient, name: str) -> None:
    """Register a model that has no version yet, unless somebody has."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _give_aliases(client: MlflowClient, name: str) -> None:
    """Look again after each change: of several benches, the last to look has seen every version."""
    while True:
        aliases = client.get_registered_model(name).aliases
        found = client.search_model_versions(f"name = '{name}'")
        mine = {int(v.version): v.tags for v in found if "danon.plan" in v.tags}
        wanted = {BASELINE: int(aliases.get(BASELINE, min(mine)))}
        best = int(aliases.get(CHAMPION, min(mine)))
        if best in mine:  # or somebody put another model there
            for number, tags in sorted(mine.items()):
                best = number if _beats(tags, mine[best]) else best
            wanted[CHAMPION] = best
        changed = {a: number for a, number in wanted.items() if int(aliases.get(a, 0)) != number}
        if not changed:
            return
        for alias, number in changed.items():
            client.set_registered_model_alias(name, alias, str(number))


def _beats(new: Mapping[str, str], old: Mapping[str, str]) -> bool:
    """Whether a version takes the alias from another; of equals the later run has it."""
    if new["danon.plan"] != old["danon.plan"]:
        return int(new["danon.train_tokens"]) > int(old["danon.train_tokens"])
    judge = suite_info(new["danon.suite"]).judge(new["danon.task"])
    higher = judge is not None and judge.better == "higher"
    mine, theirs = (
        (float(tags["danon.value"]) * (1 if higher else -1), tags["danon.run_id"])
        for tags in (new, old)
    )
    return mine > theirs


def _tags(saved: SavedModel, result: CaseResult, info: RunInfo) -> dict[str, str]:
    """Where a version is from, and the figures that it was accepted with."""
    facts = {**saved.values(), "requirements": " ".join(saved.requirements)}
    return {
        "danon.run_id": info.run_id,
        "danon.commit": info.commit,
        "danon.dirty": str(info.dirty).lower(),
        "danon.profile": info.profile,
        "danon.fingerprint": json.dumps(
            result.place.get("machine", info.fingerprint), sort_keys=True
        ),
        "danon.semantics": result.semantics,
        **{f"danon.{name}": str(value) for name, value in facts.items()},
        **{f"metric.{name}": repr(value) for name, value in result.metrics.items()},
    }


def _words(saved: SavedModel, info: RunInfo) -> str:
    return (
        f"{saved.attention} in a small model, trained on {saved.task}: {saved.metric} "
        f"{saved.value:.4g} at {saved.length} tokens (profile {info.profile}, commit "
        f"{info.commit[:10]}{' with changes' if info.dirty else ''})"
    )


def _complete(folder: Path, saved: SavedModel) -> None:
    """Make it a folder that ``mlflow.pytorch`` loads, without unpickling anything here."""
    from mlflow.models import Model

    code = "code" if (folder / "code").is_dir() else None
    model = Model(metadata=saved.values())
    model.add_flavor("pytorch", model_data="data", pytorch_version=saved.torch, code=code)
    replace_file(folder / "data" / "pickle_module_info.txt", b"pickle")
    replace_file(folder / "requirements.txt", "\n".join((*saved.requirements, "")).encode())
    replace_file(folder / "MLmodel", model.to_yaml().encode())
