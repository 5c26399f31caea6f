"""Which modules are adapted, and which names are an error instead of being ignored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from lora_exp import compose, load_adapter
from lora_exp.adapter.attach import attach, check_names, resolve
from lora_exp.errors import ConfigError, TargetError

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]
GPT2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
NEOX = GPTNeoXConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64
)


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("all_linear", sorted(ATTENTION + MLP)),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("qv", ["q_proj", "v_proj"]),
        ("norm", ["input_layernorm", "norm", "post_attention_layernorm"]),
    ],
)
def test_a_role_names_the_modules_of_a_llama(base: Any, role: str, names: list[str]) -> None:
    assert resolve(base.model, role) == names


@pytest.mark.parametrize(
    ("config", "role", "names"),
    [
        (GPT2, "qv", ["c_attn"]),
        (GPT2, "attention", ["c_attn", "transformer.h.0.attn.c_proj"]),
        (GPT2, "mlp", ["c_fc", "transformer.h.0.mlp.c_proj"]),
        (GPT2, "all_linear", ["c_attn", "c_fc", "c_proj"]),
        (NEOX, "qv", ["query_key_value"]),
        (NEOX, "attention", ["dense", "query_key_value"]),
        (NEOX, "mlp", ["dense_4h_to_h", "dense_h_to_4h"]),
    ],
)
def test_a_role_fits_other_architectures(config: Any, role: str, names: list[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert resolve(model, role) == names


def test_a_list_of_names_is_used_unchanged(base: Any) -> None:
    assert resolve(base.model, ["v_proj", "q_proj"]) == ["q_proj", "v_proj"]
    full_names = ["layers.0.mlp.up_proj"]
    assert resolve(base.model, full_names) == full_names


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"target_modules: no module of LlamaForCausalLM is called 'q_prj' .*q_proj"),
        (["q_proj", "nothing"], r"is called 'nothing'$"),
        ("q_proj", r"'q_proj' is no role .* \(did you mean.*peft.target_modules=\[q_proj\]"),
        ("(a+)+$", r"is no role"),
    ],
)
def test_names_that_no_module_has_are_refused(base: Any, targets: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve(base.model, targets)


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


def test_check_names_accepts_whole_names_and_last_parts() -> None:
    model = SimpleNamespace(named_modules=lambda: [("", None), ("a.b", None)])
    check_names(model, "key", ["a.b", "b"])
    with pytest.raises(TargetError):
        check_names(model, "key", ["x.b"])


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
