"""The files of a processor, copied to what was made from its base."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from lora_exp.model.processor_files import copy_processor


def test_only_the_files_that_a_base_has_are_copied(tmp_path: Path) -> None:
    for name in ("base", "made"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/processor_config.json").write_text("{}")
    (tmp_path / "base/other.json").write_text("{}")
    copy_processor(
        OmegaConf.create({"path": str(tmp_path / "base"), "revision": None}), tmp_path / "made"
    )
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["processor_config.json"]
