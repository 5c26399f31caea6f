"""The base of a saved adapter or model: its name, and the config that loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.after.base_config import base_config, parse_base
from lora_exp.after.saved import find
from lora_exp.config.door import build
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError, SavedError
from tests.after.copies import copy_run

Trained = Callable[..., Path]


def test_the_base_is_quantised_as_in_the_run_unless_a_flag_sets_it(trained: Trained) -> None:
    saved = find(trained("peft=lora", "quant=nf4"))
    assert base_config(saved).quant.quant_type == "nf4"
    assert base_config(saved, quant="none").quant is None
    assert base_config(saved, quant="int8").quant.outlier_threshold == 6
    assert base_config(saved, base="tiny").model.path == "pkg://lora_exp/assets/tiny"
    assert base_config(saved, base="some/model").model.path == "some/model"
    with pytest.raises(ConfigError, match="nf5"):
        base_config(saved, base="tiny", quant="nf5")


@pytest.mark.parametrize(("adapted", "experts"), [(None, True), (["experts.down_proj"], False)])
def test_experts_that_are_adapted_stay_in_floats(
    adapted: list[str] | None, experts: bool, trained: Trained
) -> None:
    saved = find(trained("peft=lora"))
    saved = replace(saved, adapter=saved.adapter | {"target_parameters": adapted})
    assert base_config(saved, quant="nf4").quant.experts is experts
    assert "experts" not in base_config(saved, quant="int8").quant


def test_a_run_before_experts_were_quantised_is_opened_without(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=lora", "quant=nf4"), tmp_path / "run")
    settings = OmegaConf.load(run / "config.yaml")
    fingerprint_before = fingerprint(settings)
    del settings.quant.experts
    OmegaConf.save(settings, run / "config.yaml")
    cfg = base_config(find(run))
    assert fingerprint(settings) == fingerprint_before  # of a base without experts nothing differs
    assert not build(cfg, "quant").experts


def test_an_adapter_without_its_run_names_its_base_and_never_trusts_its_code(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("trust_remote_code: false", "trust_remote_code: true")
    )
    assert base_config(find(run)).model.trust_remote_code is False
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    assert find(alone).run is None
    assert base_config(find(alone)).model.path == "pkg://lora_exp/assets/tiny"
    assert base_config(find(alone)).quant is None


def test_a_base_is_loaded_by_all_keys_of_its_run_but_its_own_code(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    own = compose("tracking=none").model
    values = {key: f"own {key}" for key in own if key not in ("_target_", "attn_implementation")}
    settings = OmegaConf.load(run / "config.yaml")
    settings.model.update(values)
    OmegaConf.save(settings, run / "config.yaml")
    found = base_config(find(run)).model
    assert {key for key in values if found[key] != values[key]} == {"trust_remote_code"}


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "lora_exp.model.loading.load", "path": "evil/repo", "trust_remote_code": True},
        {"_target_": "os.system", "command": "true"},
        {
            "_target_": "lora_exp.model.loading.bnb_4bit",
            "quant_type": {"_target_": "builtins.print"},
        },
        "nf4",
    ],
)
def test_a_config_saved_with_an_adapter_can_call_no_other_code(
    trained: Trained, tmp_path: Path, node: object
) -> None:
    run = copy_run(trained("peft=lora", "quant=nf4"), tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, "quant", node, merge=False, force_add=True)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(SavedError, match=r"may call other code .*; give --quant"):
        base_config(find(run))
    assert base_config(find(run), quant="nf4").quant.quant_type == "nf4"
    OmegaConf.update(config, "model", {"_target_": "my.load", "path": "x"}, merge=False)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(SavedError, match=r"may call other code .*; give --base"):
        base_config(find(run), quant="none")
    assert (
        base_config(find(run), base="tiny", quant="none").model._target_
        == "lora_exp.model.loading.load"
    )


def test_a_base_is_loaded_at_the_commit_in_the_record(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    record = json.loads((run / "run.json").read_text()) | {"base": "0123456789" * 4}
    (run / "run.json").write_text(json.dumps(record))
    assert base_config(find(run)).model.revision == "0123456789" * 4
    assert base_config(find(run), base="some/model").model.revision is None


def test_a_base_is_name_and_path_unless_a_folder_has_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_base("a=b") == ("a", "b")
    (tmp_path / "a=b").mkdir()
    assert parse_base("a=b") == ("a=b", "a=b")


@pytest.mark.parametrize(
    ("trained_with", "expected"),
    [("eager", "eager"), ("sdpa", "sdpa"), ("someone/kernels", "auto"), (None, "auto")],
)
def test_a_base_uses_the_attention_implementation_of_its_run(
    trained: Trained, tmp_path: Path, trained_with: str | None, expected: str
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    assert record["attention"] == "sdpa"  # what auto stood for
    (run / "run.json").write_text(json.dumps(record | {"attention": trained_with}))
    for base in (None, "lora_exp/assets/tiny"):
        assert base_config(find(run), base).model.attn_implementation == expected
    assert base_config(find("lora_exp/assets/tiny")).model.attn_implementation == "auto"


@pytest.mark.parametrize(("configured", "expected"), [("eager", "eager"), (None, "auto")])
def test_without_a_recorded_attention_that_of_the_config_is_used(
    trained: Trained, tmp_path: Path, configured: str | None, expected: str
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    del record["attention"]
    (run / "run.json").write_text(json.dumps(record))
    config = OmegaConf.load(run / "config.yaml")
    config.model.attn_implementation = configured
    OmegaConf.save(config, run / "config.yaml")
    assert base_config(find(run)).model.attn_implementation == expected
