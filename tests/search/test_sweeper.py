"""The sweeper with Hydra's own launcher and a task of numbers; then with ours and real runs."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from hydra_plugins.search_sweeper._directory import keep_rows
from hydra_plugins.search_sweeper.sweeper import SearchSweeper
from lora_exp.config.door import CONF
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.record.sweep import SweepTable, read_rows, write_summary
from lora_exp.search.journal import JOURNAL, Journal
from lora_exp.search.limits import Size
from lora_exp.search.sizes import Sizes
from lora_exp.search.trial import Trial
from tests.record.test_sweep import finished_job

Task = Callable[[DictConfig], Any]
SPACE = ["rate=tag(log,interval(1e-5,1e-1))", "kind=a,b", "kind.x=range(1,5)"]


@pytest.fixture(autouse=True)
def _fresh_hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = copy.deepcopy(Singleton.get_state())
    monkeypatch.setattr(SweepTable, "current", None)
    yield
    Singleton.set_state(before)


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small config: a rate, and a group of which one option has a value x."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "kind").mkdir()
    (folder / "kind" / "a.yaml").write_text("x: 1\n")
    (folder / "kind" / "b.yaml").write_text("y: 1\n")
    groups = ("sweeper: search", "hydra_logging: none", "job_logging: none")
    overridden = ", ".join(f"{{override hydra/{group}}}" for group in groups)
    judged = "# @package _global_\nobjective: score\ngoal: maximize\n"
    (folder / "kind" / "c.yaml").write_text(judged)
    defaults = f"defaults: [_self_, {{kind: a}}, {overridden}]\n"
    (folder / "config.yaml").write_text(
        f"{defaults}rate: 0.1\ngoal: minimize\nobjective: eval/loss\nretry_failed: false\n"
        "hydra: {output_subdir: null}\n"
    )
    return folder


def score(cfg: DictConfig) -> float:
    return abs(math.log10(cfg.rate) + 3) + abs(cfg.kind.get("x", 4) - 2)


def interrupted_after(
    count: int, task: Callable[[DictConfig], float]
) -> Callable[[DictConfig], float]:
    """Return a task that does so many jobs, and is interrupted in the next."""
    left = count

    def interrupted(cfg: DictConfig) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return task(cfg)

    return interrupted


def raising(error: Exception) -> Callable[[DictConfig], float]:
    def task(cfg: DictConfig) -> float:
        raise error

    return task


@pytest.fixture
def search(conf: Path, tmp_path: Path) -> Callable[..., Journal]:
    """Search in tmp_path with a task, and return the journal."""

    def sweep(*overrides: str, task: Task = score, name: str = "sweep") -> Journal:
        arguments = ["hydra.sweeper.batch=3", "hydra.sweeper.trials=8", *overrides]
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            runner = GlobalHydra.instance().hydra
            assert runner is not None
            arguments.append(f"hydra.sweep.dir={tmp_path}/{name}")
            runner.multirun("config", task, arguments, with_log_configuration=False)
        return Journal(tmp_path / name / JOURNAL)

    return sweep


def test_hydra_finds_the_sweeper() -> None:
    assert SearchSweeper.__name__ in [c.__name__ for c in Plugins.instance().discover(Sweeper)]


def test_trials_are_numbered_jobs_and_absent_keys_are_not_overridden(
    search: Callable[..., Journal], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, list[str]]] = []

    def task(cfg: DictConfig) -> float:
        section = hydra.core.hydra_config.HydraConfig.get()
        seen.append((section.job.num, list(section.overrides.task)))
        return score(cfg)

    journal = search(*SPACE, "+z=5", task=task)
    assert [number for number, _ in seen] == list(range(8))
    assert [overrides for _, overrides in seen] == [
        ["+z=5", *t.overrides] for t in journal.trials[:8]
    ]
    assert {("kind.x" in t.values) for t in journal.trials if t.values["kind"] == "b"} == {False}
    assert {("kind.x" in t.values) for t in journal.trials if t.values["kind"] == "a"} == {True}
    assert [t.state for t in journal.trials] == ["complete"] * 8 + ["asked"]
    best = min(range(8), key=lambda n: journal.trials[n].value or 0.0)
    output = capsys.readouterr().out
    assert f"trial {best} of 8; eval/loss" in output
    assert " ".join(["lora-exp run hydra.mode=RUN +z=5", *journal.trials[best].overrides]) in output


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_search_interrupted_anywhere_writes_the_same_journal(
    search: Callable[..., Journal], sampler: str
) -> None:
    space = ["rate=1e-2,1e-3", *SPACE[1:]] if sampler == "grid" else SPACE
    arguments = [*space, f"hydra.sweeper.sampler={sampler}", "hydra.sweeper.trials=5"]
    arguments.append("hydra.sweeper.batch=2")
    whole = search(*arguments, name="whole").path.read_bytes()
    for name, steps in (("a", [1, 2]), ("b", [3])):
        for count in steps:
            with pytest.raises(KeyboardInterrupt):
                search(*arguments, task=interrupted_after(count, score), name=name)
        assert search(*arguments, name=name).path.read_bytes() == whole


def test_a_search_has_a_report_after_each_batch(search: Callable[..., Journal]) -> None:
    reported = []

    def run(cfg: DictConfig) -> float:
        directory = Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
        reported.append((directory.parent / "report.html").is_file())
        judged = {
            "objective": "eval/loss",
            "goal": "minimize",
            "metrics": {"eval/loss": score(cfg)},
        }
        (directory / "run.json").write_text(json.dumps({"status": "finished", **judged}))
        (directory / "config.yaml").write_text(f"seed: 1\nrate: {cfg.rate}\n")
        return score(cfg)

    options = ["+report=report.html", "hydra.sweeper.trials=4", "hydra.sweeper.batch=2"]
    search(*SPACE, *options, task=run)
    assert reported == [False, False, True, True]


def test_raising_the_number_of_trials_gives_the_same_trials(search: Callable[..., Journal]) -> None:
    whole = search(*SPACE, name="whole")
    search(*SPACE, "hydra.sweeper.trials=2", name="raised")
    search(*SPACE, "hydra.sweeper.trials=4", name="raised")
    assert search(*SPACE, name="raised").trials == whole.trials


def test_lists_are_values_and_first_guesses(search: Callable[..., Journal]) -> None:
    guess = "hydra.sweeper.start=[{m: [1, 2], rate: 0.5}]"
    journal = search("+m=[1],[1,2]", "rate=0.5,0.1", guess, task=lambda cfg: float(sum(cfg.m)))
    assert journal.trials[0].values == {"+m": "[1,2]", "rate": "0.5"}
    assert {t.value for t in journal.trials} == {1.0, 3.0}


def test_evidence_is_kept_in_the_journal(search: Callable[..., Journal], tmp_path: Path) -> None:
    finished = tmp_path / "finished" / "0"
    finished.mkdir(parents=True)
    (finished / "config.yaml").write_text("kind: {x: 2}\nchoices: {}\n")
    record = {"status": "finished", "objective": "eval/loss", "goal": "minimize", "error": None}
    (finished / "run.json").write_text(json.dumps(record | {"metrics": {"eval/loss": 0.5}}))
    arguments = ["kind.x=1,2,3,4", f"hydra.sweeper.learn_from=[{finished.parent}]"]
    search(*arguments, "hydra.sweeper.trials=2")
    shutil.rmtree(finished.parent)
    journal = search(*arguments)
    assert journal.evidence == [Trial({"kind.x": "2"}, "complete", 0.5)]
    assert len(journal.trials) == 4


def test_failed_and_nan_trials_count_and_the_search_goes_on(search: Callable[..., Journal]) -> None:
    def task(cfg: DictConfig) -> float:
        if cfg.kind.get("x") == 1:
            raise ValueError("no")
        return math.nan if cfg.kind.get("x") == 2 else score(cfg)

    journal = search("kind.x=1,2,3,4", task=task)
    assert [t.state for t in journal.trials] == [
        "complete" if t.values["kind.x"] in "34" else "failed" for t in journal.trials
    ]
    assert len(journal.trials) == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError([("rate", "wrong")]), "rate: wrong"),  # every job is refused: so is the search
        (ValueError("no"), "none of 8 trials has ended with a finite objective"),
    ],
)
def test_a_search_without_a_result_is_an_error(
    search: Callable[..., Journal], error: Exception, message: str
) -> None:
    with pytest.raises(LoraExpError, match=message):
        search(*SPACE, task=raising(error))


def test_a_batch_that_is_refused_later_ends_no_search(search: Callable[..., Journal]) -> None:
    def task(cfg: DictConfig) -> float:
        if cfg.kind.x > 2:
            raise ConfigError([("kind.x", "wrong")])
        return 1.0

    arguments = ["kind.x=1,2,3,4", "hydra.sweeper.sampler=grid", "hydra.sweeper.batch=2"]
    journal = search(*arguments, task=task)
    assert [t.state for t in journal.trials] == ["complete", "complete", "failed", "failed"]


def test_a_pruned_job_is_told_with_its_last_value_and_step(search: Callable[..., Journal]) -> None:
    def task(cfg: DictConfig) -> float:
        directory = Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        record = {"status": "pruned", "steps": 5, "objective": "eval/loss", "goal": "minimize"}
        if cfg.kind.x > 1:
            (directory / "run.json").write_text(json.dumps(record))
        return float(cfg.kind.x)

    trials = search("kind.x=1,2,3", task=task).trials
    assert {(t.values["kind.x"], t.state, t.value, t.step) for t in trials} == {
        ("1", "complete", 1.0, 0), ("2", "pruned", 2.0, 5), ("3", "pruned", 3.0, 5),
    }  # fmt: skip


TWO = "hydra.sweeper.objectives={eval/loss: minimize, parameters: minimize}"


def of_two(cfg: DictConfig) -> float:
    """Record a loss that falls with x, and x as the number of trained parameters."""
    directory = Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    x = cfg.kind.get("x", 9)
    record = {"status": "finished", "objective": "eval/loss", "goal": "minimize",
              "metrics": {"eval/loss": 1 / x}, "counts": {"trainable_parameters": x}}  # fmt: skip
    (directory / "run.json").write_text(json.dumps(record))
    return float(1 / x)


def test_several_objectives_end_with_a_front_and_go_on_the_same_after_a_kill(
    search: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["kind.x=range(1,9)", TWO, "hydra.sweeper.trials=6"]
    whole = search(*arguments, task=of_two, name="whole")
    assert all(t.others == {"parameters": float(t.values["kind.x"])} for t in whole.trials[:6])
    assert "Pareto front, 6 of 6 trials" in capsys.readouterr().out
    for count in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            search(*arguments, task=interrupted_after(count, of_two))
    assert search(*arguments, task=of_two).path.read_bytes() == whole.path.read_bytes()
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.objectives: None, was"):
        search(*arguments[::2], task=of_two)


def test_an_objective_that_a_job_does_not_measure_ends_the_search_with_what_it_does(
    search: Callable[..., Journal],
) -> None:
    both = "hydra.sweeper.objectives={eval/loss: minimize, eval/exact_match_sum: maximize}"
    text = r"eval/exact_match_sum is not measured: eval/loss, parameters, bytes"
    with pytest.raises(ConfigError, match=text):
        search("kind.x=range(1,9)", both, task=of_two)


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Journal]:
    """Search our own config with a task of numbers, and sizes of 1000 parameters a rank."""

    def sized(self: Any, config: DictConfig, values: Any) -> Size:
        return Size(1000 * config.peft.r, 10**6)

    monkeypatch.setattr(Sizes, "_asked", sized)

    def sweep(*overrides: str) -> Journal:
        arguments = [f"hydra.sweep.dir={tmp_path}/real", "hydra/sweeper=search"]
        arguments += ["tracking=none", "hydra/launcher=basic", *overrides]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            runner = GlobalHydra.instance().hydra
            assert runner is not None
            runner.multirun("config", lambda cfg: 1.0, arguments, with_log_configuration=False)
        return Journal(tmp_path / "real" / JOURNAL)

    return sweep


LIMITED = ["hydra.sweeper.max_parameters=9000", "hydra.sweeper.batch=2"]


def test_cells_over_a_limit_are_no_trials(
    real: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    journal = real("peft.r=4,8,16", "hydra.sweeper.sampler=grid", *LIMITED)
    assert [dict(t.values) for t in journal.trials] == [{"peft.r": "4"}, {"peft.r": "8"}]
    assert journal.asked["hydra.sweeper.max_parameters"] == 9000
    assert "max_parameters=9000: 1 of 3 cells are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft.r=16,32"], "max_parameters: none of 2 cells meets max_parameters=9000; the least:"),
        (
            ["peft.r=4,8", "hydra.sweeper.objectives={eval/loss: minimize, eval/los: minimize}"],
            r"eval/los is not measured \(did you mean eval/loss\?\): eval/loss, eval/mean",
        ),
        (
            [
                "peft.r=4,8", "algorithm=sft,pretrain", "samples.rows=0",
                "hydra.sweeper.objectives={eval/loss: minimize, eval/exact_match: maximize}",
            ],
            "eval/exact_match is not measured: eval/loss",
        ),
    ],
)  # fmt: skip
def test_limits_and_objectives_that_cannot_be_met_are_refused_before_a_directory_is_made(
    real: Callable[..., Journal], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        real(*overrides, *LIMITED)
    assert not (tmp_path / "real").exists()


def judged_by(objective: Callable[[int], str]) -> Task:
    """Return a task whose runs record the objective of their number."""

    def task(cfg: DictConfig) -> float:
        section = hydra.core.hydra_config.HydraConfig.get()
        directory = Path(section.runtime.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        record = {"objective": objective(section.job.num), "goal": "minimize"}
        (directory / "run.json").write_text(json.dumps(record))
        return 1.0

    return task


def test_runs_without_held_out_rows_are_compared_by_their_training_loss(
    search: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    search("kind.x=1,2,3,4", task=judged_by(lambda number: "train/loss"))
    assert "trial 0 of 4; train/loss 1" in capsys.readouterr().out


@pytest.mark.parametrize("first", [1, 3])
def test_runs_of_different_objectives_are_not_compared(
    search: Callable[..., Journal], first: int
) -> None:
    task = judged_by(lambda number: "train/loss" if number >= first else "eval/loss")
    with pytest.raises(ConfigError, match=r"trial .: is judged by train/loss"):
        search("kind.x=1,2,3,4", task=task)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["hydra.sweeper.seed=7"], "hydra.sweeper.seed: 7, was 42"),
        (["kind=a,b"], "kind: .*, was None; kind.x: None, was .*"),
        (["kind.x=1,2", "rate=1"], "rate: 1, was None"),
    ],
)
def test_the_journal_of_another_command_is_refused(
    search: Callable[..., Journal], changed: list[str], message: str
) -> None:
    journal = search("kind.x=1,2").path.read_bytes()
    command = ["kind.x=1,2", *changed] if changed[0].startswith("hydra") else changed
    with pytest.raises(ConfigError, match=f"holds another search \\({message}"):
        search(*command)
    assert search("kind.x=1,2", "retry_failed=true").path.read_bytes() == journal


def test_the_directory_of_a_grid_is_refused(search: Callable[..., Journal], tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "summary.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a sweep that was no search"):
        search(*SPACE)
    assert not (tmp_path / "sweep" / JOURNAL).exists()


def test_a_search_goes_on_with_jobs_that_its_summary_had_not_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0", "1"):
        finished_job(tmp_path, name, 1.0)
    write_summary(tmp_path, [row for row in read_rows(tmp_path) if row["job"] == "0"])
    table = SweepTable()
    monkeypatch.setattr(SweepTable, "current", table)
    keep_rows(tmp_path)
    assert [row["job"] for row in table.rows] == ["0", "1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rate=0.1"], "nothing to search"),
        (["rate=interval(2,1)"], "rate: an interval from 2 to 1 is empty"),
        ([*SPACE, "hydra.sweeper.sampler=tpw"], "did you mean tpe"),
        ([*SPACE, "hydra.sweeper.direction=maximize"], "is against goal=minimize"),
        ([*SPACE, "goal=minimize,maximize"], "goal cannot be searched"),
        (["kind=a,c", "rate=1,2"], r"kind=c: is judged by score \(maximize\), the search by eval"),
        (["+hub_token=a,b"], r"hub_token: is a secret"),
        (["hydra.sweeper.start=[{rate: 1}]", *SPACE], "rate=1 is outside the space"),
    ],
)
def test_a_mistake_is_one_error_before_a_job_begins(
    search: Callable[..., Journal], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(*overrides, task=raising(AssertionError()))


def test_a_key_that_no_option_has_is_hydras_error(search: Callable[..., Journal]) -> None:
    with pytest.raises(HydraException, match=r"Could not override 'kind\.z'"):
        search("kind=a,b", "kind.z=1,2")


def test_a_dry_run_prints_and_writes_nothing(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SPACE, "hydra.sweeper.dry_run=true", f"hydra.sweep.dir={tmp_path}/sweep"]
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        runner = GlobalHydra.instance().hydra
        assert runner is not None
        runner.multirun("config", score, arguments, with_log_configuration=False)
    assert "32 by tpe, 8 at a time" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()
