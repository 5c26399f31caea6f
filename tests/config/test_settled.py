"""Composition: options, names, fingerprints and the one door."""

from __future__ import annotations

import os
import pathlib
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from lora_exp import compose
from lora_exp.config.door import CONF, build, is_trusted, shipped_targets
from lora_exp.config.settled import GROUPS, fingerprint, product, run_dir, settle
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset

OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "experiment"
)
NEEDS = {"model=local": ["model.path=pkg://lora_exp/assets/tiny"]}
NEEDS |= {"data=jsonl": ["data.path=pkg://lora_exp/assets/demo_eval.jsonl"]}
NEEDS |= {"data=hub": ["data.path=some/rows"]}
REWARDS = ["algorithm.rewards=[lora_exp.rewards.exact_match]"]
NEEDS |= {f"algorithm={name}": REWARDS for name in ("grpo", "rloo", "ppo")}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_validates(option: str) -> None:
    group, _, name = option.partition("=")
    cfg = compose(option, *NEEDS.get(option, []))
    assert cfg.choices[group] == name


@pytest.mark.parametrize("preset", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_every_preset_composes_validates_and_says_why_it_exists(preset: str) -> None:
    cfg = compose(f"experiment={preset}")
    assert cfg.choices.experiment == preset
    head = (CONF / "experiment" / f"{preset}.yaml").read_text().splitlines()
    assert head[0] == "# @package _global_"
    assert head[1].startswith("# ")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "r16-all_linear"),
        (["peft.r=8", "quant=nf4", "targets=qv"], "r8-nf4-qv"),
        (["peft=dora", "peft.r=4"], "dora-r4-all_linear"),
        (["train.learning_rate=1e-4"], "r16-all_linear-learning_rate=1e-4"),
        (["peft=none", "seed=7"], "full-seed=7"),
        (["peft.target_modules=[q_proj,v_proj]"], "r16-target_modules=_q_proj,v_proj_"),
        (["model=local", "model.path=pkg://hydra/conf"], "r16-all_linear-local-path=conf"),
        (["train.eval_strategy=no", "data.max_rows=9"], "r16-all_linear-max_rows=9"),
        (["name=mine", "peft.r=2"], "mine"),
    ],
)
def test_a_run_is_named_after_what_was_chosen(overrides: list[str], name: str) -> None:
    assert compose(*overrides).name == name


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


def test_a_product_of_rates_is_free_of_binary_dust() -> None:
    assert product(2e-5, 10, 10) == 0.002


def test_a_composed_config_is_read_only() -> None:
    with pytest.raises(ReadonlyConfigError):
        compose().seed = 1


def test_an_unknown_option_lists_the_options() -> None:
    with pytest.raises(ConfigError, match="rslora"):
        compose("peft=lroa")


def test_options_of_ones_own_are_found_beside_the_shipped_ones(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults: [lora]\nr: 3\n")
    assert compose("peft=mine", config_dir=tmp_path).peft.r == 3


def test_the_fingerprint_sees_what_is_computed_and_nothing_else() -> None:
    one = fingerprint(compose())
    assert fingerprint(compose("name=other", "tracking=none")) == one
    assert fingerprint(compose("peft.r=16")) == one
    assert fingerprint(compose("peft.r=8")) != one
    assert fingerprint(compose("seed=1")) != one


def test_a_missing_value_is_named_with_its_cure() -> None:
    with pytest.raises(ConfigError, match=r"data.path: is required; give data.path="):
        compose("data=jsonl")


def test_an_interpolation_that_finds_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"peft\.r: Interpolation key 'nope' not found"):
        compose("peft.r=${nope}")


def test_a_run_directory_is_new_each_time_or_the_resumed_one(tmp_path: Path) -> None:
    assert run_dir(None) != run_dir(None)
    (tmp_path / "config.yaml").touch()
    assert run_dir(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ConfigError, match="no run in"):
        run_dir(str(tmp_path / "nothing"))


def test_a_resumed_run_takes_its_own_config_and_no_other(tmp_path: Path) -> None:
    cfg = compose("peft.r=3")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    resumed = compose(f"resume={tmp_path}")
    assert (resumed.peft.r, resumed.name, resumed.resume) == (3, cfg.name, str(tmp_path))
    assert fingerprint(resumed) == fingerprint(cfg)
    with pytest.raises(ConfigError, match=r"peft\.r: 8, but the run was started with 3"):
        compose(f"resume={tmp_path}", "peft.r=8")


def test_a_package_path_finds_the_file_that_the_package_carries() -> None:
    assert (asset("pkg://lora_exp/assets/tiny") / "config.json").is_file()
    assert (asset("pkg://hydra/conf") / "__init__.py").is_file()
    assert asset("./here") == Path("here")
    with pytest.raises(ConfigError, match="no package"):
        asset("pkg://not_installed/x")


PROBES = [
    "os.system",
    "builtins.eval",
    "builtins.open",
    "torch.load",
    "torch.hub.load",
    "numpy.load",
    "pathlib.Path.write_text",
    "urllib.request.urlopen",
    "multiprocessing.Process",
    "shutil.copyfile",
    "subprocess.run",
    "pip._internal.main",
    "hydra.utils.instantiate",
    "importlib.import_module",
    "lora_exp.config.settled.json.loads",
    "lora_exp.config.door.instantiate",
    "lora_exp.record.run.Path.write_text",
    "lora_exp.tracking.wandb.os.system",
    "lora_exp",
    "peft.LoraConfig.from_pretrained",
    "trl",
]


@pytest.mark.parametrize("target", PROBES)
def test_a_probe_is_refused_before_anything_is_imported(target: str) -> None:
    assert not is_trusted(target)
    with pytest.raises(ConfigError, match="is not trusted"):
        compose(f"peft._target_={target}")


def test_a_probe_deep_inside_a_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.deep\.0\._target_: 'os\.system' is not trusted"):
        compose("+train.deep=[{_target_: os.system, command: x}]")


def test_the_door_itself_refuses_what_validation_never_saw(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    cfg = OmegaConf.create(
        {"trusted_targets": [], "x": {"_target_": "pathlib.Path.touch", "self": str(mark)}}
    )
    with pytest.raises(ConfigError, match="is not trusted"):
        build(cfg, "x")
    assert not mark.exists()


def test_a_target_named_on_the_command_line_runs() -> None:
    cfg = OmegaConf.create(
        {"trusted_targets": ["pathlib.PurePath"], "x": {"_target_": "pathlib.PurePath"}}
    )
    assert isinstance(build(cfg, "x"), pathlib.PurePath)


def test_trust_comes_from_the_command_line_never_from_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "evil.yaml").write_text("# @package _global_\ntrusted_targets: [os.system]\n")
    with pytest.raises(ConfigError, match="only the command line"):
        compose("experiment=evil", config_dir=tmp_path)


def test_code_that_came_with_a_model_needs_the_command_line(tmp_path: Path) -> None:
    assert compose("model.trust_remote_code=true").model.trust_remote_code
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "evil.yaml").write_text("# @package _global_\nmodel: {trust_remote_code: true}\n")
    with pytest.raises(ConfigError, match="only the command line"):
        compose("experiment=evil", config_dir=tmp_path)


def test_null_builds_nothing() -> None:
    assert build(compose(), "quant") is None


def test_only_the_door_knows_instantiate() -> None:
    sources = Path(CONF.parent / "lora_exp").rglob("*.py")
    knowing = {path.name for path in sources if "import instantiate" in path.read_text()}
    assert knowing == {"door.py"}


def test_a_folder_of_options_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir: .* is no folder"):
        compose(config_dir=tmp_path / "none")


def test_every_shipped_target_is_trusted_and_settling_needs_no_environment() -> None:
    assert all(is_trusted(target) for target in shipped_targets())
    assert "HYDRA_FULL_ERROR" not in os.environ
    plain = OmegaConf.create({"resume": None, "adapter": None, "trusted_targets": [], "name": "x"})
    chosen = dict.fromkeys(GROUPS, "none")
    assert settle(plain, {"hydra/launcher": "basic"} | chosen, []).choices == chosen
