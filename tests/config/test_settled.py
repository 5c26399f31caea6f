"""A settled config: its fingerprint, and keys that only the command line may set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from lora_exp import compose
from lora_exp.config.door import renamed
from lora_exp.config.settled import GROUPS, fingerprint, product, run_dir, settled_values
from lora_exp.errors import ConfigError


def test_a_product_of_rates_has_no_rounding_error() -> None:
    assert product(2e-5, 10, 10) == 0.002


def test_a_composed_config_is_read_only() -> None:
    with pytest.raises(ReadonlyConfigError):
        compose().seed = 1


def test_the_fingerprint_depends_only_on_what_is_computed() -> None:
    default = fingerprint(compose())
    assert fingerprint(compose("name=other", "tracking=none")) == default
    assert fingerprint(compose("peft.r=16")) == default
    assert fingerprint(compose("data.num_proc=2")) == default
    assert fingerprint(compose("peft.r=8")) != default
    assert fingerprint(compose("seed=1")) != default


@pytest.mark.parametrize(
    ("scheduler", "equal"), [("cosine", True), ("reduce_lr_on_plateau", False), ("greedy", False)]
)
def test_evaluations_that_set_the_rate_are_in_the_fingerprint(scheduler: str, equal: bool) -> None:
    first, second = (
        compose(f"train.lr_scheduler_type={scheduler}", "train.eval_strategy=steps", override)
        for override in ("train.eval_steps=2", "train.eval_steps=4")
    )
    assert (fingerprint(first) == fingerprint(second)) == equal


def test_new_keys_leave_the_fingerprints_of_earlier_versions() -> None:
    assert fingerprint(compose("tracking=none")).startswith("f5a16768e415e7d4")  # before them
    assert fingerprint(compose("tracking=none", "quant=nf4")).startswith("adce10781d6038e8")
    skipping = compose("tracking=none", "quant=nf4", "quant.skip_modules=[o_proj]")
    assert not fingerprint(skipping).startswith("adce10781d6038e8")
    in_floats = compose("tracking=none", "quant=nf4", "quant.experts=false")
    assert not fingerprint(in_floats).startswith("adce10781d6038e8")
    eager = compose("tracking=none", "model.attn_implementation=eager")
    assert not fingerprint(eager).startswith("f5a16768e415e7d4")


def test_an_earlier_runs_fingerprint_does_not_change() -> None:
    config = {
        "name": "before", "train": {"max_steps": 5, "save_steps": 2}, "lockstep": {"mode": "exact"},
        "model": {"_target_": "lora_exp.model.load", "path": "pkg://lora_exp/assets/tiny"},
        "quant": {"_target_": "lora_exp.model.bnb_4bit", "quant_type": "nf4"},
        "algorithm": {"trainer": {"_target_": "lora_exp.ppo.PPOTrainer"}, "rewards": ["a.b"]},
        "data": {"_target_": "lora_exp.data.pairs", "seed": 0},
    }  # fmt: skip
    expected = "89d461b2ecdbc8c5c7d6c0484afea1ab783733b0b98c9c46e89a7e375acaf523"  # by 0.1.0
    assert fingerprint(OmegaConf.create(config)) == expected
    assert fingerprint(OmegaConf.create(renamed(config))) == expected


def test_a_missing_value_is_named_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"data.path: is required; give data.path="):
        compose("data=jsonl")


def test_an_interpolation_of_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"peft\.r: Interpolation key 'nope' not found"):
        compose("peft.r=${nope}")


def test_a_run_directory_is_new_each_time_or_the_resumed_one(tmp_path: Path) -> None:
    assert run_dir(None) != run_dir(None)
    (tmp_path / "config.yaml").touch()
    assert run_dir(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ConfigError, match="no run in"):
        run_dir(str(tmp_path / "nothing"))


def test_a_resumed_run_uses_its_saved_config(tmp_path: Path) -> None:
    cfg = compose("peft.r=3")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    resumed = compose(f"resume={tmp_path}")
    assert (resumed.peft.r, resumed.name, resumed.resume) == (3, cfg.name, str(tmp_path))
    assert fingerprint(resumed) == fingerprint(cfg)
    with pytest.raises(ConfigError, match=r"peft\.r: 8, but the run was started with 3"):
        compose(f"resume={tmp_path}", "peft.r=8")


def test_trusted_targets_are_set_only_on_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "evil.yaml").write_text("# @package _global_\ntrusted_targets: [os.system]\n")
    with pytest.raises(ConfigError, match="only the command line"):
        compose("experiment=evil", config_dir=tmp_path)


def test_code_of_a_model_is_trusted_only_on_the_command_line(tmp_path: Path) -> None:
    assert compose("model.trust_remote_code=true").model.trust_remote_code
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "evil.yaml").write_text("# @package _global_\nmodel: {trust_remote_code: true}\n")
    with pytest.raises(ConfigError, match="only the command line"):
        compose("experiment=evil", config_dir=tmp_path)


def test_settling_needs_no_environment_variables() -> None:
    assert "HYDRA_FULL_ERROR" not in os.environ
    plain = OmegaConf.create({"resume": None, "adapter": None, "trusted_targets": [], "name": "x"})
    chosen = dict.fromkeys(GROUPS, "none")
    assert settled_values(plain, {"hydra/launcher": "basic"} | chosen, [])["choices"] == chosen


def test_resuming_a_file_or_an_empty_folder_says_so_and_suggests_neither(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"rows.jsonl is a file; give the directory of a run$"):
        run_dir(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ConfigError, match=r"it has no config.yaml$"):
        run_dir(str(tmp_path))
