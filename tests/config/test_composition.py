"""Every option and preset composes, and so do the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp import compose
from lora_exp.config import trackers
from lora_exp.config.door import CONF
from lora_exp.errors import ConfigError

OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "experiment"
)
NEEDS = {"model=local": ["model.path=pkg://lora_exp/assets/tiny"]}
NEEDS |= {"data=jsonl": ["data.path=pkg://lora_exp/assets/demo_eval.jsonl"]}
NEEDS |= {"data=hub": ["data.path=some/rows"]}
NEEDS |= {"early_stopping=threshold": ["early_stopping.upper=4"]}
REWARDS = ["algorithm.rewards=[lora_exp.rewards.exact_match]"]
NEEDS |= {f"algorithm={name}": REWARDS for name in ("grpo", "rloo", "ppo")}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_validates(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)  # as if all were installed
    group, _, name = option.partition("=")
    cfg = compose(option, *NEEDS.get(option, []))
    assert cfg.choices[group] == name


@pytest.mark.parametrize("preset", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_every_preset_composes_and_begins_with_a_comment(preset: str) -> None:
    cfg = compose(f"experiment={preset}")
    assert cfg.choices.experiment == preset
    head = (CONF / "experiment" / f"{preset}.yaml").read_text().splitlines()
    assert head[0] == "# @package _global_"
    assert head[1].startswith("# ")


def test_an_unknown_option_lists_the_options() -> None:
    with pytest.raises(ConfigError, match="rslora"):
        compose("peft=lroa")


def test_a_users_options_are_found_next_to_the_shipped_ones(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults: [lora]\nr: 3\n")
    assert compose("peft=mine", config_dir=tmp_path).peft.r == 3


def test_a_missing_folder_of_options_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir: .* is no folder"):
        compose(config_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 0.002),
        (["model=qwen3_0_6b"], 2e-4),
        (["model=qwen3_0_6b", "peft=none"], 2e-5),
        (["model=qwen3_0_6b", "peft=ia3"], 2e-3),
        (["train.learning_rate=3e-4"], 3e-4),
    ],
)
def test_the_learning_rate_follows_method_and_model(overrides: list[str], rate: float) -> None:
    assert compose(*overrides).train.learning_rate == rate


def test_several_values_of_a_group_are_given_as_a_section() -> None:
    peft = compose("peft={r:4,lora_alpha:8}").peft
    assert (peft.r, peft.lora_alpha, peft.target_modules) == (4, 8, "all_linear")
