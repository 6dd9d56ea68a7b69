"""Trained models: stored with the run, registered once, identical when loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.discovery import discover
from danon.bench.suite import planned_cases
from danon.config import AttentionConfig
from danon.evaluation.model_saver import ModelSaver
from danon.evaluation.small_model import build_small_model
from danon.evaluation.trained_evaluator import TrainedModelEvaluator
from danon.models import Backbone
from danon.processes.interpreter import bundle
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.runs.saved_model import SavedModel
from danon.tracking import store
from danon.tracking.bench_recorder import Recorder, upload
from suites.profiles import PROFILES

ROOT = Path(__file__).parents[2]
discover((), ())

# Where only danon and what is installed can be imported, as beside a wheel.
ELSEWHERE = """
import importlib.util, pathlib, sys
sys.path = [p for p in sys.path if not (pathlib.Path(p) / "suites").is_dir()]
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("suites") is importlib.util.find_spec("baselines") is None
import mlflow, torch
torch.set_num_threads(1)
for uri in sys.argv[2:]:
    model = mlflow.pytorch.load_model(uri)
    ids = torch.arange(60)[None] % model.config.vocab_size
    print(uri, model(ids).detach().numpy().tobytes().hex())
    assert not model.training
"""


def loaded(tmp_path: Path, *uris: str) -> dict[str, str]:
    """Return the logits of models loaded in a fresh process, in hexadecimal."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "danon").symlink_to(ROOT / "danon")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(site), *uris],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def info_of(run_id: str) -> RunInfo:
    return replace(RunInfo.capture("smoke", 0, "danon bench", {"cpu": "x"}), run_id=run_id)


class Bench:
    """Runs with invented trained models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def journal(self, run_id: str, *values: float, suite: str = "recall", **about: Any) -> Journal:
        """Return a finished run with a model of "msra" for each value."""
        journal = Journal.create(self.folder, info_of(run_id))
        task, metric = ("mqar", "accuracy") if suite == "recall" else ("code", "bits_per_byte")
        for number, value in enumerate(values):
            case = Case(suite, f"msra{number or ''}", 64, "float32", "training", task=task)
            journal.append(CaseResult(case, "measured", metrics={metric: value, "seeds": 1.0}))
            known = {
                "plan": "p",
                "train_tokens": 100,
                "seed": 0,
                "learning_rate": 0.1,
                "torch": "2.0",
                "requirements": ("danon==0.1.0",),
                **about,
            }
            SavedModel(
                suite=suite,
                attention=case.attention,
                task=task,
                length=64,
                metric=metric,
                value=value,
                **known,
            ).write(journal.run_dir, weights)
        journal.set_status("FINISHED")
        return journal

    def record(self, run_id: str, *values: float, **about: Any) -> str:
        return upload(self.journal(run_id, *values, **about).run_dir)


def weights(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "model.pth").write_bytes(b"weights")


@pytest.fixture
def bench(tmp_path: Path, sqlite: str) -> Bench:
    return Bench(tmp_path / "runs")


def versions(name: str = "danon-msra-mqar") -> dict[str, dict[str, str]]:
    """Return run -> tags of its version, and the targets of the aliases."""
    client = store.connect(store.tracking_uri())
    found = client.search_model_versions(f"name = '{name}'")
    runs = [version.tags["danon.run_id"] for version in found]
    assert len(runs) == len(set(runs)), "registered twice"
    return {version.tags["danon.run_id"]: version.tags for version in found}


def aliased(alias: str, name: str = "danon-msra-mqar") -> str:
    client = store.connect(store.tracking_uri())
    return client.get_model_version_by_alias(name, alias).tags["danon.run_id"]


# --- saved with the run


def test_model_is_written_as_a_whole(tmp_path: Path) -> None:
    """Kill a process while it writes a second model: the first must stay."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from danon.runs.saved_model import SavedModel\n"
        "def fill(folder):\n"
        "    (folder / 'half').write_text('')\n"
        "    if one.task == 'b': os.kill(os.getpid(), signal.SIGKILL)\n"
        "for task in 'ab':\n"
        "    one = SavedModel(suite='recall', attention='x', task=task, length=1, plan='',\n"
        "               metric='', train_tokens=1, seed=0, learning_rate=0.1, value=0.5,\n"
        "               torch='', requirements=('danon==1',))\n"
        "    one.write(Path(sys.argv[1]), fill)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    ((saved, folder),) = SavedModel.all(tmp_path)
    assert saved.task == "a" and saved.requirements == ("danon==1",)
    assert {f.name for f in folder.iterdir()} == {"half", "about.json"}
    replace(saved, task="b").write(tmp_path, weights)  # and once more over it
    replace(saved, task="b").write(tmp_path, weights)
    assert [k.task for k, _ in SavedModel.all(tmp_path)] == ["a", "b"]
    assert not list((tmp_path / "models").glob(".*"))


def some_case(attention: str) -> tuple[Case, Any]:
    profile = PROFILES["smoke"]
    cases = [c for c in planned_cases(profile, (attention,), "cpu") if c.suite == "recall"]
    return cases[-1], profile.plan(cases[-1])


def test_model_that_cannot_be_stored(tmp_path: Path) -> None:
    class Here(BaseAttention):
        def __init__(self, config: AttentionConfig) -> None:
            super().__init__()
            self.setup_attention(config)

    case, plan = some_case("sdpa")
    model = Backbone(plan.shape.config(), lambda: Here(plan.shape.config()))
    said: list[str] = []
    ModelSaver(tmp_path, said.append).save(
        case, plan, model, seed=0, learning_rate=0.1, metric="accuracy", value=0.5
    )
    assert len(said) == 1 and said[0].startswith("the model of sdpa on mqar is not kept: ")
    assert "Here" in said[0] and not list(SavedModel.all(tmp_path))


def test_plans_with_equal_examples_and_other_time_limits() -> None:
    _, plan = some_case("sdpa")
    assert replace(plan, cap_s=1e9).digest == plan.digest
    assert replace(plan, rates=(1e-3,)).digest != plan.digest
    assert len({p.digest for p in PROFILES["quick"].plans if p.suite != "pretrained"}) == 2


def test_measuring_process_does_not_import_mlflow() -> None:
    code = "import sys, danon.bench.runner, suites.conftest; print('mlflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_refusal_of_a_name_that_is_no_path() -> None:
    for name in ("mine/v2", "mine:v2", ""):
        with pytest.raises(ValueError, match="a name has letters"):
            registry.register(name)


# --- registered


def test_origin_and_figures_of_a_version(bench: Bench) -> None:
    assert bench.record("r1", 0.75).endswith("; 1 trained models are registered")
    (tags,) = versions().values()
    wanted = {
        "danon.profile": "smoke",
        "danon.plan": "p",
        "danon.value": "0.75",
        "danon.requirements": "danon==0.1.0",
        "metric.seeds": "1.0",
    }
    assert wanted.items() <= tags.items() and tags["danon.commit"]
    assert json.loads(tags["danon.fingerprint"]) == {"cpu": "x"}
    client = store.connect(store.tracking_uri())
    (version,) = client.search_model_versions("name = 'danon-msra-mqar'")
    assert version.description.startswith("msra in a small model, trained on mqar: accuracy 0.75")
    assert client.get_run(version.run_id).data.tags["danon.attention"] == "msra"


def test_champion_of_a_plan(bench: Bench) -> None:
    for run, value in (("r1", 0.5), ("r4", 0.8), ("r2", 0.7), ("r3", 0.8), ("r5", 0.8)):
        bench.record(run, value)
    assert aliased("champion") == "r5" and aliased("baseline") == "r1"
    for run, bits in (("t1", 2.5), ("t2", 2.1), ("t3", 2.3)):
        bench.record(run, bits, suite="language")
    assert aliased("champion", "danon-msra-code") == "t2"


def test_champion_of_another_plan(bench: Bench) -> None:
    bench.record("r1", 0.5)
    bench.record("r2", 0.9, plan="smaller", train_tokens=50)
    bench.record("r3", 0.9, plan="other")
    assert aliased("champion") == "r1"
    bench.record("r4", 0.1, plan="larger", train_tokens=200)
    assert aliased("champion") == "r4"
    bench.record("r5", 0.9)
    assert aliased("champion") == "r4" and aliased("baseline") == "r1"


def test_moved_aliases_and_foreign_models(bench: Bench) -> None:
    bench.record("r1", 0.5)
    client = store.connect(store.tracking_uri())
    theirs = client.create_model_version("danon-msra-mqar", str(bench.folder), None)
    for alias in ("champion", "baseline"):
        client.set_registered_model_alias("danon-msra-mqar", alias, theirs.version)
    bench.record("r2", 0.9)
    aliases = client.get_registered_model("danon-msra-mqar").aliases
    assert {int(number) for number in aliases.values()} == {int(theirs.version)}


def test_registration_repeated_after_a_dead_store(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    real, calls = MlflowClient.create_model_version, []

    def dies(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MlflowException("connection refused")
        return real(*args, **options)

    journal = bench.journal("r1", 0.5, 0.6, 0.7)
    recorder = Recorder(journal.info(), journal)
    recorder.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", dies)
        said = recorder.finish("FINISHED")
    assert said.startswith("Recorded 3 cases in MLflow")
    assert "its models are not registered" in said and said.endswith("again: connection refused")
    assert f"danon record {journal.run_dir}" in said
    assert upload(journal.run_dir).endswith("; 2 trained models are registered")
    assert upload(journal.run_dir).endswith("mlflow.db")
    for number in ("", "1", "2"):
        assert set(versions(f"danon-msra{number}-mqar")) == {"r1"}


def test_store_without_a_model_registry(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(MlflowClient, "log_artifacts", refuse)
    said = bench.record("r1", 0.5)
    assert said.startswith("1 of 1 cases were new") and said.endswith(": read-only file system")
    assert not versions()


def test_model_without_figures(bench: Bench) -> None:
    journal = bench.journal("r1", 0.5)
    lines = journal.run_dir / "cases.jsonl"
    text = lines.read_text()
    lines.write_text("")  # killed between the model and the journal
    assert "registered" not in upload(journal.run_dir)
    lines.write_text(text)
    assert upload(journal.run_dir).endswith("; 1 trained models are registered")


RECORD = """
import os, sys, traceback
import mlflow.tracking
from danon.tracking.bench_recorder import upload
for run in sys.argv[1:]:
    if not os.fork():
        status = 1
        try:
            print(upload(run), flush=True)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
sys.exit(any([os.wait()[1] for _ in sys.argv[1:]]))
"""
"""Records runs at one time, each in a fork of a process that has MLflow."""


def test_simultaneous_registrations(bench: Bench) -> None:
    runs = [bench.journal(f"r{n}", 0.5 + n / 10, 0.9 - n / 10).run_dir for n in range(2)]
    done = subprocess.run(
        [sys.executable, "-c", RECORD, *map(str, runs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; 2 trained models are registered\n") == 2, done.stdout
    assert set(versions()) == set(versions("danon-msra1-mqar")) == {"r0", "r1"}
    assert aliased("champion") == "r1" and aliased("champion", "danon-msra1-mqar") == "r0"


# --- loaded back

OWN = """
from danon import BaseAttention

class Mine(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        return self.compute_attention(q, k).softmax(-1) @ v
"""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    """Return an attention of a user, from a file."""
    # No other test imports a file of this name: the second one is another module.
    file = tmp_path / "registered.py"
    file.write_text(OWN)
    yield registry.load(f"{file}:Mine")
    del registry._TABLE["Mine"]


def test_loaded_model_is_identical(
    bench: Bench, tmp_path: Path, one_thread: None, mine: str
) -> None:
    journal = Journal.create(bench.folder, info_of("r1"))
    trained: dict[str, Tensor] = {}

    class Listens(ModelSaver):
        def save(self, case: Case, plan: Any, model: Backbone, **facts: Any) -> None:
            super().save(case, plan, model, **facts)
            ids = torch.arange(60)[None] % plan.shape.vocabulary
            with torch.no_grad():
                logits = F.linear(model(ids), model.embed.weight)
            trained[f"models:/danon-{case.attention}-{case.task}@champion"] = logits

    said: list[str] = []
    evaluator = TrainedModelEvaluator(PROFILES["smoke"], Listens(journal.run_dir, said.append))
    for case in planned_cases(PROFILES["smoke"], ("ucsa", "local-attention"), "cpu"):
        if (case.attention, case.suite) in (("ucsa", "language"), ("local-attention", "recall")):
            journal.append(evaluator.result(case))
    saver, (case, plan) = Listens(journal.run_dir, said.append), some_case("sdpa")
    saver.save(
        replace(case, attention="Mine"),
        plan,
        build_small_model(mine, plan.shape, 0).eval(),
        seed=0,
        learning_rate=0.1,
        metric="accuracy",
        value=0.5,
    )
    journal.append(CaseResult(replace(case, attention="Mine"), "measured"))
    journal.set_status("FINISHED")
    assert upload(journal.run_dir).endswith("; 3 trained models are registered") and not said
    found = loaded(tmp_path, *trained)
    assert found == {uri: x.numpy().tobytes().hex() for uri, x in trained.items()}
    # What is not installed there brings its code, and names the packages it stands on.
    models = journal.run_dir / "models"
    assert {p.parent.name: {f.name for f in p.iterdir()} for p in models.glob("*/code")} == {
        "local-attention-mqar": {"baselines"},
        "Mine-mqar": {"danon_user_registered.py"},
    }
    assert "local-attention==" in (models / "local-attention-mqar/requirements.txt").read_text()


@pytest.mark.filterwarnings("ignore")  # of MLflow's own
def test_flavor_equals_that_of_mlflow(bench: Bench, tmp_path: Path) -> None:
    import mlflow.pytorch

    bench.record("r1", 0.5)
    case, plan = some_case("sdpa")
    theirs, (ours,) = tmp_path / "theirs", (bench.folder / "r1" / "models").iterdir()
    mlflow.pytorch.save_model(
        build_small_model("sdpa", plan.shape, 0),
        theirs,
        serialization_format="pickle",
        pip_requirements=["danon==0.1.0"],
    )
    flavors = [yaml.safe_load((d / "MLmodel").read_text())["flavors"] for d in (ours, theirs)]
    mine, official = (f["pytorch"] for f in flavors)
    assert mine | {"pytorch_version": torch.__version__} == official
    for folder in (ours, theirs):
        assert {f.name for f in (folder / "data").iterdir()} == {
            "model.pth",
            "pickle_module_info.txt",
        }


# --- the whole way


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_models_of_a_stopped_bench(tmp_path: Path, sqlite: str) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    command = [
        sys.executable,
        "-c",
        "from danon.cli.main import main; main()",
        "bench",
        "--profile",
        "smoke",
        "--suites",
        "recall",
        "--only",
        "sdpa",
        "--attention",
        "mine.py:Mine",
    ]
    environment = {**os.environ, "PYTHONPATH": str(bundle())}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    process = start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(tmp_path.glob("results/runs/*/models/sdpa-mqar/about.json")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    process = start("--resume")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "are registered" in said, said
    (run,) = tmp_path.glob("results/runs/*")
    names = {"danon-sdpa-mqar", "danon-Mine-mqar"}
    assert {name: set(versions(name)) for name in names} == {name: {run.name} for name in names}
    found = loaded(tmp_path, *(f"models:/{name}@champion" for name in sorted(names)))
    assert len(found) == 2
