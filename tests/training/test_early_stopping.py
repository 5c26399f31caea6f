"""A run alone ends early by its evaluations; one that kept a checkpoint goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from lora_exp import compose, run
from lora_exp.config.door import build
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import ConfigError
from lora_exp.training.place import Alone
from tests.conftest import QUICK

EVALUATED = ["tracking=none", "train.max_steps=6", "train.eval_strategy=steps"]
EVALUATED += ["train.eval_steps=2", "train.save_strategy=no", "samples.rows=0"]


def record_of(result: Any) -> dict[str, Any]:
    return dict(json.loads((result.directory / "run.json").read_text()))


def test_a_run_out_of_patience_is_finished_and_saved(quick_run: Callable[..., Any]) -> None:
    rule = ["early_stopping=patience", "early_stopping.patience=1", "early_stopping.min_delta=50"]
    record = record_of(result := quick_run(*EVALUATED, *rule))
    assert (record["status"], record["steps"]) == ("finished", 4)
    assert record["stopped"]["reason"] == "no improvement of more than 50 since step 2"
    assert (result.saved / "adapter_model.safetensors").is_file()
    assert record["metrics"]["eval/loss"] == record["stopped"]["value"]


def test_a_run_beyond_a_bound_is_pruned_and_goes_on_exactly_from_what_it_kept(
    tmp_path: Path, quick_run: Callable[..., Any]
) -> None:
    rule = ["early_stopping=threshold", "early_stopping.upper=1", "early_stopping.n_warmup_steps=3"]
    record = record_of(pruned := quick_run(*EVALUATED, *rule, "early_stopping.keep=true"))
    assert (record["status"], record["steps"]) == ("pruned", 4)
    assert "is above upper=1" in record["stopped"]["reason"]
    assert pruned.objective == record["stopped"]["value"]
    assert (pruned.directory / "checkpoints/checkpoint-4").is_dir()
    assert (pruned.saved / "adapter_model.safetensors").is_file()
    again = run(compose(f"resume={pruned.directory}"), pruned.directory)
    assert record_of(again)["steps"] == 4  # the rule still holds
    resumed = run(compose(f"resume={pruned.directory}", "early_stopping=none"), pruned.directory)
    record = record_of(resumed)
    assert (record["status"], record["steps"], record["stopped"]) == ("finished", 6, None)
    whole = quick_run(*EVALUATED, name="whole")
    name = "adapter_model.safetensors"
    assert (resumed.saved / name).read_bytes() == (whole.saved / name).read_bytes()


class Checking(TrainerCallback):  # type: ignore[misc]
    """Keep what run.json has reported whenever a checkpoint has just been saved."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.rungs = directory, []  # type: ignore[var-annotated]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        rungs = json.loads((self.directory / "run.json").read_text())["rungs"]
        self.rungs.append([state.global_step, [r["step"] for r in rungs], "rank" in rungs[-1]])


class Judged(Alone):
    """A place whose job is compared with none, and whose checkpoints are watched."""

    def __init__(self, bracket: Bracket, directory: Path) -> None:
        super().__init__(3, bracket)
        self.checking = Checking(directory)

    def join(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.add_callback(self.checking)


def test_measuring_at_a_rung_with_answers_changes_nothing(
    tmp_path: Path, quick_run: Callable[..., Any]
) -> None:
    settings = ["tracking=none", *QUICK, "train.max_steps=6", "peft.lora_dropout=0.1"]
    settings += ["objective=eval/exact_match", "train.save_strategy=steps", "train.save_steps=3"]
    cfg = compose(*settings, "early_stopping=halving", "early_stopping.first_rung=0.5")
    bracket = Bracket(build(cfg, "early_stopping"), True, frozenset({3}))
    place = Judged(bracket, tmp_path / "judged")
    judged = run(cfg, tmp_path / "judged", place=place)
    record, plain = record_of(judged), quick_run(*settings, name="plain")
    report = {"rung": 0, "step": 3, "steps": 6, "value": 0.0, "rank": 1, "of": 1}
    assert record["rungs"] == [report]
    # a checkpoint of a rung's step is saved after the report, and before the verdict
    assert place.checking.rungs == [[3, [3], False], [6, [3], True]]
    history = place.trainer.state.log_history  # by which the best is found
    assert 3 not in [entry["step"] for entry in history if "eval_loss" in entry]
    assert record["best"] == record_of(plain)["best"]
    name = "adapter_model.safetensors"
    assert (judged.saved / name).read_bytes() == (plain.saved / name).read_bytes()
    longer = run(compose(f"resume={judged.directory}", "train.max_steps=8"), judged.directory)
    assert record_of(longer)["rungs"] == []  # they were shares of a shorter training


def test_without_held_out_rows_there_is_nothing_to_judge_by(quick_run: Callable[..., Any]) -> None:
    data = ["data=jsonl", "data.path=pkg://lora_exp/assets/demo_train.jsonl", "data.eval_share=0"]
    with pytest.raises(ConfigError, match="early_stopping: measures held-out rows"):
        quick_run("tracking=none", *data, "early_stopping=patience")
