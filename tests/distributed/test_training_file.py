"""A training described by a TOML file, and the command that runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from danon.cli.app import app
from danon.config import ConfigError
from danon.distributed.training_file import ByteWindows, TrainingFile

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train" / "code.toml"
SMALL = """
directory = "run"

[model]
mechanism = "msra"
hidden_size = 16
num_heads = 2
num_layers = 1
window = 8

[data]
files = ["*.txt"]
length = 16
held_out = 0.2

[training]
epochs = 2
batch_size = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("To be, or not to be. " * 30)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def train(file: Path) -> Result:
    return CliRunner().invoke(app, ["train", str(file)], prog_name="danon")


class TestWindows:
    def test_windows_cover_the_text_once(self) -> None:
        text = torch.arange(50, dtype=torch.uint8)
        windows = ByteWindows(text, 7)
        assert len(windows) == 7
        assert torch.cat([x for x, _ in windows]).tolist() == list(range(49))
        assert all(torch.equal(y, x + 1) for x, y in windows)

    def test_a_short_text_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"a text of 7 bytes: must be longer than data\.length"
        ):
            ByteWindows(torch.zeros(7, dtype=torch.uint8), 7)


class TestCommand:
    def test_a_training_that_goes_on(self, file: Path) -> None:
        done = train(file)
        assert done.exit_code == 0, (done.stderr, done.exception)
        assert re.search(r"Finished +after step \d+ of \d+: 2 passes", done.stdout)
        assert "nats a byte on held-out text" in done.stdout
        steps = sorted((file.parent / "run").glob("step-*"))
        again = train(file)
        assert again.exit_code == 0 and sorted((file.parent / "run").glob("step-*")) == steps
        assert again.stdout == done.stdout

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (('"msra"', '"mrsa"'), "model.mechanism = 'mrsa': must be one of msra, dala, ucsa"),
            (("hidden_size = 16", "hidden = 16"), "has no field 'hidden'"),
            (("length = 16", "length = 0"), "data.length = 0: must be an integer >= 1"),
            (("*.txt", "*.md"), "data.files: no file matches '*.md'"),
            (("epochs = 2", "steps = 2"), "training.steps: must be left out, epochs sets it"),
            (("epochs = 2", 'strategy = "dpp"'), "strategy = 'dpp': must be one of ddp"),
            (("held_out = 0.2", "held_out = 2.0"), "data.held_out = 2.0: must be in (0, 1)"),
            (("[data]", "[date]"), "date: must be one of directory, experiment, model, data"),
            (("length = 16", "length = "), "is no TOML"),
        ],
    )
    def test_wrong_files_are_refused(
        self, file: Path, change: tuple[str, str], message: str
    ) -> None:
        file.write_text(SMALL.replace(*change))
        done = train(file)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr and len(done.stderr.splitlines()) == 1

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        done = train(tmp_path / "none.toml")
        assert done.exit_code == 74 and "none.toml" in done.stderr


def test_the_example_describes_a_training() -> None:
    run = TrainingFile.read(EXAMPLE)
    train_windows, held_out = run.datasets()
    assert len(train_windows) > 8 * len(held_out) > 0
    assert train_windows[0][0].shape == (run.length,)
