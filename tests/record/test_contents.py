"""Files that a finished run used are unchanged, or are named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.files.whole import sha256
from lora_exp.model.identity import files_hash, small_files
from lora_exp.record.contents import changed_files


def write_record(folder: Path, **record: Any) -> Path:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    values = {"data": {}, "base": None, "adapters": {}} | record
    (run / "run.json").write_text(json.dumps(values))
    return run


def test_data_base_and_template_are_compared_by_content(tmp_path: Path) -> None:
    rows, template, base = tmp_path / "rows.jsonl", tmp_path / "chat.jinja", tmp_path / "base"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    template.write_text("{{ messages }}")
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    cfg = compose(
        "data=jsonl", f"data.path={rows}", f"data.chat_template={template}",
        "model=local", f"model.path={base}",
    )  # fmt: skip
    digest = hashlib.sha256(template.read_bytes()).hexdigest()
    data = {str(rows): sha256(rows), "chat_template": f"sha256:{digest}"}
    run = write_record(tmp_path, data=data, base=files_hash(base, None))
    assert changed_files(run, cfg) == []
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    assert changed_files(run, cfg) == [str(rows)]
    template.write_text("{{ bos_token }}{{ messages }}")
    assert set(changed_files(run, cfg)) == {str(rows), "chat_template"}
    assert changed_files(write_record(tmp_path, data={}, base="sha256:0"), cfg)[-1] == str(base)


def test_the_tokenizer_and_the_config_of_a_base_are_compared(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "notes.md"):
        (base / name).write_text("{}")
    cfg = compose("data=corpus", "model=local", f"model.path={base}")
    run = write_record(tmp_path, base=files_hash(base, None), base_files=small_files(str(base)))
    assert changed_files(run, cfg) == []
    (base / "notes.md").write_text("other")
    assert changed_files(run, cfg) == []
    (base / "tokenizer.json").write_text("other")
    (base / "chat_template.jinja").write_text("new")
    changed = [f"{base}/chat_template.jinja", f"{base}/tokenizer.json"]
    assert changed_files(run, cfg) == changed
    earlier = write_record(tmp_path, base=files_hash(base, None))  # it has no such hashes
    assert changed_files(earlier, cfg) == []


def test_another_file_in_a_glob_is_a_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    cfg = compose("data=jsonl", f"data.path={tmp_path}/*.jsonl")
    data = {str(path): sha256(path) for path in sorted(tmp_path.glob("*.jsonl"))}
    run = write_record(tmp_path, data=data, base=None)
    assert changed_files(run, cfg) == []
    (tmp_path / "c.jsonl").write_text('{"text": "y"}\n')
    assert changed_files(run, cfg) == [str(tmp_path / "c.jsonl")]


def test_generated_rows_and_deleted_files_are_not_reported_as_changed(tmp_path: Path) -> None:
    run = write_record(tmp_path, data={"lora_exp.corpus": "seed 0, 64 rows"})
    assert changed_files(run, compose("data=corpus")) == []
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n')
    cfg = compose("data=jsonl", f"data.path={path}")
    run = write_record(tmp_path, data={str(path): "other"})
    path.unlink()
    assert changed_files(run, cfg) == []


@pytest.mark.parametrize("data", ["corpus", "demo_pairs"])
def test_the_template_of_generated_rows_is_compared(tmp_path: Path, data: str) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    cfg = compose(f"data={data}", f"data.chat_template={template}")
    digest = f"sha256:{sha256(template)}"
    run = write_record(tmp_path, data={"lora_exp.corpus": "seed 0", "chat_template": digest})
    assert changed_files(run, cfg) == []
    template.write_text("{{ bos_token }}{{ messages }}")
    assert changed_files(run, cfg) == ["chat_template"]


def test_files_added_to_a_data_folder_or_renamed_in_it_are_changes(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    paths = [folder / "a.jsonl", folder / "more" / "b.jsonl"]
    for path in paths:
        path.write_text('{"text": "x"}\n')
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    cfg = compose("data=hub", f"data.path={folder}", f"data.chat_template={template}")
    data = {str(path): sha256(path) for path in paths}
    data["chat_template"] = f"sha256:{sha256(template)}"
    run = write_record(tmp_path, data=data)
    assert changed_files(run, cfg) == []
    (folder / "c.jsonl").write_text('{"text": "y"}\n')
    assert changed_files(run, cfg) == [str(folder / "c.jsonl")]
    (folder / "c.jsonl").unlink()
    renamed = [path.rename(path.with_suffix(".json")) for path in paths]
    assert set(changed_files(run, cfg)) == {*map(str, paths), *map(str, renamed)}


def test_the_adapter_that_a_run_starts_from_is_compared(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    weights = start / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    values: Any = OmegaConf.to_container(compose("data=corpus"))
    cfg = OmegaConf.create(values | {"adapter": str(start)})
    run = write_record(tmp_path, adapters={str(start): f"sha256:{sha256(weights)}"})
    assert changed_files(run, cfg) == []
    weights.write_bytes(b"two")
    assert changed_files(run, cfg) == [str(start)]
