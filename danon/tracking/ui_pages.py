"""Addresses of the pages of MLflow's web interface that show benches."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import quote

from danon.tracking import store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow import MlflowClient

__all__ = [
    "EXPERIMENT",
    "bench_page",
    "compare_page",
    "ranked_page",
    "run_page",
    "runs_page",
    "shared_views",
]

EXPERIMENT = "bench"
"""Last part of the name of the experiment that has all benches."""
SHARE_KEY = "danon"
VIEW_PREFIX = "mlflow.sharedViewState."
VIEW = f"{VIEW_PREFIX}{SHARE_KEY}"
"""Tag of the experiment with the columns that :func:`runs_page` shows."""
COLUMN_TAGS = ("danon.profile", "danon.commit", "danon.machine")


def runs_page(experiment: str) -> str:
    """Return the list of benches. Without ``/runs`` MLflow opens its page on traces.

    Args:
        experiment: id of the experiment.
    """
    return f"#/experiments/{experiment}/runs?viewStateShareKey={SHARE_KEY}"


def run_page(experiment: str, run: str) -> str:
    """Return the page of one run.

    Args:
        experiment: id of the experiment.
        run: id of the run.
    """
    return f"#/experiments/{experiment}/runs/{run}"


def compare_page(experiment: str, runs: Sequence[str]) -> str:
    """Return the page that compares runs.

    Args:
        experiment: id of the experiment.
        runs: ids of the runs.
    """
    ids, experiments = (json.dumps(x, separators=(",", ":")) for x in (list(runs), [experiment]))
    return f"#/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}"


def ranked_page(experiment: str, run_id: str) -> str:
    """Return the list of the attentions of one bench, with their key figures.

    Args:
        experiment: id of the experiment.
        run_id: id of the invocation.
    """
    return f"#/experiments/{experiment}/runs?viewStateShareKey={run_id}"


def shared_views(run_id: str, columns: Sequence[str], *, ascending: bool) -> dict[str, str]:
    """Return the tags of the experiment that :func:`runs_page` and :func:`ranked_page` refer to.

    MLflow's own button *Share* writes such tags.

    Args:
        run_id: id of the invocation.
        columns: names of metrics, from left to right; the first one sorts the attentions.
        ascending: True if its lowest figure is listed first.
    """
    metrics = [f"metrics.`{name}`" for name in columns]
    state = {"selectedColumns": metrics + [f"tags.`{name}`" for name in COLUMN_TAGS]}
    bench = {
        "selectedColumns": metrics,
        "searchFilter": f"tags.`danon.run_id` = '{run_id}' AND params.attention != ''",
        "orderByKey": metrics[0],
        "orderByAsc": ascending,
    }
    return {VIEW: json.dumps(state), f"{VIEW_PREFIX}{run_id}": json.dumps(bench)}


def bench_page(client: MlflowClient, uri: str) -> str:
    """Return the page that lists the benches of a store; it makes the experiment if needed.

    Args:
        client: client of the store.
        uri: address of the store.
    """
    experiment = store.experiment_id(client, uri, EXPERIMENT)
    page = runs_page(experiment)
    recorded = VIEW in client.get_experiment(experiment).tags
    return page if recorded else page.partition("?")[0]
