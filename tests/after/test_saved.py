"""Runs, adapters and checkpoints at a path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.after.evaluation import _read, _tokenised
from lora_exp.after.loading import Loaded
from lora_exp.after.saved import Saved, find, find_all
from lora_exp.data.encoding import IGNORED
from lora_exp.errors import SavedError
from tests.after.copies import copy_run

Trained = Callable[..., Path]
ADALORA = ("peft.tinit=2", "peft.tfinal=2", "peft.deltaT=1")  # so that it fits into a dozen steps


def test_a_run_its_adapter_and_its_checkpoint_are_found(trained: Trained) -> None:
    run = trained("peft=lora", "train.save_strategy=steps", "train.save_steps=6")
    assert find(run).folder == run / "adapter"
    assert find(run / "adapter").run == run
    checkpoint = find(run / "checkpoints" / "checkpoint-6")
    assert checkpoint.run == run
    assert checkpoint.base == find(run).base == "pkg://lora_exp/assets/tiny"
    assert find(run).name == find(run).record["name"]
    assert checkpoint.name == "checkpoint-6"


def test_an_unfinished_run_gives_its_newest_whole_checkpoint(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(
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


def test_an_error_names_what_is_at_the_path(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    with pytest.raises(SavedError, match=r"does not exist \(did you mean run\?\)"):
        find(tmp_path / "rum")
    with pytest.raises(SavedError, match=r"is no adapter .*it has run"):
        find(tmp_path)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SavedError, match="has no weights"):
        find(run)
    (run / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(SavedError, match=r"adapter_config\.json cannot be read"):
        find(run)
    sweep = tmp_path / "sweep"
    copy_run(trained("peft=lora"), sweep / "0")
    assert find(sweep).folder == sweep / "0/adapter"
    record = json.loads((sweep / "0/run.json").read_text())
    (sweep / "0/run.json").write_text(json.dumps(record | {"status": "failed", "error": "no"}))
    with pytest.raises(SavedError, match="is a sweep without a best run"):
        find(sweep)


def test_several_adapters_are_distinguished_by_name(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora")
    with pytest.raises(SavedError, match="two are called"):
        find_all([run, run])
    first, second = find_all([f"one={run}", run])
    assert (first.name, first.folder) == ("one", run / "adapter")
    assert second.name == second.record["name"]
    with_equals_sign = copy_run(run, tmp_path / "peft.r=8")
    assert (
        find_all([with_equals_sign])[0].folder == with_equals_sign / "adapter"
    )  # a path with an equals sign


def test_a_record_that_is_not_json_is_an_error(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    (run / "run.json").write_text('{"name"')
    with pytest.raises(SavedError, match=r"run\.json cannot be read"):
        _ = find(run).record
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("args", "completion_only"), [("{completion_only_loss: false}", False), ("{}", True)]
)
def test_the_same_tokens_count_as_in_its_run(
    base: Any, tmp_path: Path, args: str, completion_only: bool
) -> None:
    (tmp_path / "config.yaml").write_text(f"algorithm: {{args: {args}}}\n")
    saved = Saved(tmp_path, None, tmp_path)
    assert saved.completion_only is completion_only
    loaded = Loaded("base", base.model, base.tokenizer)
    row = {"prompt": "some question", "completion": "no"}
    (labels,) = _tokenised(loaded, [row], saved.completion_only).labels
    assert (IGNORED in labels) is completion_only


@pytest.mark.parametrize("as_chat", [True, False])
def test_rows_are_read_as_its_run_read_them(tmp_path: Path, as_chat: bool) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{as_chat: {as_chat}}}\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n')
    saved = Saved(tmp_path, None, tmp_path)
    (row,) = _read(str(rows), saved).train
    assert ("messages" in row) is saved.as_chat is as_chat
