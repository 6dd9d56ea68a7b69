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
    """Register a version of ``danon-<attention>-<task>`` for every trained model with figures.

    The alias ``champion`` stays on the best version of a training plan. It moves to another plan
    only if that trains on more tokens. The alias ``baseline`` stays on the first version.

    Args:
        client: client of the store.
        run_dir: folder of the run.
        info: description of the run.
        results: outcomes of its cases.
        run_of: function that returns the id of the MLflow run that records a result.

    Returns:
        Number of new versions; existing ones stay unchanged.

    Raises:
        Exception: one of :func:`danon.tracking.store.failures`, if the store has no registry or
            cannot be written.
    """
    new = 0
    for saved, folder in SavedModel.all(run_dir):
        measured = [r for r in results if saved.of(r.case) and r.status == "measured"]
        if not measured:
            continue  # the run was killed before
        name, run_id = f"danon-{saved.name}", run_of(measured[-1])
        if not client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
            _complete(folder, saved)
            client.log_artifacts(run_id, str(folder), f"models/{saved.task}")
            make(client, name)
            client.create_model_version(
                name,
                f"runs:/{run_id}/models/{saved.task}",
                run_id,
                _tags(saved, measured[-1], info),
                description=_description(saved, info),
                await_creation_for=0,
            )
            new += 1
        _give_aliases(client, name)
    return new


def make(client: MlflowClient, name: str) -> None:
    """Create a registered model, unless it exists.

    Args:
        client: client of the store.
        name: name of the model.

    Raises:
        MlflowException: the store refuses for another reason.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _give_aliases(client: MlflowClient, name: str) -> None:
    """Set the aliases, and repeat until nothing changes: other benches may add versions."""
    while True:
        aliases = client.get_registered_model(name).aliases
        versions = {
            int(version.version): version.tags
            for version in client.search_model_versions(f"name = '{name}'")
            if "danon.plan" in version.tags
        }
        target = {BASELINE: int(aliases.get(BASELINE, min(versions)))}
        best = int(aliases.get(CHAMPION, min(versions)))
        if best in versions:  # else somebody put another model there
            for number, tags in sorted(versions.items()):
                best = number if _beats(tags, versions[best]) else best
            target[CHAMPION] = best
        changed = {a: number for a, number in target.items() if int(aliases.get(a, 0)) != number}
        if not changed:
            return
        for alias, number in changed.items():
            client.set_registered_model_alias(name, alias, str(number))


def _beats(new: Mapping[str, str], old: Mapping[str, str]) -> bool:
    """Return True if a version takes the alias from another; the later run wins a tie."""
    if new["danon.plan"] != old["danon.plan"]:
        return int(new["danon.train_tokens"]) > int(old["danon.train_tokens"])
    judge = suite_info(new["danon.suite"]).judge(new["danon.task"])
    higher = judge is not None and judge.better == "higher"
    new_rank, old_rank = (
        (float(tags["danon.value"]) * (1 if higher else -1), tags["danon.run_id"])
        for tags in (new, old)
    )
    return new_rank > old_rank


def _tags(saved: SavedModel, result: CaseResult, info: RunInfo) -> dict[str, str]:
    """Return the origin of a version and its figures."""
    fields = {**saved.values(), "requirements": " ".join(saved.requirements)}
    return {
        "danon.run_id": info.run_id,
        "danon.commit": info.commit,
        "danon.dirty": str(info.dirty).lower(),
        "danon.profile": info.profile,
        "danon.fingerprint": json.dumps(
            result.place.get("machine", info.fingerprint), sort_keys=True
        ),
        "danon.semantics": result.semantics,
        **{f"danon.{name}": str(value) for name, value in fields.items()},
        **{f"metric.{name}": repr(value) for name, value in result.metrics.items()},
    }


def _description(saved: SavedModel, info: RunInfo) -> str:
    return (
        f"{saved.attention} in a small model, trained on {saved.task}: {saved.metric} "
        f"{saved.value:.4g} at {saved.length} tokens (profile {info.profile}, commit "
        f"{info.commit[:10]}{' with changes' if info.dirty else ''})"
    )


def _complete(folder: Path, saved: SavedModel) -> None:
    """Make a folder loadable by ``mlflow.pytorch``, without unpickling anything here."""
    from mlflow.models import Model

    code = "code" if (folder / "code").is_dir() else None
    model = Model(metadata=saved.values())
    model.add_flavor("pytorch", model_data="data", pytorch_version=saved.torch, code=code)
    replace_file(folder / "data" / "pickle_module_info.txt", b"pickle")
    replace_file(folder / "requirements.txt", "\n".join((*saved.requirements, "")).encode())
    replace_file(folder / "MLmodel", model.to_yaml().encode())
