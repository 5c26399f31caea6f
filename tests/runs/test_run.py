"""A saved run: what its files say, and what is wrong with damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lora_exp.files.lock import Lock
from lora_exp.runs.run import flattened, number, read_run
from tests.conftest import ROOT

Write = Callable[..., Path]


def test_a_run_is_described_by_its_files(write_run: Write) -> None:
    directory = write_run(
        "sweep/3", 0.25, overrides={"peft.r": 4, "seed": 7}, answers=["yes"], history=[{"step": 1}]
    )
    run = read_run(directory)
    assert (run.name, run.status, run.problem) == ("sweep-3", "finished", None)
    assert (run.objective, run.judged_by, run.goal, run.seed) == (0.25, "eval/loss", "minimize", 7)
    assert run.overrides == {"peft.r": "4", "seed": "7"}
    assert run.config()["peft.r"] == 4
    assert run.config()["quant"] is None
    assert run.history() == [{"step": 1}]
    assert run.samples()[0]["after"] == "yes"
    assert run.sweep is None
    (directory.parent / "multirun.yaml").touch()
    assert read_run(directory).sweep == directory.parent


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"status": "fin', "run.json cannot be read (Unterminated string"),
        ("[1]", "run.json is not the record of a run: it has no status"),
        ('{"status": "finished", "metrics": 3}', "it has no metrics"),
        ("[" * 100_000, "run.json cannot be read (nested too deeply)"),
        ("\x00", "run.json cannot be read (Expecting value"),
    ],
)
def test_a_damaged_record_is_a_problem_in_one_line(
    write_run: Write, text: str, problem: str
) -> None:
    directory = write_run("odd")
    (directory / "run.json").write_text(text)
    run = read_run(directory)
    assert problem in str(run.problem)
    assert "\n" not in str(run.problem)
    assert (run.name, run.status, run.objective, run.judged_by) == ("odd", "damaged", None, None)
    assert run.record == {}
    assert run.config()["peft.r"] == 8


def test_missing_and_cut_off_files_leave_the_rest_readable(write_run: Write) -> None:
    directory = write_run("cut")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n3\n{"step": 2, "train/lo')
    (directory / "config.yaml").write_text("seed: 3\npeft:\n  r: 4\nname: 'a")
    (directory / "samples.jsonl").unlink()
    (directory / ".hydra/overrides.yaml").write_text("{")
    run = read_run(directory)
    assert run.history() == [{"step": 1}]
    assert run.samples() == []
    assert run.config() == {"seed": 3, "peft.r": 4}
    assert run.overrides == {}
    (directory / "run.json").unlink()
    assert read_run(directory).problem == "run.json is missing"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pairs": ["a"], "preferred": [true, false]}'])
def test_missing_or_damaged_preferences_are_none(write_run: Write, text: str) -> None:
    directory = write_run("a")
    assert read_run(directory).preferences() == {}
    (directory / "pairs.json").write_text(text)
    assert read_run(directory).preferences() == {}
    (directory / "pairs.json").write_text('{"pairs": ["a", "a"], "preferred": [true, false]}')
    assert read_run(directory).preferences() == {("a", 0): True, ("a", 1): False}


def test_only_ended_runs_have_a_value_and_only_finite_ones(write_run: Write) -> None:
    assert read_run(write_run("a", status="failed")).objective is None
    assert read_run(write_run("b", None)).objective is None
    assert read_run(write_run("c", float("nan"))).objective is None
    assert read_run(write_run("d", float("inf"))).objective is None
    assert read_run(write_run("e", 0.5, status="pruned")).objective == 0.5
    assert read_run(write_run("f", objective="eval/other")).objective is None
    assert [number(v) for v in (True, "1", 10**400, 2)] == [None, None, None, 2.0]


def test_a_running_run_without_a_process_is_killed(write_run: Write) -> None:
    directory = write_run("a", status="running", history=[{"step": 4}])
    assert read_run(directory).status == f"killed at step 4; resume={directory}"
    held = Lock(directory, "key")
    assert read_run(directory).status == "running"
    held.release()


def test_a_config_read_in_blocks_is_the_config_read_whole(write_run: Write) -> None:
    directory = write_run("a")
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/config.yaml"))
    assert isinstance(values, dict)
    values |= {"template": "a\nb: 1\n\n  c\n", "list": [{"a": [1]}, "x: y\nz"], "empty": {}}
    values |= {"ünicode": {"'q'": 'w"'}, "long": "word " * 60, "true": False, "7": 1}
    for text in (OmegaConf.to_yaml(values), yaml.safe_dump(values, allow_unicode=True)):
        (directory / "config.yaml").write_text(text, encoding="utf-8")
        assert read_run(directory).config() == dict(flattened(yaml.safe_load(text)))
