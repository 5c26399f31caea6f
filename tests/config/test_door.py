"""The only place that imports targets: which are trusted, and names from earlier versions."""

from __future__ import annotations

import pathlib
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.config.door import (
    CONF,
    RENAMED,
    build,
    hidden,
    is_trusted,
    renamed,
    selected,
    shipped_targets,
    with_oldest_names,
)
from lora_exp.errors import ConfigError

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


def test_building_refuses_untrusted_targets_without_validation(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    cfg = OmegaConf.create(
        {"trusted_targets": [], "x": {"_target_": "pathlib.Path.touch", "self": str(mark)}}
    )
    with pytest.raises(ConfigError, match="is not trusted"):
        build(cfg, "x")
    assert not mark.exists()


def test_a_target_trusted_on_the_command_line_is_built() -> None:
    cfg = OmegaConf.create(
        {"trusted_targets": ["pathlib.PurePath"], "x": {"_target_": "pathlib.PurePath"}}
    )
    assert isinstance(build(cfg, "x"), pathlib.PurePath)


def test_null_builds_nothing() -> None:
    assert build(compose(), "quant") is None


def test_only_door_imports_instantiate() -> None:
    sources = Path(CONF.parent / "lora_exp").rglob("*.py")
    importing = {path.name for path in sources if "import instantiate" in path.read_text()}
    assert importing == {"door.py"}


def test_every_shipped_target_is_trusted() -> None:
    assert all(is_trusted(target) for target in shipped_targets())


def test_every_earlier_name_maps_to_a_shipped_target_and_back() -> None:
    assert set(RENAMED.values()) <= shipped_targets()
    assert len(set(RENAMED.values())) == len(RENAMED)
    assert not set(RENAMED) & shipped_targets()
    deep = {"a": [{"_target_": old, "b": old} for old in RENAMED], "_target_": "peft.LoraConfig"}
    new = {"a": [{"_target_": n, "b": o} for o, n in RENAMED.items()], "_target_": deep["_target_"]}
    assert renamed(deep) == new
    assert with_oldest_names(new) == deep


def test_a_users_option_may_use_an_earlier_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "defaults: [jsonl]\n_target_: lora_exp.data.jsonl\n"
        "path: pkg://lora_exp/assets/demo_eval.jsonl\n"
    )
    assert compose("data=mine", config_dir=tmp_path).data._target_ == "lora_exp.data.rows.jsonl"


def test_a_hidden_section_comes_back_whatever_happens() -> None:
    cfg = OmegaConf.create({"hydra": {"job": 1}, "a": {"b": "${c}"}, "c": [2]})
    with suppress(ValueError), hidden(cfg, "hydra") as rest:
        assert OmegaConf.to_container(rest, resolve=True) == {"a": {"b": [2]}, "c": [2]}
        raise ValueError
    assert list(cfg) == ["hydra", "a", "c"]


def test_a_key_that_is_not_there_selects_nothing() -> None:
    values = {"a": {"b": [{"c": 1}]}, "d": None}
    assert selected(values, "a.b.0.c") == 1
    assert [selected(values, key) for key in ("a.x", "d.x", "x.y")] == [None] * 3
