"""The gate proves that each side loads its own code, and makes that work where it can."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from gate_workspaces import workspace_of
from repositories import MINE, git

import danon
from danon.gate import provenance
from danon.gate.checkout import CheckoutError, Repository
from danon.gate.exact_metrics import exact_metrics_of
from danon.gate.worker_client import ForeignError, Side, WorkerClient, WorkerError
from danon.runs.case import Case
from danon.tracking import store

CASE = Case("speed", "MyAttention", 128, "float32", "forward")
THIN = """
from {package}.core import MyAttention as Core

class MyAttention(Core):
    pass
"""


def misplaced(root: Path, repository: Path, allowed: Sequence[Path]) -> str:
    return provenance.misplaced(list(sys.modules), root, repository, allowed)


@pytest.fixture
def editable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder on the path of every Python that is started, as an editable install does."""
    folder = tmp_path / "original" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    )
    return folder


def package(folder: Path, name: str = "mypkg", work: int = 1) -> None:
    """Write a package with an attention that inherits from one in another of its modules."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").touch()
    (folder / name / "core.py").write_text(MINE.format(work=work))
    (folder / name / "attn.py").write_text(THIN.format(package=name))


def flops(root: Path, target: str, inputs: Path, repository: Path | None = None) -> float:
    """Which code was loaded: one of twice the work has twice the operations."""
    side = Side("head", root, (target,), repository)
    with WorkerClient(side, inputs, root.parent / "log") as worker:
        worker.check_attention("MyAttention")
        worker.request("prepare", case=asdict(CASE), name="a", seed=1)
        found: float = worker.request("exact_metrics", name="a")["flops"]
        worker.verify("a")
    return found / (2 * 2 * 4 * 128 * 128 * 64)


class TestLayouts:
    """Repositories whose code does not lie where danon's own does."""

    def test_src_layout_that_is_installed_editable(
        self, editable: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        package(editable, work=1)  # as in the folder that the user works in
        package(tmp_path / "head" / "src", work=2)
        assert flops(tmp_path / "head", "src/mypkg/attn.py:MyAttention", gate_inputs) == 2

    @pytest.mark.parametrize("name", ["baselines", pytest.param("suites", marks=pytest.mark.slow)])
    def test_package_with_the_name_of_one_of_danon_s(
        self, name: str, tmp_path: Path, gate_inputs: Path
    ) -> None:
        root = tmp_path / "head"
        package(root, name, work=2)
        side = Side("head", root, (f"{name}/attn.py:MyAttention",))
        with WorkerClient(side, gate_inputs, tmp_path / "log") as worker:
            worker.check_attention("MyAttention")
            assert {"sdpa", "longformer", "MyAttention"} <= set(worker.attentions)
            worker.request("prepare", case=asdict(CASE), name="a", seed=1)
            assert (
                worker.request("exact_metrics", name="a")["flops"] == 2 * 2 * 2 * 4 * 128 * 128 * 64
            )

    @pytest.mark.slow
    def test_files_named_like_standard_library_modules(
        self, tmp_path: Path, gate_inputs: Path
    ) -> None:
        root = tmp_path / "head"
        package(root, work=1)
        for name in ("statistics", "torch", "random"):
            (root / f"{name}.py").write_text("raise RuntimeError('not this one')")
        assert flops(root, "mypkg/attn.py:MyAttention", gate_inputs) == 1


class TestRefusals:
    """Where a side would be the same code as the other."""

    def test_module_of_the_checkout_that_another_folder_provides(
        self, editable: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        """A copied repository whose environment is of the original, in an unusual layout."""
        package(editable, work=1)
        root = tmp_path / "head"
        package(root / "lib", work=2)
        (root / "bench.py").write_text(THIN.format(package="mypkg"))
        with pytest.raises(WorkerError) as refused:
            flops(root, "bench.py:MyAttention", gate_inputs)
        said = str(refused.value)
        assert str(editable / "mypkg") in said and str(root / "lib" / "mypkg") in said
        assert "both sides would be the same code" in said and "PYTHONPATH" in said

    def test_foreign_module_that_is_imported_in_a_call(
        self, editable: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        package(editable)
        root = tmp_path / "head"
        package(root / "lib")
        late = "import mypkg.core\n        for _ in"
        (root / "bench.py").write_text(MINE.format(work=1).replace("for _ in", late))
        workspace = workspace_of(root, "bench.py:MyAttention", inputs=gate_inputs, scratch=tmp_path)
        side, models = workspace.side("head"), workspace.committed_models
        with pytest.raises(ForeignError, match=r"head: mypkg\S* is loaded from .*/original/lib/"):
            exact_metrics_of(workspace, side, [CASE], models)

    @pytest.mark.slow
    def test_module_from_a_folder_of_the_repository_s_own_path(
        self, editable: Path, tmp_path: Path, gate_inputs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(editable))
        package(editable, work=1)
        root = tmp_path / "head"
        package(root / "lib", work=2)
        (root / "bench.py").write_text(THIN.format(package="mypkg"))
        found = flops(root, "bench.py:MyAttention", gate_inputs, repository=editable.parent)
        assert found == 2

    def test_attention_of_danon_in_another_repository(
        self, tmp_path: Path, gate_inputs: Path
    ) -> None:
        root = tmp_path / "head"
        package(root)
        case = Case("speed", "msra", 128, "float32", "forward")
        workspace = workspace_of(root, inputs=gate_inputs, scratch=tmp_path)
        with pytest.raises(ForeignError, match=r"head: msra comes from .*danon.*--attention"):
            exact_metrics_of(workspace, workspace.side("head"), [case], workspace.new_models)

    def test_commit_of_danon_with_an_older_layout(self, tmp_path: Path, gate_inputs: Path) -> None:
        root = tmp_path / "base"
        (root / "danon" / "attention").mkdir(parents=True)
        (root / "danon" / "__init__.py").touch()
        with pytest.raises(
            WorkerError, match=r"base: .*no danon/attention/streaming.py: .* present layout"
        ):
            WorkerClient(Side("base", root), gate_inputs, tmp_path / "log")

    @pytest.mark.slow
    def test_class_from_a_file_outside_the_checkout(
        self, editable: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        (editable / "elsewhere.py").write_text(MINE.format(work=1))
        root = tmp_path / "head"
        root.mkdir()
        (root / "mine.py").write_text("from elsewhere import MyAttention")
        with pytest.raises(ForeignError, match=rf"MyAttention comes from {editable}/elsewhere.py"):
            flops(root, "mine.py:MyAttention", gate_inputs)


class TestProvenance:
    """The rules, without a process."""

    @pytest.fixture
    def loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """Load a package from another folder than the checkout, and yield that folder."""
        package(tmp_path / "other")
        monkeypatch.syspath_prepend(str(tmp_path / "other"))
        importlib.import_module("mypkg.core")
        yield tmp_path / "other"
        for name in ("mypkg", "mypkg.core"):
            del sys.modules[name]

    def test_module_is_misplaced_only_if_the_checkout_has_it(
        self, loaded: Path, tmp_path: Path
    ) -> None:
        root, own = tmp_path / "root", [Path(danon.__file__).parents[1]]
        root.mkdir()
        (root / "core.py").touch()  # another file of that name
        assert misplaced(root, root, own) == ""
        package(tmp_path / "with" / "deep" / "down")
        found = misplaced(tmp_path / "with", tmp_path / "with", own)
        assert found.startswith("mypkg") and f"{loaded}/mypkg" in found and "/deep/down/" in found

    def test_module_from_the_repository_is_misplaced(self, loaded: Path, tmp_path: Path) -> None:
        root, own = tmp_path / "checkout", [Path(danon.__file__).parents[1]]
        root.mkdir()
        found = misplaced(root, tmp_path, own)
        assert str(root / "other" / "mypkg") in found

    def test_class_with_a_base_class_of_the_checkout_is_its_own(
        self, loaded: Path, tmp_path: Path
    ) -> None:
        core = sys.modules["mypkg.core"].MyAttention
        mixed = type("Mixed", (core,), {"__module__": "nowhere"})
        assert (
            provenance.foreign_source(core, loaded)
            == provenance.foreign_source(mixed, loaded)
            == ""
        )
        assert provenance.foreign_source(core, tmp_path / "root") == f"{loaded}/mypkg/core.py"

    def test_import_roots(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root, repository = tmp_path / "root", tmp_path / "theirs"
        for folder in (root / "deep" / "down", root / "src", root / "tools", repository / "tools"):
            package(folder)
        monkeypatch.syspath_prepend(str(repository / "tools"))
        target = "deep/down/mypkg/attn.py:MyAttention"
        found = provenance.import_roots(root, [target, "alone.py:A"], repository)
        assert found == [root, root / "src", root / "deep" / "down", root / "tools"]

    def test_danon_from_elsewhere_than_the_checkout_is_misplaced(self, tmp_path: Path) -> None:
        shutil.copytree(
            Path(danon.__file__).parent, tmp_path / "danon", ignore=shutil.ignore_patterns("*.pt")
        )
        assert "danon" in misplaced(tmp_path, tmp_path, [])


class TestLinks:
    """Symbolic links that git tracks."""

    def test_links_lead_where_they_lead_in_the_repository(
        self, repository: Path, tmp_path: Path
    ) -> None:
        shared = tmp_path / "shared"
        shared.mkdir()
        (shared / "data").write_text("theirs")
        (repository / "deep").mkdir()
        links = {
            "out": "../shared/data",
            "absolute": str(shared / "data"),
            "deep/up": "../../shared/data",
            "in": "mine.py",
            "deep/in": "../mine.py",
            "round": f"../{repository.name}/mine.py",
            "full": str(repository / "mine.py"),
            "dangling": "/nowhere/at/all",
        }
        for name, target in links.items():
            (repository / name).symlink_to(target)
        git(repository, "add", ".")
        git(repository, "commit", "-m", "links")
        (repository / "mine.py").write_text("of the working tree")
        root = Repository(repository).base("HEAD", tmp_path / "base").root
        for name in ("out", "absolute", "deep/up"):
            assert (root / name).read_text() == "theirs"
        for name in ("in", "deep/in", "round", "full"):
            assert (root / name).resolve() == (root / "mine.py").resolve()
        assert (root / "dangling").is_symlink()

    @pytest.mark.slow
    def test_target_that_is_a_link_out_of_the_repository(
        self, tmp_path: Path, gate_inputs: Path
    ) -> None:
        root = tmp_path / "head"
        root.mkdir()
        (tmp_path / "mine.py").write_text(MINE.format(work=1))
        (root / "mine.py").symlink_to("../mine.py")
        with pytest.raises(ForeignError, match=f"{tmp_path}/mine.py"):
            flops(root, "mine.py:MyAttention", gate_inputs)


class TestMessages:
    """Messages about git and MLflow."""

    def test_repository_of_another_user(
        self, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        with pytest.raises(CheckoutError) as refused:
            Repository(repository)
        assert str(refused.value) == (
            f"git does not trust {repository}, which belongs to another user: "
            f"git config --global --add safe.directory {repository}"
        )

    def test_user_without_a_name(
        self, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
        found = Repository(repository)
        assert found.user == f"uid {os.getuid()}"
        git(repository, "config", "user.useConfigOnly", "true")  # as git does for such a uid
        (repository / "mine.py").write_text("changed")
        assert found.head(tmp_path / "head", dirty=True).subject == "with changes"

    def test_user_without_a_home(self, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Importing MLflow asks for one."""

        class Homeless(ModuleType):
            def __getattr__(self, name: str) -> object:
                raise RuntimeError("Could not determine home directory.")

        monkeypatch.setitem(sys.modules, "mlflow", Homeless("mlflow"))
        with pytest.raises(store.StoreError, match=r"Could not .*home directory.*: set HOME"):
            store.connect(sqlite)
