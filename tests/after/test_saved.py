"""What lies at a path, and how its base is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_exp.after.saved import base_config, claim, find, find_all
from lora_exp.errors import ConfigError, SavedError

Trained = Callable[..., Path]
ADALORA = ("peft.tinit=2", "peft.tfinal=2", "peft.deltaT=1")  # for a dozen steps


def copied(run: Path, to: Path) -> Path:
    """Copy a run, to damage it."""
    shutil.copytree(run, to)
    return to


def test_a_run_its_adapter_and_its_checkpoint_are_found(trained: Trained) -> None:
    run = trained("peft=lora", "train.save_strategy=steps", "train.save_steps=6")
    assert find(run).folder == run / "adapter"
    assert find(run / "adapter").run == run
    checkpoint = find(run / "checkpoints" / "checkpoint-6")
    assert checkpoint.run == run
    assert checkpoint.base == find(run).base == "pkg://lora_exp/assets/tiny"
    assert find(run).name == find(run).record["name"]
    assert checkpoint.name == "checkpoint-6"


def test_a_run_that_has_not_ended_gives_its_newest_whole_checkpoint(
    trained: Trained, tmp_path: Path
) -> None:
    run = copied(
        trained("peft=lora", "train.save_strategy=steps", "train.save_steps=6"), tmp_path / "run"
    )
    shutil.rmtree(run / "adapter")
    assert find(run).folder.name == "checkpoint-12"
    (run / "checkpoints" / "checkpoint-12" / "optimizer.pt").unlink()
    assert find(run).folder.name == "checkpoint-6"
    with pytest.raises(SavedError, match=r"checkpoint-12 lacks optimizer\.pt"):
        find(run / "checkpoints" / "checkpoint-12")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(SavedError, match=r"\(finished\) has saved nothing yet; resume="):
        find(run)


def test_a_path_that_holds_nothing_of_the_kind_says_what_is_there(
    trained: Trained, tmp_path: Path
) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    with pytest.raises(SavedError, match=r"does not exist \(did you mean run\?\)"):
        find(tmp_path / "rum")
    with pytest.raises(SavedError, match=r"is no adapter .*there is run"):
        find(tmp_path)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SavedError, match="has no weights"):
        find(run)
    (run / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(SavedError, match=r"adapter_config\.json cannot be read"):
        find(run)
    sweep = tmp_path / "sweep"
    copied(trained("peft=lora"), sweep / "0")
    assert find(sweep).folder == sweep / "0/adapter"
    record = json.loads((sweep / "0/run.json").read_text())
    (sweep / "0/run.json").write_text(json.dumps(record | {"status": "failed", "error": "no"}))
    with pytest.raises(SavedError, match="is a sweep of which no run has finished"):
        find(sweep)


def test_several_are_told_apart_by_name(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora")
    with pytest.raises(SavedError, match="two are called"):
        find_all([run, run])
    first, second = find_all([f"one={run}", run])
    assert (first.name, first.folder) == ("one", run / "adapter")
    assert second.name == second.record["name"]
    odd = copied(run, tmp_path / "peft.r=8")
    assert find_all([odd])[0].folder == odd / "adapter"  # a path with an equals sign


def test_the_base_is_held_as_the_run_held_it_unless_asked_otherwise(trained: Trained) -> None:
    saved = find(trained("peft=lora", "quant=nf4"))
    assert base_config(saved).quant.quant_type == "nf4"
    assert base_config(saved, quant="none").quant is None
    assert base_config(saved, quant="int8").quant.outlier_threshold == 6
    assert base_config(saved, base="tiny").model.path == "pkg://lora_exp/assets/tiny"
    assert base_config(saved, base="some/model").model.path == "some/model"
    with pytest.raises(ConfigError, match="nf5"):
        base_config(saved, base="tiny", quant="nf5")


def test_an_adapter_without_its_run_names_its_base_but_runs_none_of_its_code(
    trained: Trained, tmp_path: Path
) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
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
def test_a_config_that_came_with_an_adapter_calls_nothing_of_its_own(
    trained: Trained, tmp_path: Path, node: object
) -> None:
    run = copied(trained("peft=lora", "quant=nf4"), tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, "quant", node, merge=False, force_add=True)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(SavedError, match="not ours; give --quant"):
        base_config(find(run))
    assert base_config(find(run), quant="nf4").quant.quant_type == "nf4"
    OmegaConf.update(config, "model", {"_target_": "my.load", "path": "x"}, merge=False)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(SavedError, match="not ours; give --base"):
        base_config(find(run), quant="none")
    assert (
        base_config(find(run), base="tiny", quant="none").model._target_
        == "lora_exp.model.loading.load"
    )


def test_a_record_that_is_no_json_is_told(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    (run / "run.json").write_text('{"name"')
    with pytest.raises(SavedError, match=r"run\.json cannot be read"):
        _ = find(run).record
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())


def test_a_base_is_of_the_commit_that_the_record_says(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    record = json.loads((run / "run.json").read_text()) | {"base": "0123456789" * 4}
    (run / "run.json").write_text(json.dumps(record))
    assert base_config(find(run)).model.revision == "0123456789" * 4
    assert base_config(find(run), base="some/model").model.revision is None


def test_a_claim_is_a_name_and_a_place_but_a_folder_with_an_equals_sign_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert claim("a=b") == ("a", "b")
    (tmp_path / "a=b").mkdir()
    assert claim("a=b") == ("a=b", "a=b")


@pytest.mark.parametrize(
    ("chosen", "kept"), [("eager", "eager"), ("sdpa", "sdpa"), ("someone/kernels", None)]
)
def test_a_run_attends_afterwards_as_it_trained(
    trained: Trained, tmp_path: Path, chosen: str, kept: str | None
) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    config.model.attn_implementation = chosen
    OmegaConf.save(config, run / "config.yaml")
    for base in (None, "lora_exp/assets/tiny"):
        assert base_config(find(run), base).model.attn_implementation == kept
    assert base_config(find("lora_exp/assets/tiny")).model.attn_implementation is None
