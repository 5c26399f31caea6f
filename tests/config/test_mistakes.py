"""A mistake in overrides is one line: the key, what is wrong, what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp import compose
from lora_exp.config.mistakes import translate_error
from lora_exp.errors import ConfigError, SavedError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "quant=nf5",
            "quant: there is no 'nf5' (did you mean nf4?); there are fp4, int8, nf4, none",
        ),
        ("quant=", "quant: there is no ''; there are fp4, int8, nf4, none"),
        ("targets=[q_proj]", "to the adapter: peft.target_modules=[q_proj,v_proj]"),
        ("targets=[qv,mlp]", "give one option, like targets=NAME; several of them are a sweep: -m"),
        ("~quant", "quant: give one option, like quant=NAME"),
        ("quant=3", "an option is a word, like quant=nf4 or quant=none"),
        ("=3", "an option is a word"),
        ("peft=[1,lora]", "an option is a word, like quant=nf4 or quant=none"),
        ("+quant=nf4", "quant: is there already; give quant=... without the +"),
        ("+peft.r=8", "peft.r: is there already; give peft.r=... without the +"),
        ("peft.r=2,4", "peft.r: has several values; -m peft.r=A,B sweeps over them, peft.r=[A,B]"),
        ("peft.rr=3", "peft.rr: no such key (did you mean r?)"),
        ("peft.r.x=3", "peft.r.x: no such key"),
        ("hydra.launcher.slurm.acount=x", "slurm.acount: no such key (did you mean account?)"),
        ("hydra.launcher.slurm.cpus=x", "slurm.cpus: cannot take this value, but one of type Int"),
        ("train.neftune_noise_alpha=5", "can be added: give +train.neftune_noise_alpha=..."),
        ("peft.init_lora_weights=true", "give +peft.init_lora_weights=..."),
        ("quant=none,nf4", "quant: has several values; -m quant=A,B sweeps over them"),
        ("peft.rank_pattern=[", 'peft.rank_pattern: cannot be read; give key=value'),
        ("a b", "a b: cannot be read; give key=value"),
        ("peft.r=${product:2,${seed}}", "peft.r: cannot be read; quote it twice: 'peft.r="),
        ("peft.r=${train.nope}", "peft.r: Interpolation key 'train.nope' not found"),
        ("~seed=3", "overrides: Could not delete from config. The value of 'seed' is 42 and not 3"),
        ("resume=nowhere", "resume: no run in nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.yaml").write_text("r: [8\nlora_alpha: 3\n")
    with pytest.raises(ConfigError, match=r"an option's file: .*mine.yaml.* line 2"):
        compose("peft=mine", config_dir=tmp_path)


@pytest.mark.parametrize("value", ["canary[", "canary,canary", "canary"])
def test_a_value_that_may_be_a_secret_is_not_repeated(value: str) -> None:
    for plus in ("", "+"):
        with pytest.raises(ConfigError) as error:
            compose(f"{plus}train.hub_token={value}")
        assert "train.hub_token" in str(error.value)
        assert "canary" not in str(error.value)


def test_an_error_about_a_key_of_another_option_names_the_group() -> None:
    with pytest.raises(ConfigError, match=r"peft\.r: exists with another option of peft"):
        compose("peft=none", "peft.r=8")


def test_our_errors_stay_the_same_and_other_errors_are_not_translated() -> None:
    saved_error = SavedError("gone")
    assert translate_error(saved_error) is saved_error
    assert translate_error(ValueError("no number")) is None
    assert translate_error(FileNotFoundError("no file")) is None
