"""Initializations of LoRA: our list of those that change the base equals peft's behaviour."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lora_exp import compose
from lora_exp.config.initialization import (
    NEEDS_FLOATS,
    NEEDS_PREPARATION,
    initialization,
    rewrites_base,
    saved_as_plain_lora,
)
from lora_exp.config.signature import signature
from lora_exp.lockstep.plan import Job, solitary
from lora_exp.model.loading import Base, bnb_4bit
from tests.conftest import tiny

NAMES = [
    "gaussian", "orthogonal", "mica", "eva", "pissa", "pissa_niter_4", "olora", "corda", "lora_ga",
]  # fmt: skip
LOFTQ = pytest.param(
    "loftq", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="peft: on a GPU only")
)


class Layer(nn.Module):
    """A model of one layer, with the attributes that some initializations need."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(16, 12, bias=False)
        u, s, v = torch.linalg.svd(self.inner.weight.detach(), full_matrices=False)
        self.inner.eigens = SimpleNamespace(S_WC=s[:4], U_WC=u[:, :4], V_WC=v[:4].T)  # type: ignore[assignment]
        self.inner._peft_loraga_grad = torch.randn(12, 16)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def lora_config(name: Any) -> peft.LoraConfig:
    settings: dict[str, Any] = {f"{name}_config": {}} if name in ("eva", "corda", "lora_ga") else {}
    if name == "loftq":
        settings["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    return peft.LoraConfig(r=4, target_modules=["inner"], init_lora_weights=name, **settings)


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("name", [True, False, *NAMES, LOFTQ])
def test_rewrites_base_equals_what_peft_does(name: Any) -> None:
    layer = Layer()
    before = layer.inner.weight.detach().clone()
    model = peft.get_peft_model(layer, lora_config(name), low_cpu_mem_usage=False)
    after = model.base_model.model.inner.base_layer.weight
    assert (not torch.equal(before, after)) == bool(rewrites_base({"init_lora_weights": name}))


def test_kasa_rewrites_the_base_too() -> None:
    layer = Layer()
    before = layer.inner.weight.detach().clone()
    config = peft.LoraConfig(r=4, target_modules=["inner"], kasa_config={})
    model = peft.get_peft_model(layer, config)
    assert not torch.equal(before, model.base_model.model.inner.base_layer.weight)
    assert rewrites_base(vars(config)) == rewrites_base({"kasa_config": {}}) == "kasa"


def test_every_initialization_of_peft_is_known() -> None:
    lora_signature = signature("peft.LoraConfig")
    assert lora_signature is not None
    node = lora_signature.arguments["init_lora_weights"]
    assert node is not None
    texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
    names = {str(text).partition("_niter")[0] for text in texts if isinstance(text, str)}
    assert names == {*map(initialization, ({"init_lora_weights": n} for n in NAMES)), "loftq"} - {
        "lora_ga"  # peft accepts it without documenting it
    }


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NEEDS_PREPARATION])
def test_needs_floats_equals_what_peft_accepts(name: str) -> None:
    quantised = tiny(bnb_4bit("nf4", True, "auto"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=name)
    fails = False
    try:
        peft.get_peft_model(quantised.model, config)
    except (TypeError, RuntimeError):
        fails = True
    # peft quantises the weights that olora leaves again; we refuse it: that cannot be undone
    assert fails == (config_name(name) in NEEDS_FLOATS and name != "olora")


def config_name(name: str) -> str:
    return initialization({"init_lora_weights": name})


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora"])
def test_initializations_that_rewrite_the_base_are_saved_as_plain_lora(name: str) -> None:
    assert saved_as_plain_lora({"init_lora_weights": name})
    assert not saved_as_plain_lora({"init_lora_weights": True})
    assert not any(saved_as_plain_lora({"init_lora_weights": n}) for n in NEEDS_PREPARATION)


SOLITARY = {
    "peft=pissa": "pissa", "peft=olora": "olora", "+peft.init_lora_weights=pissa_niter_4": "pissa",
    "+peft.kasa_config={}": "kasa", "+peft.init_lora_weights=orthogonal": None,
    "+peft.init_lora_weights=gaussian": None,
}  # fmt: skip


@pytest.mark.parametrize(("override", "method"), SOLITARY.items())
def test_a_job_trains_alone_only_if_it_rewrites_the_base(override: str, method: str | None) -> None:
    cfg = compose("tracking=none", override)
    reason = solitary(Job(0, OmegaConf.create(), cfg, Path("multirun/0")))
    assert reason == (method and f"{method} starts from weights of its own")


def test_orthogonal_initialization_does_not_change_the_models_outputs(
    fresh_base: Base, quick_run: Callable[..., Any]
) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = fresh_base.model(ids).logits
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="orthogonal")
        after = peft.get_peft_model(fresh_base.model, config)(ids).logits
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    assert quick_run("+peft.init_lora_weights=orthogonal").saved.is_dir()


def test_no_torch_is_imported() -> None:
    code = "import sys, lora_exp.config.initialization; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
