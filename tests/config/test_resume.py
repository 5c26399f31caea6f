"""A run that goes on may be told to train longer and to report otherwise, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lora_exp import compose, run
from lora_exp.after.inspection import inspect
from lora_exp.after.saved import base_config, find
from lora_exp.config.door import first_named
from lora_exp.errors import ConfigError
from lora_exp.record.standing import standing
from tests.conftest import QUICK
from tests.test_experiment import digest, killed, rows_of


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(compose("tracking=none", *QUICK, "train.learning_rate=2e-4", "peft.r=4"), folder)
    killed(folder)
    return folder


@pytest.mark.parametrize(
    ("told", "message"),
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
        ("+data@other=jsonl", "data@other: puts an option where the run has its own"),
        ("name=other", "name: other, but the run was started with"),
    ],
)
def test_what_shapes_the_result_is_refused(begun: Path, told: str, message: str) -> None:
    if "smollm2_135m" in told:
        told = "model=local model.path=elsewhere"
        message = "model: local, but the run was started with tiny"
    with pytest.raises(ConfigError, match=message):
        compose(f"resume={begun}", *told.split())


def test_every_difference_is_told_at_once(begun: Path) -> None:
    with pytest.raises(ConfigError, match="2 faults"):
        compose(f"resume={begun}", "seed=1", "peft.r=5", "train.max_steps=9", "peft.lora_alpha=32")


def test_what_was_said_before_may_be_said_again_and_reports_may_change(begun: Path) -> None:
    cfg = compose(
        f"resume={begun}",
        "peft.r=4",
        "train.logging_steps=2",
        "tracking=wandb",
        "train.max_steps=9",
    )
    assert (cfg.train.logging_steps, cfg.train.max_steps) == (2, 9)
    assert cfg.tracking is not None
    assert cfg.choices.tracking == "wandb"


def test_a_finished_run_trains_on_when_it_is_given_more_steps(
    quick_run: Callable[..., Any],
) -> None:
    constant = ["train.lr_scheduler_type=constant", "peft.lora_dropout=0.1"]
    whole = quick_run(*constant, "train.max_steps=5", name="whole")
    first = quick_run(*constant, name="short")
    with pytest.raises(ConfigError, match=r"is finished; a higher train\.max_steps"):
        run(compose(f"resume={first.directory}"))
    longer = run(compose(f"resume={first.directory}", "train.max_steps=5"))
    weights = "adapter_model.safetensors"  # the card has another name
    assert digest(longer.saved)[weights] == digest(whole.saved)[weights]
    record = json.loads((longer.directory / "run.json").read_text())
    assert record["resumed"] == [
        {"status": "finished", "changes": {"train.max_steps": [3, 5]}},
    ]
    assert "max_steps: 5" in (longer.directory / "config.yaml").read_text()


def test_changed_data_is_refused_and_named(quick_run: Callable[..., Any], tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl", *({"text": f"row {i}"} for i in range(8)))
    result = quick_run("data=jsonl", path, "algorithm=pretrain")
    killed(result.directory)
    record = (result.directory / "run.json").read_bytes()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"another data: .*rows.jsonl: .*, was "):
        run(compose(f"resume={result.directory}", "train.max_steps=9"))
    assert (result.directory / "run.json").read_bytes() == record
    assert "max_steps: 3" in (result.directory / "config.yaml").read_text()


def test_a_start_that_has_changed_is_refused(quick_run: Callable[..., Any]) -> None:
    start = quick_run(name="start").saved
    second = quick_run(f"adapter={start}", name="second")
    killed(second.directory)
    weights = load_file(start / "adapter_model.safetensors")
    save_file({k: w + 1 for k, w in weights.items()}, start / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"started with another adapters: .*start/adapter: sha"):
        run(compose(f"resume={second.directory}"))


def test_an_unreadable_record_is_told(quick_run: Callable[..., Any]) -> None:
    result = quick_run()
    (result.directory / "run.json").write_text("")
    with pytest.raises(ConfigError, match=r"run.json cannot be read .* the run cannot go on"):
        run(compose(f"resume={result.directory}"))


def test_a_run_of_before_the_rooms_goes_on_and_is_known_again(
    quick_run: Callable[..., Any],
) -> None:
    constant = ["train.lr_scheduler_type=constant", "quant=nf4"]
    whole = quick_run(*constant, "train.max_steps=5", name="whole")
    first = quick_run(*constant, name="short")
    path = first.directory / "config.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))
    path.write_text(OmegaConf.to_yaml(first_named(values)))
    for old in ("lora_exp.model.load", "lora_exp.model.bnb_4bit", "lora_exp.data.jsonl"):
        assert f"_target_: {old}\n" in path.read_text()
    assert standing(first.directory, compose(f"resume={first.directory}")) == "finished"
    assert inspect(first.directory)["method"] == "LORA"
    assert base_config(find(first.directory)).quant._target_ == "lora_exp.model.loading.bnb_4bit"
    longer = run(compose(f"resume={first.directory}", "train.max_steps=5"))
    weights = "adapter_model.safetensors"
    assert digest(longer.saved)[weights] == digest(whole.saved)[weights]
    record = json.loads((first.directory / "run.json").read_text())
    assert record["resumed"][0]["changes"] == {"train.max_steps": [3, 5]}
