"""On resume, only the limits of training and the reporting may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lora_exp import compose, run
from lora_exp.after.base_config import base_config
from lora_exp.after.inspection import inspect
from lora_exp.after.saved import find
from lora_exp.config.door import with_oldest_names
from lora_exp.config.settled import SWITCHES
from lora_exp.errors import ConfigError
from lora_exp.record.standing import run_status
from tests.conftest import QUICK
from tests.test_experiment import digest, mark_killed, rows_override


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    run(compose("tracking=none", *QUICK, "train.learning_rate=2e-4", "peft.r=4"), folder)
    mark_killed(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.learning_rate=1e-3", r"train.learning_rate: 0.001, .* started with 0.0002"),
        ("peft.lora_alpha=64", "peft.lora_alpha: 64, .* started with 32"),
        ("data=jsonl data.path=other.jsonl", "data: jsonl, .* started with demo"),
        ("model=smollm2_135m", "model: .*, but the run was started with tiny"),
        ("seed=7", "seed: 7, but the run was started with 42"),
        ("peft=dora", "peft: dora, but the run was started with lora"),
        ("train.max_steps=2", "train.max_steps: 2, .* it can only be raised"),
        ("train.max_steps=-1", "train.max_steps: -1, .* it can only be raised"),
        ("+train.adam_beta1=0.5", "train.adam_beta1: 0.5, but the run was started with None"),
        ("lockstep.mode=bmm", "lockstep.mode: bmm, but the run was started with exact"),
        ("+data@other=jsonl", "data@other: would replace an option of the run"),
        ("name=other", "name: other, but the run was started with"),
    ],
)
def test_changes_that_affect_the_result_are_refused(
    killed_run: Path, overrides: str, message: str
) -> None:
    if "smollm2_135m" in overrides:
        overrides = "model=local model.path=elsewhere"
        message = "model: local, but the run was started with tiny"
    with pytest.raises(ConfigError, match=message):
        compose(f"resume={killed_run}", *overrides.split())


def test_all_differences_are_reported_together(killed_run: Path) -> None:
    with pytest.raises(ConfigError, match="2 faults"):
        compose(
            f"resume={killed_run}", "seed=1", "peft.r=5", "train.max_steps=9", "peft.lora_alpha=32"
        )


def test_equal_overrides_and_changes_of_reporting_are_accepted(killed_run: Path) -> None:
    cfg = compose(
        f"resume={killed_run}",
        "peft.r=4",
        "train.logging_steps=2",
        "data.num_proc=2",
        "tracking=wandb",
        "train.max_steps=9",
    )
    assert (cfg.train.logging_steps, cfg.train.max_steps, cfg.data.num_proc) == (2, 9, 2)
    assert cfg.tracking is not None
    assert cfg.choices.tracking == "wandb"


@pytest.mark.parametrize(
    "setting",
    ["keep=best", "train.lr_scheduler_type=reduce_lr_on_plateau", "train.lr_scheduler_type=greedy"],
)
def test_evaluations_that_affect_the_result_may_not_change(setting: str, tmp_path: Path) -> None:
    def save(*overrides: str) -> None:
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(compose(setting, *overrides)))

    save()
    compose(f"resume={tmp_path}", "train.logging_steps=2")
    with pytest.raises(ConfigError, match=r"train\.eval_strategy: steps, but"):
        compose(f"resume={tmp_path}", "train.eval_strategy=steps")
    save("train.eval_strategy=steps")  # at the steps of logging
    with pytest.raises(ConfigError, match=r"train\.logging_steps: 2, but"):
        compose(f"resume={tmp_path}", "train.logging_steps=2")
    save("train.eval_strategy=steps", "train.eval_steps=4")
    compose(f"resume={tmp_path}", "train.logging_steps=2")


def test_a_finished_run_is_trained_further_with_a_higher_max_steps(
    quick_run: Callable[..., Any],
) -> None:
    constant = ["train.lr_scheduler_type=constant", "peft.lora_dropout=0.1"]
    uninterrupted = quick_run(*constant, "train.max_steps=5", name="whole")
    first = quick_run(*constant, name="short")
    with pytest.raises(ConfigError, match=r"is finished; to go on, give a higher train\.max_steps"):
        run(compose(f"resume={first.directory}"))
    longer = run(compose(f"resume={first.directory}", "train.max_steps=5"))
    weights = "adapter_model.safetensors"  # the cards differ in the run's name
    assert digest(longer.saved)[weights] == digest(uninterrupted.saved)[weights]
    record = json.loads((longer.directory / "run.json").read_text())
    (resumed,) = record["resumed"]
    assert resumed["changes"] == {"train.max_steps": [3, 5]}
    assert (resumed["status"], resumed["step"]) == ("finished", 3)
    assert record["started"] <= resumed["started"] <= resumed["ended"] == record["ended"]
    assert "max_steps: 5" in (longer.directory / "config.yaml").read_text()


def test_changed_data_is_refused_and_named(quick_run: Callable[..., Any], tmp_path: Path) -> None:
    path = rows_override(tmp_path / "rows.jsonl", *({"text": f"row {i}"} for i in range(8)))
    result = quick_run("data=jsonl", path, "algorithm=pretrain")
    mark_killed(result.directory)
    record = (result.directory / "run.json").read_bytes()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"another data: .*rows.jsonl: .*, was "):
        run(compose(f"resume={result.directory}", "train.max_steps=9"))
    assert (result.directory / "run.json").read_bytes() == record
    assert "max_steps: 3" in (result.directory / "config.yaml").read_text()


def test_a_changed_starting_adapter_is_refused(quick_run: Callable[..., Any]) -> None:
    start = quick_run(name="start").saved
    second = quick_run(f"adapter={start}", name="second")
    mark_killed(second.directory)
    weights = load_file(start / "adapter_model.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()}, start / "adapter_model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"started with another adapters: .*start/adapter: sha"):
        run(compose(f"resume={second.directory}"))


def test_an_unreadable_record_is_an_error(quick_run: Callable[..., Any]) -> None:
    result = quick_run()
    (result.directory / "run.json").write_text("")
    with pytest.raises(ConfigError, match=r"run.json cannot be read .* the run cannot go on"):
        run(compose(f"resume={result.directory}"))


def test_a_run_with_earlier_target_names_can_be_resumed(
    quick_run: Callable[..., Any],
) -> None:
    constant = ["train.lr_scheduler_type=constant", "quant=nf4"]
    uninterrupted = quick_run(*constant, "train.max_steps=5", name="whole")
    first = quick_run(*constant, name="short")
    path = first.directory / "config.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))
    values = {key: value for key, value in values.items() if key not in SWITCHES}
    path.write_text(OmegaConf.to_yaml(with_oldest_names(values)))
    for old in ("lora_exp.model.load", "lora_exp.model.bnb_4bit", "lora_exp.data.jsonl"):
        assert f"_target_: {old}\n" in path.read_text()
    assert run_status(first.directory, compose(f"resume={first.directory}")) == "finished"
    assert inspect(first.directory)["method"] == "LORA"
    assert base_config(find(first.directory)).quant._target_ == "lora_exp.model.loading.bnb_4bit"
    longer = run(compose(f"resume={first.directory}", "train.max_steps=5"))
    weights = "adapter_model.safetensors"
    assert digest(longer.saved)[weights] == digest(uninterrupted.saved)[weights]
    record = json.loads((first.directory / "run.json").read_text())
    assert record["resumed"][0]["changes"] == {"train.max_steps": [3, 5]}
