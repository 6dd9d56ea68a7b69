"""Wrong command lines: status 2, one line on stderr with the value and what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.main import get_command
from typer.models import OptionInfo
from typer.testing import CliRunner, Result

from danon.bench.command import Options, bench
from danon.cli import options
from danon.cli.app import app
from danon.cli.tune import app as tune_app
from danon.cli.values import integer, number, one_of, parameters, some_of, tokens
from danon.console import exit_status
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo

ROOT = Path(__file__).parents[2]
REQUIRED = {
    "choose": ["--length", "16k", "--memory-gb", "8"],
    "plan": ["--gpus", "8", "--params", "1B"],
    "tune worker": ["--study", "s"],
}
"""Options without which a command is refused for another reason."""
WRONG = "no such value"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="danon")


def check_refused(done: Result, *parts: str) -> None:
    """Check that a command ended as it does for a wrong argument."""
    assert done.exit_code == exit_status.REFUSED, (done.stdout, done.stderr, done.exception)
    assert done.stdout == ""
    assert done.stderr.startswith("danon: ") and len(done.stderr.splitlines()) == 1
    for part in parts:
        assert part in done.stderr


def commands() -> dict[str, Any]:
    """Return the functions of all commands, by what a user types."""
    assert tune_app.registered_callback is not None
    found = {each.callback.__name__: each.callback for each in app.registered_commands}  # type: ignore[union-attr]
    found["tune"] = tune_app.registered_callback.callback
    for each in tune_app.registered_commands:
        assert each.callback is not None
        found[f"tune {each.callback.__name__}"] = each.callback
    return found


def validated_options() -> Iterator[tuple[str, str]]:
    """Yield each command with each of its options that takes only some values."""
    for command, function in commands().items():
        for name, hint in get_type_hints(function, include_extras=True).items():
            for info in get_args(hint)[1:]:
                if isinstance(info, OptionInfo) and info.parser is not None:
                    yield command, f"--{name.replace('_', '-')}"


def option_names(command: str) -> list[str]:
    """Return the options of a command, as a user types them."""
    parser: Any = get_command(app)
    for name in command.split():
        parser = parser.commands[name]
    return [each.opts[0] for each in parser.params if each.opts[0].startswith("--")]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    info = RunInfo.capture("smoke", 0, "danon bench", {"id": "x", "cpu": "test"})
    journal = Journal.create(tmp_path / "runs", info)
    metrics = {"time_s": 1e-3, "time_ratio": 1.0, "speedup": 1.0}
    journal.append(
        CaseResult(Case("speed", "sdpa", 64, "float32", "forward"), "measured", metrics=metrics)
    )
    journal.set_status("FINISHED")
    return journal.run_dir


class TestOptionValues:
    def test_the_walk_meets_every_kind_of_option(self) -> None:
        found = set(validated_options())
        assert {command for command, _ in found} >= {"bench", "choose", "gate", "tune", "doctor"}
        assert {"--profile", "--device", "--engine", "--phase", "--length"} <= {o for _, o in found}
        assert len(found) >= 18

    @pytest.mark.parametrize(("command", "option"), sorted(validated_options()))
    def test_wrong_value(self, command: str, option: str) -> None:
        others = REQUIRED.get(command, [])
        if option in others:
            place = others.index(option)
            others = [*others[:place], *others[place + 2 :]]
        done = run(*command.split(), *others, option, WRONG)
        check_refused(done, f"danon: {option} ", repr(WRONG) if option != "--objective" else WRONG)
        assert "must be" in done.stderr

    @pytest.mark.parametrize("command", commands())
    def test_unknown_option(self, command: str) -> None:
        done = run(*command.split(), "--no-such-option")
        check_refused(done, "--no-such-option", "Options: ", "--help")

    def test_unknown_command(self) -> None:
        check_refused(run("measure"), "'measure'", "Commands: bench, report, ")

    def test_option_without_its_value(self) -> None:
        check_refused(run("bench", "--profile"), "--profile", "requires an argument")

    def test_missing_option(self) -> None:
        done = run("choose", "--memory-gb", "8")
        check_refused(done, "--length is missing; `danon choose --help` explains")

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            ("choose --length 16k --memory-gb -1", ("--memory-gb '-1'", "above 0")),
            ("choose --length 16k --memory-gb 8 --task nope", ("'nope'", "mqar")),
            ("doctor --device cuda", ("--device cuda", "use --device cpu")),
            ("gate --reason x", ("--reason 'x'", "only with --accept")),
            ("gate --time-limit-minutes 0", ("--time-limit-minutes '0'", "above 0")),
            ("calibrate --pairs 1", ("--pairs '1'", "at least 2")),
            ("plan --gpus 8", ("layers is missing", "number of parameters")),
            ("plan --gpus 8 --params 1k", ("1000 parameters", "nearest model has", "within 5%")),
            ("plan --gpus 8 --params 1B --heads 7", ("nearest model",)),
            ("plan --gpus 8 --params 1B --mesh shard=4", ("'shard=4'", "4 ranks, must have 8")),
            ("plan --gpus 8 --params 1B --mesh x=8", ("'x=8'", "data, shard, tensor")),
            (
                "plan --gpus 64 --params 1B --mesh pipeline=64",
                ("pipeline = 64 stages", "at most the 16 layers"),
            ),
            ("plan --gpus 16 --params 1B --mesh tensor=16", ("tensor = 16", "8 key/value heads")),
            ("plan --gpus 3 --params 1B --mesh sequence=3", ("sequence = 3", "length 8192")),
            ("plan --gpus 3 --params 1B --mesh data=3", ("data * shard = 3", "512 sequences")),
            ("plan --gpus 8 --params 1B --batch-tokens 1k", ("batch_tokens = 1024", "8192")),
            ("plan --gpus 37 --params 1B", ("no mesh spreads 16 layers", "37 ranks")),
            ("tune --trials 3", ("--mechanism is missing", "msra", "--attention file.py:Class")),
            ("tune --mechanism a.py:B", ("--mechanism a.py:B", "--attention")),
            ("tune --attention msra", ("--attention msra", "file.py:Class", "--mechanism")),
            ("tune --mechanism msra --attention a.py:B", ("give one of them",)),
            ("tune --mechanism msra --objective speed,nope", ("'nope'", "balanced, speed")),
            ("tune --mechanism msra --address x", ("--address 'x'", "--engine ray")),
            ("bench --address x", ("--address 'x'", "only with --engine ray")),
            ("record nowhere", ("nowhere", "neither run.json nor gate.json")),
            ("report nowhere", ("nowhere", "neither a folder nor a run under")),
            ("report --picture nowhere/a.png", ("--picture nowhere/a.png", "no folder nowhere")),
            ("report --picture a.svg", ("--picture a.svg", ".png")),
            ("report --picture .", ("--picture .", ".png")),
        ],
    )
    def test_refused_arguments(
        self,
        arguments: str,
        parts: tuple[str, ...],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        check_refused(run(*arguments.split()), *parts)
        assert list(tmp_path.iterdir()) == []


class TestLengths:
    @pytest.mark.parametrize(
        ("text", "length"),
        [("16384", 16384), ("16k", 16384), ("128K", 131072), ("1M", 2**20), (" 1m ", 2**20)],
    )
    def test_tokens(self, text: str, length: int) -> None:
        assert tokens(text) == length

    @pytest.mark.parametrize(
        "text", ["0", "0k", "-1", "1.5k", "abc", "", "k", "16kB", "1e4", "\u0661", "9" * 15 + "M"]
    )
    def test_what_is_no_length(self, text: str) -> None:
        with pytest.raises(typer.BadParameter, match="must be a whole number of tokens above 0"):
            tokens(text)

    def test_length_of_a_command(self, tmp_path: Path) -> None:
        answers = [
            run("choose", "--length", text, "--memory-gb", "8", "--results", str(tmp_path))
            for text in ("16k", "16384")
        ]
        assert answers[0].output == answers[1].output != ""


class TestReaders:
    @pytest.mark.parametrize(
        ("text", "value"),
        [("1T", 1e12), ("1.5b", 1.5e9), ("350M", 3.5e8), ("1000", 1e3), (" 7B ", 7e9)],
    )
    def test_parameters(self, text: str, value: float) -> None:
        assert parameters(text) == value

    @pytest.mark.parametrize("text", ["0", "-1B", "1Q", "", "T", "1e9", "1000T", "nan"])
    def test_what_is_no_number_of_parameters(self, text: str) -> None:
        with pytest.raises(typer.BadParameter, match="must be a number of parameters"):
            parameters(text)

    def test_numbers_and_names(self) -> None:
        assert integer(2)("2") == 2 and number("0.5") == 0.5
        assert one_of(lambda: ("a", "b"))("b") == "b" and some_of(("a", "b"))("a, b") == "a, b"

    @pytest.mark.parametrize(
        ("read", "text"),
        [
            (integer(2), "1"),
            (integer(0), "1.0"),
            (number, "nan"),
            (number, "-1"),
            (one_of(lambda: ("a",)), "A"),
            (some_of(("a", "b")), "a,c"),
            (some_of(("a", "b")), ""),
        ],
    )
    def test_wrong_ones(self, read: Any, text: str) -> None:
        with pytest.raises(typer.BadParameter, match="must be"):
            read(text)


class TestFolders:
    @pytest.mark.parametrize("command", ["bench", "report", "choose", "gate", "history", "tune"])
    def test_results_that_are_a_file(self, command: str, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        others = {"history": ["some/case"], "tune": ["--mechanism", "msra"], **REQUIRED}
        done = run(command, *others.get(command, []), "--results", str(file / "runs"))
        check_refused(done, f"{file} is a file, not a folder", "--results FOLDER takes another")

    @pytest.mark.parametrize("command", ["bench", "gate", "tune"])
    def test_results_without_permission(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(dir: Path, **_: object) -> None:  # noqa: A002  as tempfile has it
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(options.tempfile, "TemporaryDirectory", refused)
        others = ["--mechanism", "msra"] if command == "tune" else []
        done = run(command, *others, "--results", str(tmp_path / "runs"))
        check_refused(done, f"no permission to write to {tmp_path}", "--results FOLDER")

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs the filesystem /proc")
    @pytest.mark.parametrize("command", ["bench", "gate", "tune"])
    def test_results_in_a_filesystem_that_takes_no_files(self, command: str) -> None:
        others = ["--mechanism", "msra"] if command == "tune" else []
        done = run(command, *others, "--results", "/proc/danon-runs")
        check_refused(done, "nothing can be written to /proc", "--results FOLDER takes another")

    def test_run_of_an_older_version(self, run_dir: Path) -> None:
        file = run_dir / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 0}))
        done = run("report", str(run_dir))
        check_refused(done, str(file), "has schema 0; this danon reads schema 1")

    def test_unknown_run_id(self, run_dir: Path) -> None:
        done = run("report", "20200101T000000Z-abcdef", "--results", str(run_dir.parent))
        check_refused(done, "20200101T000000Z-abcdef", f"the last are {run_dir.name}")

    def test_run_by_its_id(self, run_dir: Path) -> None:
        done = run("report", run_dir.name, "--results", str(run_dir.parent))
        assert done.exit_code == 0 and str(run_dir / "report.html") in done.stdout

    def test_picture_without_permission(
        self, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("danon.cli.output_files.os.access", lambda path, mode: path != tmp_path)
        picture = tmp_path / "a.png"
        check_refused(run("report", str(run_dir), "--picture", str(picture)), "no permission")
        assert not (run_dir / "report.html").exists()

    def test_bench_refuses_on_stderr(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from rich.console import Console

        asked = Options("smoke", "cpu", (), "", "", tmp_path, False, "danon bench", "local", "auto")
        assert bench(asked, Console()) == exit_status.REFUSED
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("danon: --address 'auto': only with")


class TestHelp:
    @pytest.mark.parametrize("width", ["40", "80"])
    def test_no_name_is_cut(self, width: str) -> None:
        """Print the help of every command in one process that has a terminal of this width."""
        code = (
            "import json, sys; from typer.testing import CliRunner; from danon.cli.app import app; "
            "out = {c: CliRunner().invoke(app, [*c.split(), '-h']).stdout "
            "for c in json.loads(sys.argv[1])}; "
            "heavy = ('torch', 'mlflow', 'optuna', 'scipy', 'pandas', 'matplotlib', 'plotly'); "
            "print(json.dumps([out, [m for m in heavy if m in sys.modules]]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(["", *commands()])],
            env={"COLUMNS": width, "PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        helps, heavy = json.loads(done.stdout)
        assert heavy == [], "the help imports what takes seconds"
        for command in commands():
            assert "…" not in helps[command] and "Usage: " in helps[command]
            for option in option_names(command):
                assert option in helps[command]
        assert "docs/commands.md" in helps[""]
        choices = " ".join(helps["bench"].replace("│", " ").split())
        for listed in ("smoke, quick, standard, full", "cpu, cuda", "local, ray", "speed"):
            assert listed in choices

    def test_version(self) -> None:
        done = run("--version")
        assert done.exit_code == 0 and done.stderr == ""
        for part in ("danon 0.", "torch 2.", "Python 3."):
            assert part in done.stdout

    def test_no_command_shows_the_help(self) -> None:
        done = run()
        assert done.exit_code == 0 and done.stdout == run("--help").stdout

    def test_every_command_is_walked(self) -> None:
        group: Any = get_command(app)
        assert {*group.commands} == {name for name in commands() if " " not in name}


class TestExitStatuses:
    def test_the_page_has_every_status(self) -> None:
        page = (ROOT / "docs" / "commands.md").read_text()
        for status, meaning in exit_status.MEANINGS.items():
            assert f"| {status} | {meaning} |" in page

    def test_every_constant_has_a_meaning(self) -> None:
        numbers = {getattr(exit_status, name) for name in exit_status.__all__ if name != "MEANINGS"}
        assert numbers - {exit_status.SIGNALLED} <= exit_status.MEANINGS.keys()


class TestTuneAlone:
    def test_lists_attentions_and_kinds(self) -> None:
        done = run("tune")
        assert done.exit_code == 0, done.output
        said = " ".join(done.stdout.split())
        for word in ("msra, dala, ucsa, super-hybrid (hybrid)", "window", "--attention file.py"):
            assert word in said
        for kind in ("architecture", "hyperparameters", "quantization", "schedule"):
            assert kind in said
        assert "objectives: speed, memory, quality" in said
