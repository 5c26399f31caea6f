"""The list of models: each option of conf/model, with sizes that equal its architecture's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from lora_exp import compose
from lora_exp.after import pages
from lora_exp.after.base_bytes import base_bytes
from lora_exp.after.estimate import model_config, skeleton
from lora_exp.after.models import models
from lora_exp.config.door import CONF
from tests.cli.test_main import without_torch

# of their published config.json
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_1_7b": ("qwen3", {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 28, "head_dim": 128,
        "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }),
    "gpt_oss_20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
}  # fmt: skip


def test_every_option_is_listed_with_its_licence() -> None:
    rows = {row["option"]: row for row in models()}
    assert rows.keys() == {path.stem for path in (CONF / "model").glob("*.yaml")} - {"local"}
    assert rows["glm4_9b"]["path"] == "zai-org/GLM-4-9B-0414"
    assert rows["glm4_9b"]["licence"] == "MIT"
    assert rows["gemma3_4b"]["licence"] == "Gemma licence, gated"
    for option, row in rows.items():
        assert compose(f"model={option}").model.path == row["path"]
        assert row["bytes"]["nf4"] < row["bytes"]["int8"] < row["bytes"]["none"]


def test_options_of_ones_own_are_listed_last_without_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF / "model", tmp_path / "model")
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [local]\npath: me/mine\n")
    monkeypatch.setattr("lora_exp.after.models.CONF", tmp_path)
    rows = models()
    assert rows[-1] | {"option": "mine", "path": "me/mine"} == rows[-1]
    assert (rows[-1]["licence"], rows[-1]["parameters"], rows[-1]["bytes"]) == (None, None, {})
    console = Console(width=150)
    with console.capture() as capture:
        console.print(pages.models(rows))
    (line,) = (line for line in capture.get().splitlines() if "me/mine" in line)
    assert line.split() == ["mine", "me/mine", *"-----"]


@pytest.mark.parametrize("option", ["tiny", *ARCHITECTURES])
def test_sizes_are_those_that_an_estimate_computes(option: str) -> None:
    row = next(row for row in models() if row["option"] == option)
    if option == "tiny":
        cfg = compose("model=tiny", "model.dtype=bfloat16")
        model = skeleton(cfg, model_config(cfg))
    else:
        kind, values = ARCHITECTURES[option]
        with torch.device("meta"):
            config = AutoConfig.for_model(kind, **values)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    for quant in ("none", "int8", "nf4"):
        node = compose(f"quant={quant}").quant
        assert row["bytes"][quant] == pytest.approx(base_bytes(model, node), rel=0.02)


def test_the_list_needs_no_torch() -> None:
    done = without_torch("models", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(models())
    page = without_torch("models").stdout
    assert "qwen3_30b_a3b" in page
    assert "Qwen/Qwen3-30B-A3B" in page
