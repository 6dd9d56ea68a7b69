"""The structure of the project: what is public, what is light, which way imports point."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import make_url

import danon
from danon.tracking import store

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "BaseAttention",
    "DALA",
    "MSRA",
    "SuperHybrid",
    "UCSA",
    "__version__",
    "create_dala_model",
    "create_msra_model",
    "create_super_hybrid_model",
    "create_ucsa_model",
}
OPTIONAL = {
    "flash_attn",
    "matplotlib",
    "mlflow",
    "optuna",
    "pandas",
    "plotly",
    "pyarrow",
    "pytest",
    "rich",
    "scipy",
    "transformers",
    "typer",
    "xformers",
}
EVERY_PUBLIC_NAME = "import danon; [getattr(danon, name) for name in danon.__all__]"


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def python(code: str) -> str:
    """Run code in a fresh interpreter that imports this checkout, and return what it prints."""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def optional_imports(code: str) -> set[str]:
    """Return the optional packages that code imports and torch alone does not."""
    printed = python(
        f"import sys, torch; before = set(sys.modules); {code}\nprint(*set(sys.modules) - before)"
    )
    return OPTIONAL & set(printed.split())


def test_public_names() -> None:
    assert set(danon.__all__) == PUBLIC
    assert set(dir(danon)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(danon, name) is not None
    assert danon.MSRA.__module__ == "danon.attention.msra.layer"
    with pytest.raises(AttributeError, match="no attribute 'MSRAA'"):
        danon.MSRAA  # noqa: B018


def test_fresh_memory_is_hostile() -> None:
    assert torch.empty(4).isnan().all()
    assert torch.empty(4, dtype=torch.bfloat16).isnan().all()


def test_no_optional_package_is_imported() -> None:
    assert optional_imports(EVERY_PUBLIC_NAME) == set()


def test_an_optional_import_is_noticed() -> None:
    assert optional_imports("import danon, rich") == {"rich"}


def test_import_takes_less_than_1_5_s_beyond_torch() -> None:
    # CPU time: a busy neighbour does not count.
    seconds = python(
        "import time, torch; start = time.process_time(); "
        f"{EVERY_PUBLIC_NAME}; print(time.process_time() - start)"
    )
    assert float(seconds) < 1.5


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache", cwd=root)


def test_import_arrows_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_import_arrow_is_noticed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("danon", "suites", "baselines", "gate_validation"):
        shutil.copytree(ROOT / name, tmp_path / name)
    wrong = {
        "danon/attention/msra/layer.py": "import danon.attention.dala.layer",
        "danon/measure/timing.py": "import mlflow",
        "danon/cli/main.py": "import suites.profiles",
        "danon/models/state.py": "import transformers",
        "danon/runs/case.py": "import baselines.sdpa",
    }
    for file, line in wrong.items():
        with (tmp_path / file).open("a") as source:
            source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "Contracts: 0 kept, 4 broken." in done.stdout, done.stdout
    for upward in ("danon.cli is not allowed to import suites", "danon.runs is not allowed to"):
        assert upward in done.stdout


def test_no_module_imports_itself_by_way_of_others() -> None:
    import grimp
    import networkx

    graph = grimp.build_graph("danon", "suites", "baselines", "gate_validation", cache_dir=None)
    arrows = networkx.DiGraph(
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    )
    circles = [sorted(c) for c in networkx.strongly_connected_components(arrows) if len(c) > 1]
    assert circles == []


def snippets(text: str) -> list[tuple[int, str]]:
    """Line number and source of each python block of a Markdown text."""
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start()) + 2, block[1]) for block in blocks]


def test_snippets_are_found() -> None:
    text = "Say\n```python\na = 1\n```\n```bash\nls\n```\n```python\nb\n\nc\n```\n"
    assert snippets(text) == [(3, "a = 1\n"), (9, "b\n\nc\n")]


README = snippets((ROOT / "README.md").read_text(encoding="utf-8"))


IN_FORKS = """
import os, sys, traceback
import torch
for source in {sources!r}:
    if process := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        continue
    os.dup2(2, 1)
    try:
        exec(source, {{"__name__": "__main__"}})
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
"""
"""Prints the exit status of each source, which runs in a fork of a process that has torch."""


@pytest.fixture(scope="module")
def snippet_runs() -> tuple[list[str], str]:
    """Return the exit statuses of README's snippets and of a wrong one, and what they print."""
    sources = [*(source for _, source in README), "a_name_that_is_not_there"]
    done = run(sys.executable, "-u", "-c", IN_FORKS.format(sources=sources))
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize("number", range(len(README)), ids=[f"line-{n}" for n, _ in README])
def test_readme_snippet_runs(number: int, snippet_runs: tuple[list[str], str]) -> None:
    statuses, said = snippet_runs
    assert statuses[number] == "0", said


def test_snippet_that_raises_is_noticed(snippet_runs: tuple[list[str], str]) -> None:
    statuses, said = snippet_runs
    assert len(statuses) == len(README) + 1 and statuses[-1] == "1"
    assert "NameError: name 'a_name_that_is_not_there' is not defined" in said


@pytest.fixture(scope="session")  # nox refuses two sessions of one name
def noxfile() -> Any:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("given", ["", "http://127.0.0.1:5000", "sqlite:////else%3Fwhere/m.db"])
def test_the_ui_opens_what_bench_and_tune_write(noxfile: Any, tmp_path: Path, given: str) -> None:
    place = tmp_path / "50%20 of? it#1"
    (place / ".git").mkdir(parents=True)
    known = {**os.environ, "MLFLOW_TRACKING_URI": given, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", noxfile.ADDRESSES],
        cwd=place,
        env=known,
        capture_output=True,
        text=True,
        check=True,
    )
    uri, studies, file = done.stdout.splitlines()
    assert make_url(studies).database == file
    if given.startswith("sqlite"):
        assert (uri, file) == (given, "/else?where/optuna.db")
    else:
        assert file == str(place / ".mlflow" / "optuna.db")
        assert uri == given or make_url(uri).database == str(place / ".mlflow" / "mlflow.db")


def test_the_ui_prints_the_page_that_lists_benches(
    noxfile: Any, sqlite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(noxfile.PAGE, {})
    client = store.connect(sqlite)
    experiment = client.get_experiment_by_name("danon/bench").experiment_id
    assert capsys.readouterr().out == f"#/experiments/{experiment}/runs\n"
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.danon", "{}")
    exec(noxfile.PAGE, {})  # the columns of a recorded bench
    said = capsys.readouterr().out
    assert said == f"#/experiments/{experiment}/runs?viewStateShareKey=danon\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "http://127.0.0.1:5000"),
        (["--port", "5001"], "http://127.0.0.1:5001"),
        (["-p", "5001", "--host=0.0.0.0"], "http://127.0.0.1:5001"),
        (["--port=5002", "--host", "lab", "--workers", "2"], "http://lab:5002"),
    ],
)
def test_address_of_the_ui(noxfile: Any, arguments: list[str], expected: str) -> None:
    assert noxfile.ui_address(arguments) == expected


class FakeSession:
    """Notes what it is to run; an environment that it makes has this Python."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, *command: str, **_: object) -> None:
        self.ran.append(command[2] if command[1] == "-m" else command[0])
        if "virtualenv" in command:
            self.ran[-1] += " --clear" * ("--clear" in command)
            python = Path(command[-1]) / "bin" / "python"
            shutil.rmtree(command[-1] if "--clear" in command else "/nowhere", ignore_errors=True)
            python.parent.mkdir(parents=True, exist_ok=True)
            if not python.exists():
                python.symlink_to(sys.executable)


def test_an_environment_that_was_moved_or_lost_its_python_is_made_anew(
    noxfile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(root: Path) -> list[str]:
        monkeypatch.setattr(noxfile, "ROOT", root)
        monkeypatch.setattr(noxfile, "ENVIRONMENT", root / ".nox" / "danon")
        monkeypatch.setattr(noxfile, "BIN", root / ".nox" / "danon" / "bin")
        session = FakeSession()
        noxfile.install(session, "all")
        return session.ran

    first, anew = tmp_path / "first", ["virtualenv --clear", "pip"]
    first.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (first / name).write_text("")
    assert installed(first) == anew
    assert installed(first) == []
    (first / "constraints.txt").write_text("torch==2.13.0")
    assert installed(first) == ["virtualenv", "pip"]  # keeps what it has
    assert installed(first) == []
    shutil.copytree(first, tmp_path / "copied", symlinks=True)
    assert installed(tmp_path / "copied") == anew
    assert installed(first) == []
    moved = first.rename(tmp_path / "moved")
    assert installed(moved) == anew
    assert installed(moved) == []
    python = moved / ".nox" / "danon" / "bin" / "python"
    python.unlink()
    python.symlink_to(tmp_path / "gone")
    assert installed(moved) == anew
    assert installed(moved) == []


def test_changelog_has_unreleased_changes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)


def test_wheel_carries_suites_baselines_tuned_settings_and_reference_runs(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("danon-*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    bundled = [p.relative_to(ROOT) for d in ("suites", "baselines") for p in ROOT.glob(f"{d}/*.py")]
    assert bundled
    assert carried >= {f"danon/_bundle/{path.as_posix()}" for path in bundled}
    for folder, pattern in (("tuned", "*.json"), ("reference", "*/run.json")):
        kept = {p.relative_to(ROOT / "results") for p in ROOT.glob(f"results/{folder}/{pattern}")}
        assert kept and carried >= {f"danon/_bundle/{path.as_posix()}" for path in kept}
    runs = {Path(name).name for name in carried if name.startswith("danon/_bundle/reference/")}
    assert runs == {"run.json", "cases.jsonl"}
    assert carried >= {
        "danon/py.typed",
        "danon/config/base.py",
        "danon/attention/hybrid/measured.json",
        "danon/evaluation/lookup_model.pt",
        "danon/report/template/report.html",
    }
    dist_info = f"danon-{danon.__version__}.dist-info"
    assert {name.split("/")[0] for name in carried} == {"danon", dist_info}
    assert not [name for name in carried if name.endswith(".pyc") or "gate_validation" in name]
