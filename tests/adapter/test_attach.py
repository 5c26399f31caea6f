"""Which modules are adapted, and which names are an error instead of being ignored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp import compose, load_adapter
from lora_exp.adapter.attach import attach
from lora_exp.errors import ConfigError, TargetError
from lora_exp.model.loading import base_of


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("peft.modules_to_save=[lm_hed]", "peft.modules_to_save"),
        ("peft.exclude_modules=[mlpp]", "peft.exclude_modules"),
        ("peft.rank_pattern={q_prj:4}", "peft.rank_pattern"),
        ("peft.alpha_pattern={layers.9.q_proj:4}", "peft.alpha_pattern"),
    ],
)
def test_every_unmatched_name_is_an_error(
    fresh_base: Any, tmp_path: Any, override: str, key: str
) -> None:
    with pytest.raises(TargetError, match=key):
        attach(fresh_base, compose(override), tmp_path)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantised_modules_are_not_trained_whole(quant: str, tmp_path: Any) -> None:
    cfg = compose(f"quant={quant}", "peft.modules_to_save=[layers.1.mlp]", "targets=attention")
    message = r"^peft\.modules_to_save: model.layers.1.mlp is quantised, .*skip_modules=\[layers\.1"
    with pytest.raises(ConfigError, match=message):
        attach(base_of(cfg), cfg, tmp_path)
    cfg = compose(
        f"quant={quant}", "peft.modules_to_save=[lm_head,layers.1.mlp]", "targets=attention",
        "quant.skip_modules=[layers.1.mlp]",
    )  # fmt: skip
    trained = dict(attach(base_of(cfg), cfg, tmp_path).model.named_parameters())
    assert any("layers.1.mlp.modules_to_save" in n and p.requires_grad for n, p in trained.items())


def test_patterns_set_ranks_and_scales_by_name(fresh_base: Any, tmp_path: Any) -> None:
    cfg = compose(
        "peft.r=4", "peft.rank_pattern={q_proj:2}", "peft.alpha_pattern={layers.0.mlp.up_proj:8}"
    )
    layers = attach(fresh_base, cfg, tmp_path).model.base_model.model.model.layers
    ranks = [layers[0].self_attn.q_proj.r["default"], layers[0].self_attn.k_proj.r["default"]]
    assert ranks == [2, 4]
    scales = [layers[i].mlp.up_proj.scaling["default"] for i in (0, 1)]
    assert scales == [2.0, 8.0]


def test_excluded_modules_get_no_adapter(fresh_base: Any, tmp_path: Any) -> None:
    cfg = compose("targets=attention", "peft.exclude_modules=[layers.0.self_attn.q_proj]")
    assert attach(fresh_base, cfg, tmp_path).modules == {
        "k_proj": 4, "o_proj": 4, "q_proj": 3, "v_proj": 4,
    }  # fmt: skip


def test_trainable_parameters_are_those_of_the_adapter(fresh_base: Any, tmp_path: Any) -> None:
    adapted = attach(fresh_base, compose("peft.r=2", "targets=qv"), tmp_path)
    assert adapted.trainable == 4 * 2 * 2 * (192 + 192)  # layers, modules, rank, in + out
    names = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)


def test_full_fine_tuning_trains_every_weight(fresh_base: Any, tmp_path: Any) -> None:
    adapted = attach(fresh_base, compose("peft=none"), tmp_path)
    assert adapted.trainable == adapted.total == 1_869_504
    assert all(p.requires_grad for p in adapted.model.parameters())


def test_an_error_of_peft_is_a_config_error(fresh_base: Any, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"peft: "):
        attach(fresh_base, compose("peft=oft", "peft.oft_block_size=7"), tmp_path)


def test_a_run_can_start_from_an_adapter_whose_target_modules_are_a_pattern(
    trained: Callable[..., Path], quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(trained("targets=qv") / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = {"target_modules": r".*\.(q_proj|v_proj)$"}  # as other trainers write it
    (folder / "adapter_config.json").write_text(json.dumps(config | pattern))
    result = quick_run(f"adapter={folder}")
    target_modules = json.loads((result.saved / "adapter_config.json").read_text())[
        "target_modules"
    ]
    assert {name.rpartition(".")[2] for name in target_modules} == {"q_proj", "v_proj"}


def test_a_run_can_start_from_a_checkpoint_of_pissa(
    trained: Callable[..., Path], quick_run: Callable[..., Any]
) -> None:
    run = trained("peft=pissa", "train.save_strategy=steps", "train.save_steps=6")
    checkpoint = (
        run / "checkpoints" / "checkpoint-12"
    )  # not yet the difference to the original base
    result = quick_run(f"adapter={checkpoint}", "train.learning_rate=1e-12", "peft.lora_dropout=0")
    ids = torch.tensor([[5, 9, 101, 7, 300, 12]])
    with torch.no_grad():
        expected, logits = (load_adapter(path)[0](ids).logits for path in (run, result.saved))
    assert torch.allclose(expected, logits, atol=1e-3)
