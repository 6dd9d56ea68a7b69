"""The structure of the project: what is public, what is light, which way imports point."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import danon
from danon.experiment import store
from danon.tuning import storage

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "BaseAttention", "DALA", "MSRA", "SuperHybrid", "UCSA", "__version__",
    "create_dala_model", "create_msra_model", "create_super_hybrid_model", "create_ucsa_model",
}  # fmt: skip
OPTIONAL = {
    "flash_attn", "matplotlib", "mlflow", "optuna", "pandas", "plotly", "pyarrow", "pytest",
    "rich", "transformers", "typer", "xformers",
}  # fmt: skip
EVERY_PUBLIC_NAME = "import danon; [getattr(danon, name) for name in danon.__all__]"


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def python(code: str) -> str:
    """What a fresh interpreter prints that imports this checkout."""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def optional_imports(code: str) -> set[str]:
    """The optional packages that code imports and torch alone does not."""
    printed = python(
        f"import sys, torch; before = set(sys.modules); {code}\nprint(*set(sys.modules) - before)"
    )
    return OPTIONAL & set(printed.split())


def test_public_names() -> None:
    assert set(danon.__all__) == PUBLIC
    assert set(dir(danon)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(danon, name) is not None
    assert danon.MSRA.__module__ == "danon.attention.msra"
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
    shutil.copytree(ROOT / "danon", tmp_path / "danon")
    wrong = {
        "attention/msra.py": "import danon.attention.dala, danon.models",
        "measure/case.py": "import mlflow, danon.attention",
        "cli.py": "import suites.speed",
        "models/state.py": "import danon.integrations.transformers",
    }
    for file, line in wrong.items():
        with (tmp_path / "danon" / file).open("a") as source:
            source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "Contracts: 0 kept, 6 broken." in done.stdout, done.stdout


def snippets(text: str) -> list[tuple[int, str]]:
    """Line number and source of each python block of a Markdown text."""
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start()) + 2, block[1]) for block in blocks]


def test_snippets_are_found() -> None:
    text = "Say\n```python\na = 1\n```\n```bash\nls\n```\n```python\nb\n\nc\n```\n"
    assert snippets(text) == [(3, "a = 1\n"), (9, "b\n\nc\n")]


README = snippets((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [s for _, s in README], ids=[f"line-{n}" for n, _ in README])
def test_readme_snippet_runs(source: str) -> None:
    python(source)


def test_the_ui_opens_the_studies_that_tune_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None and spec.loader is not None
    noxfile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noxfile)
    monkeypatch.chdir(ROOT)
    for uri in ("sqlite:////elsewhere/mlflow.db", "http://127.0.0.1:5000", ""):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert storage.default() == f"sqlite:///{noxfile.studies_beside(store.tracking_uri())}"


def test_changelog_has_unreleased_changes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)


def test_wheel_carries_suites_baselines_and_tuned_settings(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("danon-*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    bundled = [p.relative_to(ROOT) for d in ("suites", "baselines") for p in ROOT.glob(f"{d}/*.py")]
    assert bundled
    assert carried >= {f"danon/_bundle/{path.as_posix()}" for path in bundled}
    tuned = {f"danon/_bundle/tuned/{path.name}" for path in ROOT.glob("results/tuned/*.json")}
    assert tuned and carried >= tuned
    assert carried >= {"danon/py.typed", "danon/config.py", "danon/_bundle/suites/teacher.pt"}
    dist_info = f"danon-{danon.__version__}.dist-info"
    assert {name.split("/")[0] for name in carried} == {"danon", dist_info}
    assert not [name for name in carried if name.endswith(".pyc")]
