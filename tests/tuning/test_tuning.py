"""Studies: goals, who counts, what is best, where they are kept."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from danon.tracking.store import StoreError
from danon.tuned.search_space import Categorical, Float, Space
from danon.tuning import candidates, evaluator, storage, study_terminal
from danon.tuning.evaluator import TrialError
from danon.tuning.objective import Objective
from danon.tuning.study import (
    Plan,
    StudyError,
    begin,
    distributions,
    enqueue,
    figures_of,
    make_sampler,
    plan_of,
    progress,
    resume,
)
from danon.tuning.study_run import StudyRun
from danon.tuning.trial_loop import run_trials

SPACE = Space(
    {
        "x": Float(0.1, 10.0, log=True),
        "n": Categorical((1, 2, 3, 4)),
        "on": Categorical((True, False)),
    },
    {"x": 1.0, "n": 2, "on": True},
)
ALL = ("speed", "memory", "quality")
Storage = optuna.storages.RDBStorage


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "kind": "hyperparameters",
        "attention": "mine",
        "objectives": ("balanced",),
        "limits": {},
        "length": 64,
        "dtype": "float32",
        "device": "cpu",
        "sampler": "tpe",
        "seed": 0,
        "space": SPACE.to_json(),
        "known": ALL,
    }
    return Plan(**values | changes)


class Fake:
    """Faster for small x, more exact for large ones."""

    def __init__(self) -> None:
        self.measured: list[dict[str, Any]] = []

    def steps(
        self, choice: Mapping[str, Any], seed: int, *, fresh: bool
    ) -> Iterator[dict[str, float]]:
        self.measured.append({**choice, "seed": seed, "fresh": fresh})
        x = choice["x"]
        yield {
            "time_ratio": x,
            "time_ratio_low": 0.98 * x,
            "time_ratio_high": 1.02 * x,
            "memory_ratio": choice["n"] / 2,
            "error_default": 0.1,
        }
        yield {"error": min(1.0, 0.1 / x)}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Storage]:
    with storage.opened(f"sqlite:///{tmp_path / 'optuna.db'}") as found:
        yield found


def begun(database: Storage, some: Plan | None = None) -> optuna.Study:
    some = some or plan()
    return begin(some, some.name, database, [SPACE.default])


class TestObjective:
    def test_lower_bound_with_missing_figures(self) -> None:
        goal = Objective(("balanced",), {})
        early = {"time_ratio": 0.5, "memory_ratio": 1.0}
        late = {**early, "error": 0.0, "error_default": 0.4}
        assert 0 < goal.lower_bound(early) <= goal.lower_bound({**early, "error_default": 0.4})
        assert goal.lower_bound({**early, "error_default": 0.4}) == goal.score(late)

    def test_score_of_the_default_is_one(self) -> None:
        same = {"time_ratio": 1.0, "memory_ratio": 1.0, "error": 0.2, "error_default": 0.2}
        goal = Objective(("balanced",), {})
        assert goal.score(same) == pytest.approx(1)
        assert goal.score({**same, "time_ratio": 0.5}) == pytest.approx(0.5 ** (1 / 3))
        odds = (0.11 / 0.91) / (0.21 / 0.81)
        assert goal.score({**same, "error": 0.1}) == pytest.approx(odds ** (1 / 3))

    def test_score_of_a_fast_attention_that_finds_nothing(self) -> None:
        null = {"time_ratio": 0.1, "memory_ratio": 0.5, "error": 1.0, "error_default": 0.4}
        assert Objective(("balanced",), {}).score(null) > 1

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("fast", "--objective 'fast': must be of speed, memory, quality, balanced"),
            ("", "must name some of speed, memory, quality, or balanced alone"),
            ("speed,balanced", "or balanced alone"),
        ],
    )
    def test_parse_with_a_wrong_objective(self, text: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Objective.parse(text, (), ALL)

    @pytest.mark.parametrize("text", ["quality", "quality=", "quality=nan", "luck=1", "speed=-1"])
    def test_parse_with_a_wrong_limit(self, text: str) -> None:
        with pytest.raises(ValueError, match="must be speed=NUMBER or memory=NUMBER"):
            Objective.parse("speed", (text,), ALL)

    def test_values_with_nan(self) -> None:
        with pytest.raises(ValueError, match="objective speed is nan"):
            Objective(("speed",), {}).values({"time_ratio": float("nan")})


class Process:
    """Instead of the one that measures: two steps, of which the first tells times."""

    started: list[Process]

    def __init__(self, *_: object, **__: object) -> None:
        self.asked, self.ended = list[str](), False
        self.started.append(self)

    def request(self, do: str, **_: object) -> Any:
        assert not self.ended
        self.asked.append(do)
        if do == "begin":
            self.left = [{"time_ratio": 1.0}, {"error": 0.1}]
        if do == "advance":
            return self.left.pop(0) if self.left else None
        return {"space": "{}"}

    def close(self) -> None:
        self.ended = True


def test_spare_process_starts_after_the_timing_of_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "started", [], raising=False)
    monkeypatch.setattr(evaluator, "WorkerProcess", Process)
    local, some = evaluator.SubprocessEvaluator(plan().subject, tmp_path / "log"), Process.started
    assert len(some) == 1 and not some[0].asked, "it starts while there is something else to do"
    for _ in range(3):
        assert len(list(local.steps({}, 0, fresh=False))) == 2
    assert len(some) == 1

    steps = local.steps({}, 0, fresh=True)
    next(steps)
    assert len(some) == 2 and some[0].ended, "nothing starts while times are measured"
    assert next(steps) == {"error": 0.1} and len(some) == 3 and not some[2].asked
    assert list(steps) == [] and len(list(local.steps({}, 0, fresh=False))) == 2
    assert len(some) == 3 and not some[1].ended
    assert len(list(local.steps({}, 0, fresh=True))) == 2
    assert some[1].ended and some[2].asked and len(some) == 4
    local.close()
    assert all(process.ended for process in some)


class TestRunTrials:
    def test_new_study_begins_with_the_default_choice(self, database: Storage) -> None:
        study, fake = begun(database), Fake()
        run_trials(StudyRun(study, 12), fake)
        assert progress(study).finished == 12
        assert fake.measured[0] == {**SPACE.default, "seed": 0, "fresh": False}
        assert study.trials[0].values == [pytest.approx(1.0)]

    def test_resumed_study_draws_new_choices(self, database: Storage) -> None:
        first, second = Fake(), Fake()
        run_trials(StudyRun(begun(database), 5), first)
        run_trials(StudyRun(begun(database), 12), second)
        assert (len(first.measured), len(second.measured)) == (5, 7)
        drawn = [m["x"] for m in first.measured + second.measured]
        assert len(set(drawn)) == 12  # not the same draws again

    def test_first_choices_are_not_pruned(self, database: Storage) -> None:
        some = plan(objectives=("speed",), limits={"quality": 0.2})
        study = begun(database, some)
        run_trials(StudyRun(study, 1), Fake())
        slow = {"x": 5.0, "n": 1, "on": True}
        begin(some, some.name, database, [SPACE.default, slow])
        run_trials(StudyRun(study, 2), Fake())
        assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE"]

    def test_samplers_of_two_workers_differ(self) -> None:
        drawn = []
        for name in ("one", "two", "two"):
            study = optuna.create_study()
            study.sampler = make_sampler(plan(), study, name)
            drawn.append(study.ask(distributions(SPACE.to_json())).params["x"])
        assert drawn[0] != drawn[1] == drawn[2]

    def test_study_ends_when_the_space_is_exhausted(self, database: Storage) -> None:
        space = Space({"x": Categorical((0.5, 1.0)), "n": Categorical((1, 2))}, {"x": 1.0, "n": 2})
        some = plan(space=space.to_json(), sampler="random")
        study = begin(some, some.name, database, [space.default])
        run_trials(StudyRun(study, 200), Fake())
        assert some.choices == progress(study).choices == 4
        assert progress(study).finished < 200

    def test_begin_with_another_plan_of_the_same_name(self, database: Storage) -> None:
        begun(database)
        other = plan(space=Space({"x": Float(0.1, 10.0)}, {"x": 1.0}).to_json())
        with pytest.raises(StudyError, match=r"another space: n was .*; x was .*another --study"):
            begin(other, plan().name, database, [])
        assert len(begun(database).trials) == 1  # nothing is overwritten

    def test_hopeless_trial_is_pruned(self, database: Storage) -> None:
        some = plan(objectives=("speed",), limits={"quality": 0.2})
        study, fake = begun(database, some), Fake()
        enqueue(study, {"x": 5.0, "n": 1, "on": True})
        run_trials(StudyRun(study, 2), fake)
        assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED"]
        assert "error" not in figures_of(study.trials[1])

    def test_failed_trial_keeps_its_reason(self, database: Storage) -> None:
        class Fails(Fake):
            def steps(
                self, choice: Mapping[str, Any], seed: int, *, fresh: bool
            ) -> Iterator[dict[str, float]]:
                if choice["n"] == 3:
                    raise TrialError("no such size")
                return super().steps(choice, seed, fresh=fresh)

        study = begun(database)
        enqueue(study, {"x": 5.0, "n": 3, "on": True})
        run_trials(StudyRun(study, 6), Fails())
        assert study.trials[1].state.name == "FAIL"
        assert study.trials[1].user_attrs["error"] == "no such size"
        assert progress(study).finished == 6 and progress(study).failed >= 1

    def test_study_in_which_every_trial_fails(self, database: Storage) -> None:
        class Fails(Fake):
            def steps(
                self, choice: Mapping[str, Any], seed: int, *, fresh: bool
            ) -> Iterator[dict[str, float]]:
                yield {
                    "time_ratio": float("nan"),
                    "time_ratio_low": 0.0,
                    "memory_ratio": 1.0,
                    "error": 0.0,
                    "error_default": 0.0,
                }

        with pytest.raises(
            StudyError, match=r"5 trials failed, none is complete: objective balanced is nan"
        ):
            run_trials(StudyRun(begun(database), 20), Fails())

    def test_interrupted_trial_is_requeued(self, database: Storage) -> None:
        class Interrupted(Fake):
            def steps(
                self, choice: Mapping[str, Any], seed: int, *, fresh: bool
            ) -> Iterator[dict[str, float]]:
                yield from list(super().steps(choice, seed, fresh=fresh))[:1]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_trials(StudyRun(begun(database), 3), Interrupted())
        study, fake = begun(database), Fake()
        run_trials(StudyRun(study, 3), fake)
        assert {k: fake.measured[0][k] for k in SPACE.default} == SPACE.default
        done = progress(study)
        assert (done.finished, done.died) == (3, 1)

    def test_trial_of_a_worker_that_died_at_once_is_requeued(
        self, database: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = begun(database)
        with pytest.warns(UserWarning, match="Heartbeat"):
            study.ask()  # by a worker that is dead before it has told that it lives
        monkeypatch.setattr(storage, "GRACE_S", 0)
        run_trials(StudyRun(study, 1), fake := Fake())
        assert [m["x"] for m in fake.measured] == [1.0]
        assert progress(study).died == 1 and progress(study).finished == 1


class TestCandidates:
    def test_repeats_use_fresh_processes_and_are_counted_apart(self, database: Storage) -> None:
        some = plan(objectives=ALL)
        study = begun(database, some)
        run_trials(StudyRun(study, 20), Fake())
        found = candidates.candidates(study.trials)
        near = candidates.near_best(found, some.objective)
        assert 1 <= len(near) <= 8
        for turn in (0, 1):
            for c in (near[0], found[0]):
                enqueue(study, c.choice, repeat_of=c.number, repeat_index=turn)
        run_trials(StudyRun(study, 20), fake := Fake(), queued=True)
        assert [(m["fresh"], m["seed"]) for m in fake.measured] == [
            (True, 1),
            (False, 1),
            (True, 2),
            (False, 2),
        ]
        assert progress(study).finished == 20 and progress(study).repeats == 4
        again = candidates.candidates(study.trials)
        assert sum(len(c.repeats) for c in again if c.number in (near[0].number, 0)) == 4
        assert candidates.near_best(again, some.objective) == [
            c for c in again if c.number in {c.number for c in near}
        ]

    def candidate(self, number: int, time: float, error: float) -> candidates.Candidate:
        figures = {"time_ratio": time, "memory_ratio": 1.0, "error": error, "error_default": 0.1}
        return candidates.Candidate(number, {}, figures)

    def test_pareto_front_of_four_candidates(self) -> None:
        some = [
            self.candidate(*x)
            for x in ((0, 1.0, 0.1), (1, 0.5, 0.12), (2, 1.1, 0.2), (3, 0.4, 0.9))
        ]
        goal = Objective(("speed", "quality"), {})
        assert [c.number for c in candidates.pareto_front(some, goal)] == [0, 1, 3]
        bounded = Objective(("speed", "quality"), {"quality": 0.5})
        assert [c.number for c in candidates.pareto_front(some, bounded)] == [0, 1]
        found = candidates.best(some, goal)
        assert {name: c.number for name, c in found.items()} == {
            "speed": 0,
            "quality": 0,
            "balanced": 1,
        }

    def test_reported_figures_leave_out_those_that_chose(self) -> None:
        lucky = self.candidate(0, 0.2, 0.1)
        figures = dict(lucky.first)
        lucky.repeats = [{**figures, "time_ratio": t} for t in (0.3, 0.3, 0.9, 1.0, 1.0, 1.1)]
        assert lucky.confirmed
        assert lucky.figures(choosing=True)["time_ratio"] == pytest.approx(0.3)
        assert lucky.figures()["time_ratio"] == pytest.approx(0.997, abs=1e-3)
        low, high = lucky.interval(Objective(("balanced",), {}))
        assert 0.95 < low < 1 < high < 1.05

    def test_candidate_that_fails_in_a_repeat(self, database: Storage) -> None:
        class Fails(Fake):
            def steps(
                self, choice: Mapping[str, Any], seed: int, *, fresh: bool
            ) -> Iterator[dict[str, float]]:
                if fresh:
                    raise TrialError("does not fit")
                return super().steps(choice, seed, fresh=fresh)

        study = begun(database)
        run_trials(StudyRun(study, 4), Fails())
        enqueue(study, SPACE.default, repeat_of=0)
        run_trials(StudyRun(study, 4), Fails(), queued=True)
        assert 0 not in [c.number for c in candidates.candidates(study.trials)]
        assert progress(study).finished == 4

    def test_best_for_speed_is_as_exact_as_the_default(self, database: Storage) -> None:
        """The fast ones that find less neither win nor prune others."""
        some = plan(objectives=("speed",))
        study = begun(database, some)
        for x in (0.2, 0.95):
            enqueue(study, {"x": x, "n": 2, "on": True})
        run_trials(StudyRun(study, 3), Fake())
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3
        found = candidates.best(candidates.candidates(study.trials), some.objective)
        assert found["speed"].choice["x"] == 0.95

    def test_nearest_candidate_when_no_one_meets_the_limits(self) -> None:
        goal = Objective(("speed",), {"quality": 0.05, "speed": 3.0})
        words = study_terminal.nearest([self.candidate(7, 2.0, 0.3)], goal)
        assert words.startswith("no trial met quality <= 0.05 (the least is 0.3); the nearest is")
        assert "trial 7: time 2, memory 1, error 0.3" in words
        words = study_terminal.nearest([self.candidate(7, 0.5, 0.3)], Objective(("speed",), {}))
        assert words.startswith("no trial met the quality of the default settings; the nearest")


class TestStorage:
    def test_open_read_only_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "optuna.db").touch()
        monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK)  # root may write
        with (
            pytest.raises(StoreError, match="cannot be written"),
            storage.opened(f"sqlite:///{tmp_path / 'optuna.db'}"),
        ):
            pass

    def test_open_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("notes" * 1000)
        for place in ("mine", "mine/optuna.db"):
            with (
                pytest.raises(StoreError, match=f"--storage sqlite:///.*{place}: "),
                storage.opened(f"sqlite:///{tmp_path / place}"),
            ):
                pass
        assert (tmp_path / "mine").read_text() == "notes" * 1000

    def test_open_silent_server(self) -> None:
        start = time.monotonic()
        with (
            pytest.raises(StoreError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:9"),
            storage.opened("postgresql+psycopg://me:secret@127.0.0.1:9/none"),
        ):
            pass
        assert time.monotonic() - start < 20

    @pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
    def test_study_made_by_hand_with_other_directions(
        self, database: Storage, directions: list[str]
    ) -> None:
        some = plan()
        optuna.create_study(storage=database, study_name=some.name, directions=directions)
        words = f"is to {', '.join(directions)}: must be to minimize; give another --study"
        with pytest.raises(StudyError, match=words):
            begin(some, some.name, database, [])
        made = optuna.load_study(study_name=some.name, storage=database)
        assert not made.user_attrs and not made.get_trials(deepcopy=False)
        made.set_user_attr("danon", dataclasses.asdict(some))  # by a danon that did not look
        with pytest.raises(StudyError, match=words):
            resume(some.name, database)

    def test_empty_study_made_by_hand_that_minimizes(self, database: Storage) -> None:
        some = plan()
        optuna.create_study(storage=database, study_name=some.name)
        assert plan_of(begun(database, some)) == some

    def test_resume_unknown_study(self, database: Storage) -> None:
        begun(database)
        with pytest.raises(StudyError, match="no study 'other'; there are: hyperparameters-mine"):
            resume("other", database)
