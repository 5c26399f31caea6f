"""A run is trained again from its record: the same bytes, or what differs and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_exp import cli, compose, run
from lora_exp.after.reproduction import _limits, read_recipe, reproduce
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.early_stopping.rules import Halving
from lora_exp.errors import ConfigError, SavedError
from lora_exp.files.paths import SCRATCH
from lora_exp.training.place import Alone

SMALL = ["tracking=none", "train.logging_steps=2", "peft.r=2", "targets=qv", "data.max_rows=16"]
SMALL += ["data.max_eval_rows=2", "train.per_device_train_batch_size=2", "samples.rows=0"]


def edited(directory: Path, **values: Any) -> Path:
    path = directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


@pytest.fixture
def copied(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of the session, whose files may be changed."""
    return Path(shutil.copytree(trained("peft=lora"), tmp_path / "run"))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["reproduce", *arguments])


def test_other_bytes_are_named_with_what_is_different_here(copied: Path, tmp_path: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    edited(copied, versions=record["versions"], data={"pkg://lora_exp/assets/demo_eval.jsonl": "0"})
    weights = copied / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    result = invoke(str(copied), "--out", str(tmp_path / "again"))
    before, _, after = result.stdout.partition("step 12/12")
    assert "torch 1.0 -> " in before  # said before it trains
    assert "pkg://lora_exp/assets/demo_eval.jsonl has changed since" in before
    assert "adapter/adapter_model.safetensors differs" in after
    assert "not reproduced: other bytes, for what is listed above" in after
    assert "data was {'pkg://lora_exp/assets/demo_eval.jsonl': '0'}, now " in after
    assert re.search(r"metrics +the same, \d+ numbers and answers", after)
    assert result.exit_code == 1
    assert (tmp_path / "again/adapter").is_dir()


def test_a_job_that_was_pruned_is_reproduced_up_to_its_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is stopped by other jobs, which are not there any more."""
    halving = ["early_stopping=halving", "early_stopping.eta=2", "early_stopping.first_rung=0.25"]
    bracket = Bracket(Halving(eta=2, first_rung=0.25, keep=True), False, frozenset(range(4)))
    for job, rung, value in ((1, 0, 0.0), (2, 0, 99.0), (3, 0, 99.0), (1, 1, 0.0)):
        bracket.report(job, rung, value)  # it is the second at both rungs
    cfg = compose(*SMALL, *halving, "early_stopping.keep=true", "train.max_steps=8")
    pruned = run(cfg, tmp_path / "job", place=Alone(0, bracket))
    record = json.loads((pruned.directory / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("pruned", 4)
    assert f"run            {pruned.directory}" in capsys.readouterr().out
    result, folder = reproduce(read_recipe(pruned.directory))
    assert result.same, result
    assert result.files >= 3
    assert folder is None
    output = capsys.readouterr().out
    assert "peak memory" in output
    assert SCRATCH not in output  # it is deleted


def test_a_finished_run_that_was_trained_further_is_reproduced_in_the_same_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    first = run(compose(*SMALL, "train.max_steps=2"), tmp_path / "run")
    (entry,) = (tmp_path / "cache/untrained").iterdir()  # the cache is no evidence
    entry.write_text(entry.read_text().replace('"eval_loss": ', '"eval_loss": 1'))
    run(compose(f"resume={first.directory}", "train.max_steps=3"))  # a cosine to another end
    recipe = read_recipe(first.directory)
    assert recipe.limits == [{"max_steps": 2}, {}]
    result, _ = reproduce(recipe)
    assert result.same, result


def test_the_limits_of_a_run_are_those_that_it_ended_at() -> None:
    resumed = [
        {"status": "finished", "changes": {"train.max_steps": [2, 3]}},
        {"status": "interrupted", "changes": {"train.max_steps": [3, 4]}},
        {"status": "finished", "changes": {"tracking": [None, {}], "train.max_steps": [4, 9]}},
    ]
    assert _limits({"resumed": resumed}) == [{"max_steps": 2}, {"max_steps": 4}, {}]


def test_what_cannot_be_reproduced_is_refused_before_torch_trains(
    copied: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"peft\.r: 3, but the run was started with"):
        read_recipe(copied, ["peft.r=3"])
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("seed: 42", "seed: 43"))
    with pytest.raises(SavedError, match="is not the config that the run was trained with"):
        read_recipe(copied)
    with pytest.raises(SavedError, match="is interrupted: only a finished or pruned run"):
        read_recipe(edited(copied, status="interrupted"))
    (tmp_path / "sweep").mkdir()
    copied.rename(tmp_path / "sweep/0")
    with pytest.raises(SavedError, match=r"sweep\.json, .* give one of its 1 jobs: .*sweep/0"):
        read_recipe(tmp_path / "sweep")
    with pytest.raises(SavedError, match=r"swep does not exist \(did you mean sweep\?\)"):
        read_recipe(tmp_path / "swep")


def test_a_folder_with_files_is_not_trained_into(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(SavedError, match="out exists and is not empty"):
        reproduce(read_recipe(copied), tmp_path / "out")


def test_a_place_that_changes_bits_is_a_reason(copied: Path) -> None:
    assert read_recipe(copied).reasons == []
    resumed = {"status": "interrupted", "changes": {"train.logging_steps": [5, 10]}}
    edited(copied, place="lockstep, bmm", lockstep={"proven": False}, resumed=[resumed])
    first, second, third = read_recipe(copied).reasons
    assert "about 1e-6 off runs alone" in first
    assert "is not proven equal to a run alone" in second
    assert "train.logging_steps changed at a resume" in third
