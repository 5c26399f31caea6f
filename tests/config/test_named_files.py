"""Files and commits that a config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp import compose
from tests.config.test_validation import faults


def test_similar_file_names_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    faults_by_key = faults("data=jsonl", f"data.path={tmp_path}/row.jsonl")
    assert "did you mean rows.jsonl" in faults_by_key["data.path"]


@pytest.mark.parametrize(
    ("others", "fault"),
    [([], "is an adapter (adapter_config.json); give its base, and adapter="),
     (["config.json"], "also has an adapter (adapter_config.json); take that file out")],
)  # fmt: skip
def test_a_folder_with_an_adapter_is_no_base(others: list[str], fault: str, tmp_path: Path) -> None:
    for name in ("adapter_config.json", *others):
        (tmp_path / name).write_text("{}")
    assert fault in faults("model=local", f"model.path={tmp_path}")["model.path"]


def test_strict_requires_commits_for_hub_models_and_data() -> None:
    hub = ["model=qwen3_0_6b", "data=hub", "data.path=some/rows", "strict=true"]
    assert list(faults(*hub)) == ["model.revision", "data.revision"]
    commit = "0123456789" * 4
    assert list(faults(*hub, "model.revision=main", f"data.revision={commit}")) == [
        "model.revision"
    ]
    compose(*hub, f"model.revision={commit}", f"data.revision={commit}")
    compose("strict=true")  # local files are identified by their hash
