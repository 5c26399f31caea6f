"""Settings of a search are checked before anything loads."""

from __future__ import annotations

from typing import Any

import pytest

import lora_exp.search.settings as module
from lora_exp.errors import ConfigError, ExtraError
from lora_exp.search.settings import read_settings
from tests.search.spaces import DEFAULTS, space_of

SPACE = space_of("a=1,2", "+b=tag(log,interval(1e-3,1))")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, "hydra.sweeper.trials: 0 is no number of trials"),
        ({"batch": 0}, "hydra.sweeper.batch: 0 trials cannot train together"),
        (
            {"sampler": "tpee"},
            "'tpee' is none of tpe, gp, random, qmc, nsga2, grid (did you mean tpe?)",
        ),
        ({"sampler": "nsga2", "batch": 1}, "hydra.sweeper.batch: sampler=nsga2 breeds"),
        ({"sampler": "grid"}, "grid cannot try all of +b: 0.001 to 1, logarithmic"),
        ({"direction": "maximise"}, "(did you mean maximize, minimize?)"),
        ({"direction": "maximize"}, "direction: is against goal=minimize"),
        ({"sampler": "random", "learn_from": ["x"]}, "sampler=random learns from no other sweep"),
        ({"start": [{"c": 1}]}, "hydra.sweeper.start: c is not searched"),
        ({"start": [{"a": 3}]}, "hydra.sweeper.start: a=3 is outside the space: 1, 2"),
        ({"start": [{"b": 2}]}, "+b=2 is outside the space: 0.001 to 1, logarithmic"),
        ({"start": ["a=3"]}, "hydra.sweeper.start: is a list of guesses"),
        ({"max_bytes": "8 chips"}, "hydra.sweeper.max_bytes: '8 chips' is no limit"),
        ({"objectives": ["eval/loss"]}, "hydra.sweeper.objectives: are goals by name"),
        ({"objectives": {"eval/loss": "minimize"}}, "are two or more"),
        (
            {"objectives": {"eval/loss": "minimize", "bytes": "minimize"}, "direction": "maximize"},
            "direction: is against goal=minimize",
        ),
        ({"sampler": "grid", "start": [{"a": 1}]}, "sampler=grid trains every cell"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_settings(DEFAULTS | values, SPACE, "eval/loss", "minimize")
    assert message in str(refused.value)


def test_the_direction_is_the_goal_and_guesses_are_texts_of_overrides() -> None:
    section = DEFAULTS | {"start": [{"b": 0.5, "a": 2}]}
    settings = read_settings(section, SPACE, "eval/accuracy", "maximize")
    assert settings.direction == "maximize"
    assert settings.start == ({"+b": "0.5", "a": "2"},)
    assert read_settings(DEFAULTS, SPACE, None, None).direction == "minimize"


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r'optuna is missing: pip install "lora-exp\[search\]"'):
        read_settings(DEFAULTS, SPACE, "eval/loss", "minimize")
    assert (
        read_settings(DEFAULTS | {"sampler": "qmc"}, SPACE, "eval/loss", "minimize").sampler
        == "qmc"
    )


def test_each_objective_has_a_direction() -> None:
    objectives = {"eval/loss": "minimize", "eval/margin": "maximize"}
    settings = read_settings(DEFAULTS | {"objectives": objectives}, SPACE, "eval/loss", "minimize")
    assert settings.directions == ["minimize", "maximize"]
    assert read_settings(DEFAULTS, SPACE, "eval/x", "maximize").directions == ["maximize"]
