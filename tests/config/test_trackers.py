"""Trackers that a config names, and the config that they show."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.config import trackers
from lora_exp.config.settled import fingerprint
from lora_exp.config.trackers import sent_config, tracker_keys
from lora_exp.errors import ConfigError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the packages of all trackers were there."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("options", "keys", "choice"),
    [
        ("wandb", [""], "wandb"),
        ("tensorboard", ["tensorboard"], "tensorboard"),
        ("[wandb,tensorboard]", ["", "tensorboard"], "wandb+tensorboard"),
        ("[mlflow,trackio]", ["mlflow", "trackio"], "mlflow+trackio"),
        ("none", [], "none"),
    ],
)
def test_one_tracker_or_several_are_chosen(
    installed: None, options: str, keys: list[str], choice: str
) -> None:
    cfg = compose(f"tracking={options}")
    assert tracker_keys(cfg.get("tracking")) == keys
    assert cfg.choices.tracking == choice


def test_the_settings_of_several_are_their_own_and_checked(installed: None) -> None:
    words = ["tracking=[wandb,mlflow]", "tracking.mode=offline", "tracking.mlflow.uri=here"]
    cfg = compose(*words)
    assert (cfg.tracking.mode, cfg.tracking.mlflow.uri) == ("offline", "here")
    with pytest.raises(ConfigError) as refused:
        compose(*words, "+tracking.mlflow.url=x", "+tracking.mlflow.run=x", "tracking.mode=on")
    faults = dict(refused.value.faults)
    assert "did you mean uri" in faults["tracking.mlflow.url"]
    assert faults["tracking.mlflow.run"] == "belongs to the run; leave it out"
    assert "is none of auto" in faults["tracking.mode"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "lora-exp\[trackio\]"') as refused:
        compose("tracking=[wandb,trackio]")
    assert [key for key, _ in refused.value.faults] == ["tracking.trackio"]


def test_a_mode_of_wandb_that_does_not_exist_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(ConfigError, match=r"^WANDB_MODE: .*'of-line' is none of online, offline"):
        compose()
    for override in ("tracking.mode=offline", "tracking=none"):  # nothing reads the variable
        compose(override)


def test_trackers_and_a_sweeps_name_do_not_change_what_is_computed(installed: None) -> None:
    named = compose("tracking=[tensorboard,mlflow]", "sweep_name=ranks")
    assert fingerprint(named) == fingerprint(compose())
    assert "ranks" not in named.name
    with pytest.raises(ConfigError, match="sweep_name: give 1 to 128 characters"):
        compose(f"sweep_name={'x' * 129}")


@pytest.mark.parametrize(
    ("overrides", "targets"),
    [
        ([], "all_linear"),
        (["targets=qv"], "qv"),
        (["peft.target_modules=[q_proj,v_proj]"], "q_proj,v_proj"),
        (["peft=none"], None),
    ],
)
def test_targets_are_what_was_trained(overrides: list[str], targets: Any) -> None:
    config = sent_config(compose(*overrides))
    assert config["choices"].get("targets") == targets
    assert config["targets"] == (targets.split(",") if targets and "," in targets else targets)


def test_composing_with_trackers_imports_none_of_them() -> None:
    code = (
        "import sys; from lora_exp.config import trackers; trackers.find_spec = lambda name: name\n"
        "from lora_exp import compose; compose('tracking=[wandb,tensorboard,mlflow,trackio]')\n"
        "names = {'torch', 'wandb', 'tensorboard', 'mlflow', 'trackio'}\n"
        "print(names & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
