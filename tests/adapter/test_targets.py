"""Roles and names, resolved to modules and parameters; what cannot be adapted is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Dots1Config,
    FalconMambaConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    LagunaConfig,
    OlmoeConfig,
)

from lora_exp import compose, load_adapter
from lora_exp.adapter.attach import attach
from lora_exp.adapter.targets import Targets, below, check_names, resolve
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.errors import ConfigError, TargetError
from lora_exp.model.loading import base_of
from tests.conftest import tiny
from tests.model.test_quantised import load
from tests.model.test_text_part import llava

LORA = {"_target_": "peft.LoraConfig"}
SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2, "moe_intermediate_size": 16,
}  # fmt: skip
# a dense layer, then one with routed and shared experts
DOTS = Dots1Config(
    **SMALL, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
OLMOE = OlmoeConfig(**SMALL, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
LAGUNA = LagunaConfig(
    **SMALL, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, head_dim=16,
    shared_expert_intermediate_size=16, mlp_layer_types=["dense", "sparse"],
    layer_types=["full_attention"] * 2, eos_token_id=2,
)  # fmt: skip
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
    assert resolve(base.model, role, LORA) == Targets(names)


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
    assert resolve(model, role, LORA) == Targets(names)


def test_a_list_of_names_is_used_unchanged(base: Any) -> None:
    assert resolve(base.model, ["v_proj", "q_proj"], LORA) == Targets(["q_proj", "v_proj"])
    full_names = ["layers.0.mlp.up_proj"]
    assert resolve(base.model, full_names, LORA) == Targets(full_names)


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
        resolve(base.model, targets, LORA)


def test_check_names_accepts_whole_names_and_last_parts() -> None:
    model = SimpleNamespace(named_modules=lambda: [("", None), ("a.b", None)])
    check_names(model, "key", ["a.b", "b"])
    with pytest.raises(TargetError):
        check_names(model, "key", ["x.b"])


EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("role", "modules", "parameters", "left_out"),
    [
        ("attention", ATTENTION, [], []),
        ("experts", [], EXPERTS, []),
        # peft takes these names for those of experts, so it adapts their weights instead
        ("mlp", [], [f"{name}.weight" for name in MLP], EXPERTS),
        ("all_linear", ATTENTION, [f"{name}.weight" for name in MLP], EXPERTS),
        ("all_linear+experts", ATTENTION, [*[f"{n}.weight" for n in MLP], *EXPERTS], []),
    ],
)
def test_a_role_has_its_part_of_a_mixture_of_experts(
    role: str, modules: list[str], parameters: list[str], left_out: list[str]
) -> None:
    targets = resolve(on_meta(DOTS), role, LORA)
    assert (targets.modules, targets.parameters) == (modules, sorted(parameters))
    assert sorted(name.split(".mlp.")[1] for name in targets.left_out) == left_out


@pytest.mark.parametrize(
    ("settings", "quantised", "reason"),
    [({"lora_dropout": 0.1}, False, "without lora_dropout"), ({}, True, "without quantised")],
)
def test_what_peft_adapts_only_as_a_parameter_is_left_out_where_it_cannot(
    settings: dict[str, Any], quantised: bool, reason: str
) -> None:
    targets = resolve(on_meta(DOTS), "all_linear", LORA | settings, quantised)
    assert (targets.modules, targets.parameters) == (ATTENTION, [])
    assert len([why for why in targets.left_out.values() if reason in why]) == 6
    with pytest.raises(TargetError, match=r"mlp.shared_experts.gate_proj: peft adapts it as a"):
        resolve(on_meta(DOTS), ["q_proj", "shared_experts.gate_proj"], LORA | settings, quantised)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft.lora_dropout=0.1"], r"^peft.lora_dropout: experts are stacked .* leave it out"),
        (["+peft.use_dora=true"], r"^peft.use_dora: experts"),
        (["peft=vera"], r"^peft: experts are stacked weights, which only peft=lora adapts"),
    ],
)
def test_experts_are_adapted_by_plain_lora_only(overrides: list[str], message: str) -> None:
    settings = compose("targets=experts", *overrides).peft
    with pytest.raises(ConfigError, match=message):
        resolve(on_meta(OLMOE), "experts", settings)


def test_experts_are_adapted_in_floats_only(folder_of: Callable[[Any], Path]) -> None:
    place = ["model=local", f"model.path={folder_of(OLMOE)}", "quant=nf4", "peft.lora_dropout=0"]
    cfg = compose(*place, "targets=all_linear+experts")
    message = (
        r"^quant\.experts: .*floats only, and model.layers.0.mlp.experts.down_proj is in 4 bits"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(base_of(cfg).model, "experts", cfg.peft)
    assert resolve(base_of(cfg).model, "attention", cfg.peft).modules == ATTENTION
    cfg = compose(*place, "targets=all_linear+experts", "quant.experts=false")
    assert resolve(base_of(cfg).model, "experts", cfg.peft).parameters == EXPERTS


def test_a_mixture_without_dense_layers_has_no_mlp() -> None:
    with pytest.raises(TargetError, match=r"mlp: OlmoeForCausalLM .*; its experts are a role"):
        resolve(on_meta(OLMOE), "mlp", LORA)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # peft: without experts
def test_experts_train_are_saved_load_in_peft_and_merge(
    folder_of: Callable[[Any], Path], quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = folder_of(DOTS)
    result = quick_run(
        "model=local", f"model.path={folder}", "targets=all_linear+experts", "train.max_steps=1",
        "peft.rank_pattern={experts.gate_up_proj:2}", "samples.rows=0", "train.warmup_steps=0",
    )  # fmt: skip
    config = json.loads((result.saved / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(
        [*[f"{name}.weight" for name in MLP], *EXPERTS]
    )
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(base, result.saved).eval()
    ours, _ = load_adapter(result.directory)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        assert torch.equal(logits, plain(input_ids=ids).logits)
        with ours.disable_adapter():
            assert not torch.allclose(logits, ours(input_ids=ids).logits)
    merged = merge([result.directory], tmp_path / "merged")
    proof = prove(merged, [result.directory])
    assert proof.holds
    assert proof.computed_in == "float64"
    stacks = [m for m in ours.modules() if getattr(m, "parameter_name", "") == "gate_up_proj"]
    assert [stack.r for stack in stacks] == [{"default": 2}]


def test_layers_that_take_no_part_or_that_peft_refuses_are_left_out() -> None:
    config = JambaConfig(
        **SMALL, num_hidden_layers=2, num_experts=1, mamba_d_state=4, mamba_dt_rank=4,
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
    )  # fmt: skip
    jamba = AutoModelForCausalLM.from_config(config)
    targets = resolve(jamba, "all_linear", LORA)
    assert {"in_proj", "out_proj", "x_proj", *ATTENTION, *MLP} == {*targets.modules}
    (left_out,) = targets.left_out.items()
    assert left_out == (
        "model.layers.0.mamba.dt_proj",
        "it takes no part in what JambaForCausalLM computes, or not as a linear layer",
    )
    with pytest.raises(TargetError, match=r"dt_proj: it takes no part in what Jamba"):
        resolve(jamba, ["dt_proj", "q_proj"], LORA)
    mamba = on_meta(FalconMambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1))
    (reason,) = resolve(mamba, "all_linear", LORA).left_out.values()
    assert reason == "peft does not adapt it on falcon_mamba"


def test_layers_whose_weights_peft_would_lose_are_left_out() -> None:
    """It loads `shared_experts.up_proj` as `shared_experts..up_proj`, and says nothing."""
    model = AutoModelForCausalLM.from_config(LAGUNA)
    targets = resolve(model, "all_linear", LORA)
    shared = [f"model.layers.1.mlp.shared_experts.{name}" for name in MLP]
    assert set(targets.left_out) >= {*shared}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets.modules))
    assert not any("shared_experts" in name for name in adapted.base_model.targeted_module_names)
    assert any("mlp.gate_proj" in name for name in adapted.base_model.targeted_module_names)
    with pytest.raises(TargetError, match=r"up_proj: peft loads its weights by another name"):
        resolve(model, ["shared_experts.up_proj"], LORA)


def test_excluded_layers_are_not_adapted_as_parameters_either() -> None:
    settings = LORA | {"exclude_modules": ["shared_experts", "layers.0.mlp.up_proj"]}
    targets = resolve(on_meta(DOTS), "all_linear+experts", settings)
    dense = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    assert targets.parameters == sorted([*EXPERTS, *dense])
    only_dense = LORA | {"exclude_modules": ["experts"]}
    assert "experts" not in str(resolve(on_meta(DOTS), "all_linear+experts", only_dense).parameters)


def test_ranks_of_layers_that_are_adapted_as_parameters_are_theirs(
    folder_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    base = load(folder_of(DOTS))
    cfg = compose(
        "peft.r=4", "peft.rank_pattern={up_proj:2,shared_experts.down_proj:8,q_proj:1}",
        "peft.alpha_pattern={up_proj:16}",
    )  # fmt: skip
    model = attach(base, cfg, tmp_path).model
    layer = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    ranks = {name.partition("layers.")[2]: m.r["default"] for name, m in layer.items()}
    assert ranks["0.mlp.up_proj"] == ranks["1.mlp.shared_experts.up_proj"] == 2
    assert ranks["1.mlp.shared_experts.down_proj"] == 8
    assert (ranks["0.mlp.down_proj"], ranks["0.self_attn.q_proj"]) == (4, 1)
    scaling = next(m.scaling for name, m in layer.items() if name.endswith("0.mlp.up_proj"))
    assert scaling == {"default": 8.0}


def test_excluding_a_container_excludes_all_below_it(fresh_base: Any, tmp_path: Path) -> None:
    assert below(fresh_base.model, ["q_proj"]) == ["q_proj"]
    cfg = compose("peft.exclude_modules=[layers.0,mlp]")
    assert attach(fresh_base, cfg, tmp_path).modules == dict.fromkeys(ATTENTION, 3)


def test_roles_and_names_stay_within_the_language_model(folder_of: Callable[[Any], Path]) -> None:
    model = tiny(path=str(folder_of(llava()))).model
    layers = [f"model.language_model.layers.{i}" for i in range(2)]
    assert resolve(model, "qv", LORA).modules == [
        f"{layer}.self_attn.{name}" for layer in layers for name in ("q_proj", "v_proj")
    ]
    assert not any("vision" in name for name in resolve(model, "all_linear", LORA).modules)
    names = resolve(model, ["v_proj", "gate_proj"], LORA).modules  # the tower has a v_proj, too
    assert names == ["gate_proj", *(f"{layer}.self_attn.v_proj" for layer in layers)]
    with pytest.raises(TargetError, match="'fc1' is no module of the language model"):
        resolve(model, ["fc1", "v_proj"], LORA)
